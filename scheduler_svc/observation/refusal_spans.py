"""What the trace of a caller has of a request that was refused."""

from __future__ import annotations

import grpc

from common.errors import RefusedError
from common.spans import Origin, Span, SpanKind
from scheduler_svc.observation.timeline import Timeline


def refusal_span(timeline: Timeline, error: RefusedError, reason: str, origin: Origin) -> Span:
    """From the receipt of a request that was not let in to its refusal. Who has cancelled it finds no error there."""
    operation, model = timeline.facts["gen_ai.operation.name"], timeline.facts["gen_ai.request.model"]
    is_error = error.code is not grpc.StatusCode.CANCELLED
    return Span(
        name=f"{operation} {model}",
        trace_id=timeline.trace.trace_id,
        span_id=timeline.trace.span_id,
        parent_id=timeline.trace.parent_id,
        origin=origin,
        begin_ns=timeline.ns(timeline.received_at),
        end_ns=timeline.ns(timeline.accepted_at),
        kind=SpanKind.SERVER,
        attributes={
            **timeline.facts,
            "gen_ai.response.id": timeline.request_id,
            "rpc.response.status_code": error.code.name,
            "paceline.refused": reason,
            **({"error.type": error.code.name} if is_error else {}),
        },
        error=_told(error, reason) if is_error else None,
    )


def _told(error: RefusedError, reason: str) -> str:
    """What says why a message is wrong may quote it, which only its sender may see."""
    return "the message was not valid; its sender was told why" if reason == "invalid" else error.message
