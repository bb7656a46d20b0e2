"""How the steps of one executor went."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

_RECENT = 64
"""Steps that means and the median are over."""

_SLOW_FACTOR, _SLOW_S = 5.0, 0.05
"""A step is slow when it took so many times the mean, and at least so long."""


class Phases(NamedTuple):
    """Seconds by what the executor did, as it measured them on its own clock, in the order in which they pass."""

    idle: float = 0.0  # it had nothing to run before the plan came
    wait: float = 0.0  # the plan lay there while the step before it ran
    prepare: float = 0.0  # reading the plan, building the batch
    forward: float = 0.0
    sample: float = 0.0

    @property
    def busy(self) -> float:
        """Of these, what the step itself took."""
        return self.prepare + self.forward + self.sample

    def since(self, earlier: Phases) -> Phases:
        """What was added since an earlier sum."""
        return Phases(*(now - then for now, then in zip(self, earlier, strict=True)))


@dataclass(slots=True)
class StepMeter:
    """Counts the steps of an executor since it joined, over all of its attachments."""

    step_count: int = 0
    token_count: int = 0  # computed
    total: Phases = field(default_factory=Phases)
    starved_s: float = 0.0  # idle while it had requests to go on with
    sent_byte_count: int = 0  # of messages to the executor
    received_byte_count: int = 0
    last: Phases = field(default_factory=Phases)  # the step that ran last
    last_s: float = 0.0  # how long that took as a whole; see `note`
    whole_s: float = 0.0  # the same of all steps
    _recent: deque[Phases] = field(default_factory=lambda: deque(maxlen=_RECENT))  # idle where it had work, else 0

    def note(self, phases: Phases, *, goes_on: bool, away_s: float = 0.0) -> None:
        """A step has run; `goes_on`: with requests that were there before it. `away_s` is the time from when its plan
        was sent until somebody here had time for its result.

        The way there and back is part of how long it took. That the step before it ran meanwhile is not.
        """
        self.step_count += 1
        self.last_s = max(phases.busy, away_s - phases.wait)
        self.whole_s += self.last_s
        self.total = Phases(*(one + other for one, other in zip(self.total, phases, strict=True)))
        self.starved_s += phases.idle if goes_on else 0.0
        self.last = phases
        self._recent.append(phases if goes_on else phases._replace(idle=0.0))

    @property
    def is_slow(self) -> bool:
        """Whether the last step took unusually long, wherever: on the executor, on the wire, or here."""
        return self.last_s >= _SLOW_S and self.last_s * self.step_count > _SLOW_FACTOR * self.whole_s

    @property
    def median_s(self) -> float:
        """Median time of the last steps; 0 before the first."""
        return statistics.median(phases.busy for phases in list(self._recent)) if self._recent else 0.0

    @property
    def mean(self) -> Phases:
        """Mean of the last steps, phase by phase; idle is only what it was while there was work."""
        recent = list(self._recent)
        return Phases(*(sum(phase) / len(recent) for phase in zip(*recent, strict=True))) if recent else Phases()

    @property
    def idle_share(self) -> float:
        """Share of the time since it joined, 0 to 1, in which the executor had requests to go on with and no plan."""
        return idle_share(self.starved_s, self.total.busy)


def idle_share(starved_s: float, busy_s: float) -> float:
    """Share of the time with work, 0 to 1, in which an executor had no plan; 0 where there was no work."""
    with_work_s = starved_s + busy_s
    return starved_s / with_work_s if with_work_s else 0.0
