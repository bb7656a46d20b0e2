"""What requests waited for, in words: made of running sums, so that a wait costs the same however long it is."""

from __future__ import annotations

from scheduler_svc.core.obstacles import Obstacle

ITS_EXECUTOR = "its executor to come back"
_LITTLE = 0.05  # of a wait, below which a cause is not worth a word
_CAUSES = tuple(Obstacle)

Sums = tuple[float, ...]  # seconds by `Obstacle`


class QueueWatch:
    """How long each obstacle has stood in the way of the request whose turn it was, and so of all behind it."""

    def __init__(self) -> None:
        """Start with nobody waiting."""
        self._sums = [0.0] * len(_CAUSES)
        self._obstacle: Obstacle | None = None
        self._since = 0.0

    def note(self, now: float, obstacle: Obstacle | None) -> None:
        """From now on this stands in the way; None: nobody waits."""
        if obstacle is not self._obstacle:
            self._sums = list(self.sums(now))
            self._obstacle, self._since = obstacle, now

    def sums(self, now: float) -> Sums:
        """Up to now."""
        if self._obstacle is None:
            return tuple(self._sums)
        current = _CAUSES.index(self._obstacle)
        more = max(0.0, now - self._since)
        return tuple(seconds + more * (index == current) for index, seconds in enumerate(self._sums))


class Wait:
    """Time in which nobody computes a choice: first for its executor, where that may come back, then in the queue."""

    def __init__(self, watch: QueueWatch, now: float, *, awaits_executor: bool) -> None:
        """It begins now."""
        self._watch = watch
        self._spent: dict[str, float] = {}
        self._awaited_since: float | None = None
        self._queued: Sums | None = None
        self._begin(now, awaits_executor)

    def _begin(self, now: float, awaits_executor: bool) -> None:
        self._awaited_since = now if awaits_executor else None
        self._queued = None if awaits_executor else self._watch.sums(now)

    def move(self, now: float, *, awaits_executor: bool) -> None:
        """From now on it waits in the other way."""
        self._spent = self._until(now)
        self._begin(now, awaits_executor)

    def end(self, now: float) -> tuple[str, ...]:
        """It is over; what it was for."""
        self._spent = self._until(now)
        self._awaited_since = self._queued = None
        return self.causes(now)

    def causes(self, now: float) -> tuple[str, ...]:
        """What it was for until now, that which took longest first."""
        spent = self._until(now)
        least = _LITTLE * sum(spent.values())
        return tuple(name for name in sorted(spent, key=lambda name: -spent[name]) if spent[name] > least)

    def _until(self, now: float) -> dict[str, float]:
        spent = dict(self._spent)
        if self._awaited_since is not None:
            spent[ITS_EXECUTOR] = spent.get(ITS_EXECUTOR, 0.0) + now - self._awaited_since
        if self._queued is not None:
            for cause, last, first in zip(_CAUSES, self._watch.sums(now), self._queued, strict=True):
                spent[cause.value] = spent.get(cause.value, 0.0) + max(0.0, last - first)
        return spent
