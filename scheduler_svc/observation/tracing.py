"""Which requests and steps are recorded for a tracing backend, and the way there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from common.spans import Span
from common.tracing import parse_traceparent
from scheduler_svc.core.request import TraceContext

SAMPLED = 1
"""The flag of a trace context whose trace is recorded."""


_FAILURES_PER_S = 10.0
_REFUSALS_PER_S = 10.0  # apart from failures: a full queue refuses more than anybody reads, and must not hide these


class SpanSink(Protocol):
    """Takes spans and sends them somewhere, some time soon."""

    def send(self, spans: Sequence[Span]) -> None:
        """Send these; never waits."""
        ...


class Budget:
    """At most so many a second, and as many at once."""

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        """Start full."""
        self._per_second = per_second
        self._most = max(1.0, per_second) if per_second else 0.0
        self._left = self._most
        self._clock = clock
        self._looked_at = clock()

    def take(self) -> bool:
        """Take one, if there is one left."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._looked_at) * self._per_second)
        self._looked_at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Tracing:
    """Decides what is recorded. A request whose caller records its trace always is; of the others a number a second, so
    that the cost is bounded whatever the load; and those that failed, which is known at their end.
    """

    def __init__(
        self,
        sink: SpanSink | None,
        requests_per_s: float = 10.0,
        step_interval: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Record to `sink`, None: nothing; `step_interval` is 0 for no steps, else every so-manieth is recorded."""
        self._sink = sink
        self._requests = Budget(requests_per_s, clock)
        self._failures = Budget(_FAILURES_PER_S, clock)
        self._refusals = Budget(_REFUSALS_PER_S, clock)
        self._slow_steps = Budget(1.0, clock)
        self._step_interval = step_interval
        self._step_count = 0

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded at all. Nothing else here need be asked where it is not."""
        return self._sink is not None

    def accept(self, traceparent: str | None) -> TraceContext:
        """The context of a request that arrives with this header: with a span id of its own, in the caller's trace.

        A caller that does not record its trace leaves it to us; our span then begins it, as nobody would find the
        caller's.
        """
        parsed = parse_traceparent(traceparent) if traceparent else None
        trace_id, parent_id, flags = parsed or (secrets.token_bytes(16), b"", 0)
        is_sampled = bool(flags & SAMPLED)
        return TraceContext(trace_id, secrets.token_bytes(8), flags, parent_id if is_sampled else b"")

    def is_chosen(self, trace: TraceContext) -> bool:
        """Whether a request that was let in is recorded; of those whose callers do not ask, so many a second are."""
        return self.is_on and (bool(trace.flags & SAMPLED) or self._requests.take())

    def is_recorded(self, trace: TraceContext, *, failed: bool) -> bool:
        """Whether a request that has ended is recorded."""
        return self.is_on and (bool(trace.flags & SAMPLED) or (failed and self._failures.take()))

    def is_refusal_recorded(self, trace: TraceContext) -> bool:
        """Whether a request that is refused at once is recorded: where its caller records, and so many a second."""
        return self.is_on and bool(trace.flags & SAMPLED) and self._refusals.take()

    def step(self) -> TraceContext | None:
        """Count a step; its context where it is one to be recorded."""
        self._step_count += 1
        if not self._step_interval or self._step_count % self._step_interval:
            return None
        return self.new_step()

    def new_step(self) -> TraceContext:
        """The context of a step that is recorded."""
        return TraceContext(secrets.token_bytes(16), secrets.token_bytes(8), SAMPLED)

    def slow_step(self) -> TraceContext | None:
        """The context of a step that took unusually long, unless there was one a moment ago."""
        return self.new_step() if self._step_interval and self._slow_steps.take() else None

    def send(self, spans: Sequence[Span]) -> None:
        """Record these."""
        if self._sink is not None:
            self._sink.send(spans)
