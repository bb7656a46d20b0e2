"""A step on its way, and its span, which is a trace of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from common.spans import Origin, Span, SpanLink
from scheduler_svc.core.plan import Plan
from scheduler_svc.core.request import TraceContext
from scheduler_svc.observation.timeline import Attempt, Run, Timeline


class Part(NamedTuple):
    """What a step on its way does for one choice."""

    timeline: Timeline
    attempt: Attempt
    run: Run
    samples: bool  # it brings the next token


@dataclass(slots=True)
class Flight:
    """A step on its way that something is to be noted of."""

    plan: Plan
    began_at: float
    trace: TraceContext | None  # where it is to be recorded, whatever it brings
    parts: list[Part] = field(default_factory=list)


def step_span(
    executor_id: str,
    plan: Plan,
    trace: TraceContext,
    origin: Origin,
    times_ns: tuple[int, int],
    *,
    is_slow: bool,
    idle_s: float,
    links: tuple[SpanLink, ...],
) -> Span:
    """A step from its plan to its result, linked to the requests in it."""
    return Span(
        name="step",
        trace_id=trace.trace_id,
        span_id=trace.span_id,
        parent_id=b"",
        origin=origin,
        begin_ns=times_ns[0],
        end_ns=times_ns[1],
        attributes={
            "paceline.executor.id": executor_id,
            "paceline.step": plan.step,
            "paceline.step.requests": plan.request_count,
            "paceline.step.tokens": plan.token_count,
            "paceline.step.prefill_tokens": sum(chunk.count for chunk in plan.chunks),
            "paceline.step.is_slow": is_slow,
            "paceline.step.idle_s": idle_s,
        },
        links=links,
    )
