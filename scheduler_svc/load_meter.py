"""Counts what comes, what goes and how long it took: the counters of an autoscaler and of Prometheus."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Limits between which times are counted: from a fast step to a queue that nobody waits out."""

BUCKETS_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
"""Limits between which counts of tokens are counted."""

_WINDOW_S = 60.0
_KEPT = 4096
_MEMORY = 0.98
"""Weight that an ended request keeps with each later one in mean lengths: about the last fifty count."""


class Exemplar(NamedTuple):
    """A measured time that stands for its bucket, and where to read how it came about."""

    trace_id: str
    seconds: float
    at_s: float  # since 1970


@dataclass(slots=True)
class WorkMeter:
    """Time that the scheduler itself takes for something, in seconds."""

    count: int = 0
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        """It has been done once more."""
        self.count += 1
        self.total_s += seconds


@dataclass(slots=True)
class SizeMeter:
    """Counts of tokens."""

    count: int = 0
    total: int = 0
    _bucket_counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_TOKENS) + 1))

    def note(self, size: int) -> None:
        """Somebody had so many."""
        self.count += 1
        self.total += size
        self._bucket_counts[bisect.bisect_left(BUCKETS_TOKENS, size)] += 1

    def cumulative(self) -> list[tuple[int, int]]:
        """For each limit, how many had no more, since the beginning."""
        return list(zip(BUCKETS_TOKENS, itertools.accumulate(self._bucket_counts), strict=False))


@dataclass(slots=True)
class LatencyMeter:
    """Times of one kind, in seconds."""

    count: int = 0
    sum_s: float = 0.0
    exemplars: dict[int, Exemplar] = field(default_factory=dict)  # by bucket
    _recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))  # (when, how long)
    _bucket_counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))

    def note(self, now: float, seconds: float, trace_id: str = "", *, count: int = 1) -> None:
        """It took somebody so long, or several; `trace_id` is where that is recorded, "" nowhere."""
        self.count += count
        self.sum_s += count * seconds
        self._recent.append((now, seconds))
        bucket = bisect.bisect_left(BUCKETS_S, seconds)
        self._bucket_counts[bucket] += count
        if trace_id:
            self.exemplars[bucket] = Exemplar(trace_id, seconds, time.time())

    def cumulative(self) -> list[tuple[float, int]]:
        """For each limit in seconds, how many took no longer, since the beginning."""
        return list(zip(BUCKETS_S, itertools.accumulate(self._bucket_counts), strict=False))

    def quantiles(self, now: float, *shares: float) -> list[float]:
        """The quantiles of the last minute; zeros where there was nobody.

        Example: of the times 1, 2, 3 and 4 the half is 3: the least that more than half of them are below or at.
        """
        times = sorted(seconds for at, seconds in list(self._recent) if at >= now - _WINDOW_S)
        return [times[min(len(times) - 1, int(share * len(times)))] if times else 0.0 for share in shares]


@dataclass(slots=True)
class RecentCount:
    """How often something happened in the last minute, to the second."""

    _by_second: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=round(_WINDOW_S)))

    def note(self, now: float) -> None:
        """It has happened."""
        second, before = int(now), 0
        if self._by_second and self._by_second[-1][0] == second:
            _, before = self._by_second.pop()
        self._by_second.append((second, before + 1))

    def count(self, now: float) -> int:
        """In the minute before now."""
        return sum(count for second, count in self._by_second if second > now - _WINDOW_S)


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
        self.ended_request_count = 0
        self.generated_token_count = 0
        self.computed_token_count = 0
        self.reused_token_count = 0
        self.placed_prompt_token_count = 0  # of requests that have ended: what may have been reused
        self.recomputed_token_count = 0
        self.preemption_count = 0
        self.door = LatencyMeter()  # held there before it was accepted, or given up; who was not held is not in it
        self.first_token = LatencyMeter()  # from the receipt, like everything that users wait for
        self.per_token = LatencyMeter()
        self.queue = LatencyMeter()  # from acceptance to the first placement
        self.prefill = LatencyMeter()  # from the first placement to the first token
        self.decode = LatencyMeter()  # from the first token to the end
        self.inference = LatencyMeter()  # from the first placement to the end
        self.between_tokens = LatencyMeter()  # from one token of a request to its next
        self.whole = LatencyMeter()  # from the receipt to the end
        self.plan = WorkMeter()  # plans made
        self.apply = WorkMeter()  # results taken in
        self.prompt_sizes = SizeMeter()
        self.output_sizes = SizeMeter()
        self.longest_sizes = SizeMeter()  # of the longest choice of a request
        self.refused_counts: Counter[str] = Counter()  # by one of `refusals.REASONS`
        self.refused_lately = RecentCount()  # because the queue was full
        self.outcome_counts: Counter[str] = Counter()  # why requests ended
        self.move_counts: Counter[str] = Counter()  # placements that had to end before their requests, by cause
        self.recovery_counts: Counter[str] = Counter()  # executors that went, by what became of those who were there
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

    @property
    def refused_request_count(self) -> int:
        """Requests that found the queue full."""
        return self.refused_counts["queue_full"]

    def note_refused(self, reason: str) -> None:
        """A request was not let in."""
        self.refused_counts[reason] += 1
        if reason == "queue_full":
            self.refused_lately.note(time.monotonic())

    def note_first_token(self, now: float, seconds: float, trace_id: str = "") -> None:
        """A request has waited so long for its first token."""
        self.first_token.note(now, seconds, trace_id)
        for watcher in self._watchers:
            watcher.first_token_within_count += seconds <= watcher.first_token_target_s

    def note_outcome(self, outcome: str) -> None:
        """A request has ended, whatever for."""
        self.ended_request_count += 1
        self.outcome_counts[outcome] += 1

    def note_ended(
        self,
        now: float,
        *,
        prompt_count: int,
        output_counts: Sequence[int],
        reused_count: int,
        was_placed: bool,
        decoding_s: float,
        total_s: float,
        outcome: str,
        trace_id: str = "",
    ) -> None:
        """A request has ended, `decoding_s` after its first token; `output_counts` are those of its choices. One that
        was not placed has had nothing looked up in a cache.
        """
        self.note_outcome(outcome)
        self.reused_token_count += reused_count
        self.placed_prompt_token_count += prompt_count if was_placed else 0
        self.whole.note(now, total_s, trace_id)
        self.prompt_sizes.note(prompt_count)
        for size in output_counts:
            self.output_sizes.note(size)
        longest = max(output_counts)  # choices decode beside each other
        self.longest_sizes.note(longest)
        output_count = sum(output_counts) // len(output_counts)
        if not output_count:
            return  # it says nothing of what others will come to
        self._weight = self._weight * _MEMORY + 1.0
        self._prompt_tokens += (prompt_count - self._prompt_tokens) / self._weight
        self._output_tokens += (output_count - self._output_tokens) / self._weight
        self.decode.note(now, decoding_s)
        if longest > 1:
            seconds = decoding_s / (longest - 1)
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
