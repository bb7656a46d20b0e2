"""What was seen of the pool, lately: what policies decide by."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from autoscaler_svc.load import PoolLoad

LONGEST_WINDOW_S = 3600.0
"""How far a policy may look back."""

_ALL_S, _THINNED_S = 300.0, 10.0
"""For how long every observation is kept; of older ones, one in so many seconds."""


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
        return self.heads if self.capacity is None else math.ceil(self.capacity - 1e-9)

    @property
    def heads(self) -> int:
        """Executors that are there or on their way, whatever their capacity."""
        return len(self.load.ready) + self.starting_count

    @property
    def mean_capacity(self) -> float:
        """Of one of these executors."""
        return self.capacity / self.heads if self.capacity and self.heads else 1.0

    @property
    def has_speed(self) -> bool:
        """Whether it says what an executor does with requests as they are: one has computed, and some have ended."""
        return self.load.mean_output_token_count > 0 and any(e.step_us + e.token_us > 0 for e in self.load.ready)


@dataclass(slots=True)
class Observations:
    """Observations in the order of their time, for as long as anybody looks back; thinned out after five minutes."""

    with_speed: Observation | None = None  # the last one that has it, however long ago
    _kept: list[Observation] = field(default_factory=list)
    _thinned_count: int = 0  # how many at the beginning are thinned out already

    def add(self, observation: Observation) -> None:
        """Take in what was seen now. A clock that was set back makes everything before meaningless."""
        if self._kept and observation.at < self._kept[-1].at:
            self._kept.clear()
            self._thinned_count = 0
        self._kept.append(observation)
        if observation.has_speed:
            self.with_speed = observation
        self._thin(observation.at - _ALL_S)
        if len(self._kept) > 1 and self._kept[1].at <= observation.at - LONGEST_WINDOW_S:
            # The one that is older than the window stays: by it all of the window was observed.
            del self._kept[0]
            self._thinned_count = max(0, self._thinned_count - 1)

    def _thin(self, before: float) -> None:
        """Of those before a moment keep one in ten seconds."""
        while self._thinned_count < len(self._kept) and self._kept[self._thinned_count].at < before:
            last = self._kept[self._thinned_count - 1] if self._thinned_count else None
            if last is not None and self._kept[self._thinned_count].at - last.at < _THINNED_S:
                del self._kept[self._thinned_count]
            else:
                self._thinned_count += 1

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
        return self._kept[bisect.bisect_left(self._kept, at, key=_moment) :]

    def before(self, at: float) -> Observation:
        """The last one of that moment or before it, or else the first there is."""
        return self._kept[max(0, bisect.bisect_right(self._kept, at, key=_moment) - 1)]

    def covers(self, now: float, window_s: float) -> bool:
        """Whether all of the last `window_s` was observed."""
        return bool(self._kept) and self._kept[0].at <= now - window_s

    def __iter__(self) -> Iterator[Observation]:
        return iter(self._kept)


def _moment(observation: Observation) -> float:
    return observation.at
