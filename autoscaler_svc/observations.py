"""What was seen of the pool, lately: what policies decide by."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from autoscaler_svc.load import PoolLoad

KEPT_S = 3600.0
"""How long an observation is kept: the longest window that a policy may have."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What is expected to arrive, per second, in the time that an executor which is asked for now would serve."""

    mean_requests: float = 0.0
    high_requests: float = 0.0  # the quantile that capacity is planned for
    method: str = "none"


@dataclass(frozen=True, slots=True)
class Observation:
    """The pool at one moment, with what the autoscaler knows beside the scheduler."""

    at: float  # seconds of a clock that does not jump
    load: PoolLoad
    starting_count: int = 0  # executors that were launched and are still expected to become ready
    capacity: float | None = None  # of ready and starting ones, in executors of capacity 1; None: each has 1
    wall_at: float = 0.0  # Unix seconds, for schedules
    startup_s: float = 0.0  # from the decision to launch an executor until it takes requests; 0: unknown
    arrivals: Arrivals = Arrivals()

    @property
    def executor_count(self) -> int:
        """Executors that are there or on their way, in those of capacity 1: what a policy compares its wish with."""
        return self.heads if self.capacity is None else round(self.capacity)

    @property
    def heads(self) -> int:
        """Executors that are there or on their way, whatever their capacity."""
        return len(self.load.ready) + self.starting_count

    @property
    def mean_capacity(self) -> float:
        """Of one of these executors."""
        return self.capacity / self.heads if self.capacity and self.heads else 1.0


@dataclass(slots=True)
class Observations:
    """Observations in the order of their time, for as long as anybody looks back."""

    _kept: deque[Observation] = field(default_factory=deque)

    def add(self, observation: Observation) -> None:
        """Take in what was seen now. A clock that was set back makes everything before meaningless."""
        if self._kept and observation.at < self._kept[-1].at:
            self._kept.clear()
        self._kept.append(observation)
        while self._kept[0].at < observation.at - KEPT_S:
            self._kept.popleft()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def last(self) -> Observation:
        """What was seen last. There must be something."""
        return self._kept[-1]

    @property
    def first(self) -> Observation:
        """The oldest that is kept. There must be something."""
        return self._kept[0]

    def since(self, at: float) -> list[Observation]:
        """Those of that moment and after, oldest first."""
        start = bisect.bisect_left(self._kept, at, key=lambda observation: observation.at)
        return [self._kept[index] for index in range(start, len(self._kept))]

    def before(self, at: float) -> Observation:
        """The last one of that moment or before it, or else the first there is."""
        index = bisect.bisect_right(self._kept, at, key=lambda observation: observation.at)
        return self._kept[max(0, index - 1)]

    def covers(self, now: float, window_s: float) -> bool:
        """Whether all of the last `window_s` was observed."""
        return bool(self._kept) and self._kept[0].at <= now - window_s

    def __iter__(self) -> Iterator[Observation]:
        return iter(self._kept)


def rate(earlier: Observation, later: Observation, counter: str) -> float:
    """Growth per second of one of the load's counters between two observations; NaN when they cannot be compared."""
    seconds = later.at - earlier.at
    if seconds <= 0 or earlier.load.epoch != later.load.epoch:
        return math.nan
    return (getattr(later.load, counter) - getattr(earlier.load, counter)) / seconds
