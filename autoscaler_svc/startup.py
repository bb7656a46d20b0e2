"""How long executors take to start, learnt from those that did."""

from __future__ import annotations

import math
import statistics
from collections import deque

_KEPT = 20


class StartupTimes:
    """Times from a launch until the executor took requests: of the last ones that were seen, or what it says itself."""

    def __init__(self, assumed_s: float) -> None:
        """Go by `assumed_s` until one was seen; 0: nothing is known."""
        self.assumed_s = assumed_s
        self._reported_s = math.inf  # the least
        self._seen: deque[float] = deque(maxlen=_KEPT)

    def note(self, seconds: float) -> None:
        """An executor was launched, and takes requests so many seconds later."""
        self._seen.append(seconds)

    def note_reported(self, seconds: float) -> None:
        """An executor says that its process took so long until its model was ready; the launch itself is not in it."""
        if seconds:
            self._reported_s = min(self._reported_s, seconds)

    @property
    def typical_s(self) -> float:
        """The median; 0: nothing is known."""
        return statistics.median(self._seen) if self._seen else self.assumed_s

    @property
    def least_s(self) -> float:
        """The fastest start that is known of: what cannot wait so long cannot be helped. 0: none is."""
        least = min([*self._seen, self._reported_s])
        return least if least != math.inf else 0.0
