"""How long executors take to start, learnt from those that did."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 20


class StartupTimes:
    """Times from a launch until the executor took requests: of the last ones that were seen, or what it says itself."""

    def __init__(self, assumed_s: float) -> None:
        """Go by `assumed_s` until one was seen; 0: nothing is known."""
        self.assumed_s = assumed_s
        self._seen: deque[float] = deque(maxlen=_KEPT)

    def note(self, seconds: float) -> None:
        """An executor was launched, and takes requests so many seconds later."""
        self._seen.append(seconds)

    @property
    def typical_s(self) -> float:
        """The median; 0: nothing is known."""
        return statistics.median(self._seen) if self._seen else self.assumed_s

    @property
    def least_s(self) -> float:
        """The fastest start that was seen: what cannot wait so long cannot be helped. 0: none was."""
        return min(self._seen, default=0.0)
