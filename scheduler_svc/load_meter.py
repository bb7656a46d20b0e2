"""Counts what comes, what goes and how long it took: the counters of an autoscaler and of Prometheus."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Limits between which times are counted: from a fast step to a queue that nobody waits out."""

_WINDOW_S = 60.0
_KEPT = 4096
_MEMORY = 0.98
"""Weight that an ended request keeps with each later one in mean lengths: about the last fifty count."""


@dataclass(slots=True)
class LatencyMeter:
    """Times of one kind, in seconds."""

    count: int = 0
    sum_s: float = 0.0
    _recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))  # (when, how long)
    _bucket_counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))

    def note(self, now: float, seconds: float) -> None:
        """It took somebody so long."""
        self.count += 1
        self.sum_s += seconds
        self._recent.append((now, seconds))
        self._bucket_counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1

    def cumulative(self) -> list[tuple[float, int]]:
        """For each limit in seconds, how many took no longer, since the beginning."""
        return list(zip(BUCKETS_S, itertools.accumulate(self._bucket_counts), strict=False))

    def quantiles(self, now: float, *shares: float) -> list[float]:
        """The quantiles of the last minute; zeros where there was nobody.

        Example: of the times 1, 2, 3 and 4 the half is 3: the least that more than half of them are below or at.
        """
        times = sorted(seconds for at, seconds in list(self._recent) if at >= now - _WINDOW_S)
        return [times[min(len(times) - 1, int(share * len(times)))] if times else 0.0 for share in shares]


@dataclass(eq=False, slots=True)
class LoadWatcher:
    """Somebody who is told the load again and again."""

    first_token_target_s: float = 0.0
    per_token_target_s: float = 0.0
    first_token_within_count: int = 0
    per_token_within_count: int = 0
    is_urgent: asyncio.Event = field(default_factory=asyncio.Event)  # tell at once


class LoadMeter:
    """Everything since the scheduler began. Notes cost nothing that grows with anything."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.arrived_request_count = 0
        self.arrived_prompt_token_count = 0
        self.refused_request_count = 0
        self.ended_request_count = 0
        self.generated_token_count = 0
        self.computed_token_count = 0
        self.reused_token_count = 0
        self.first_token = LatencyMeter()
        self.per_token = LatencyMeter()
        self._at_door: dict[
            object, float
        ] = {}  # who waits for the first executor to say what the model takes; since when
        self._prompt_tokens = self._output_tokens = self._weight = 0.0
        self._watchers: set[LoadWatcher] = set()

    @property
    def mean_lengths(self) -> tuple[float, float]:
        """Mean tokens of prompt and output of the requests that ended last; zeros before the first."""
        return (self._prompt_tokens, self._output_tokens) if self._weight else (0.0, 0.0)

    def note_arrived(self, prompt_count: int) -> None:
        """A request was accepted."""
        self.arrived_request_count += 1
        self.arrived_prompt_token_count += prompt_count

    def note_first_token(self, now: float, seconds: float) -> None:
        """A request has waited so long for its first token."""
        self.first_token.note(now, seconds)
        for watcher in self._watchers:
            watcher.first_token_within_count += seconds <= watcher.first_token_target_s

    def note_ended(
        self, now: float, prompt_count: int, output_count: int, reused_count: int, decoding_s: float
    ) -> None:
        """A request has ended, `decoding_s` after its first token."""
        self.ended_request_count += 1
        self.reused_token_count += reused_count
        if not output_count:
            return  # it says nothing of what others will come to
        self._weight = self._weight * _MEMORY + 1.0
        self._prompt_tokens += (prompt_count - self._prompt_tokens) / self._weight
        self._output_tokens += (output_count - self._output_tokens) / self._weight
        if output_count > 1:
            seconds = decoding_s / (output_count - 1)
            self.per_token.note(now, seconds)
            for watcher in self._watchers:
                watcher.per_token_within_count += seconds <= watcher.per_token_target_s

    @contextmanager
    def watching(self, watcher: LoadWatcher) -> Iterator[None]:
        """Count for a watcher too, and wake it when something cannot wait."""
        self._watchers.add(watcher)
        try:
            yield
        finally:
            self._watchers.discard(watcher)

    def tell_at_once(self) -> None:
        """Somebody has come whom no executor is there for."""
        for watcher in self._watchers:
            watcher.is_urgent.set()

    @contextmanager
    def at_door(self, now: float) -> Iterator[None]:
        """A request waits for the first executor."""
        somebody = object()
        self._at_door[somebody] = now
        self.tell_at_once()
        try:
            yield
        finally:
            del self._at_door[somebody]

    @property
    def at_door_count(self) -> int:
        """How many wait there."""
        return len(self._at_door)

    @property
    def oldest_at_door(self) -> float | None:
        """Since when the first of them does."""
        return next(iter(list(self._at_door.values())), None)
