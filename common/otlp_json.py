"""Spans as OTLP/JSON (https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding): Jaeger's page opens it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from common.spans import Attributes, Origin, Span, Value

_ERROR = 2  # opentelemetry.proto.trace.v1.Status.StatusCode


def to_otlp_json(spans: Iterable[Span]) -> str:
    """`opentelemetry.proto.trace.v1.TracesData` with these spans, by the processes that they tell of."""
    by_origin: dict[Origin, list[Span]] = {}
    for span in spans:
        by_origin.setdefault(span.origin, []).append(span)
    return json.dumps({"resourceSpans": [_of_origin(origin, some) for origin, some in by_origin.items()]}, indent=1)


def _of_origin(origin: Origin, spans: Iterable[Span]) -> dict[str, Any]:
    resource = {"service.name": origin.service, "service.instance.id": origin.instance_id}
    scope = {"name": "paceline"}
    return {
        "resource": {"attributes": _attributes(resource)},
        "scopeSpans": [{"scope": scope, "spans": [_span(span) for span in spans]}],
    }


def _span(span: Span) -> dict[str, Any]:
    return {
        "traceId": span.trace_id.hex(),
        "spanId": span.span_id.hex(),
        **({"parentSpanId": span.parent_id.hex()} if span.parent_id else {}),
        "name": span.name,
        "kind": int(span.kind),
        "startTimeUnixNano": str(span.begin_ns),  # 64-bit integers are texts in the JSON of protobuf
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
        "events": [
            {"timeUnixNano": str(event.at_ns), "name": event.name, "attributes": _attributes(event.attributes)}
            for event in span.events
        ],
        "links": [{"traceId": link.trace_id.hex(), "spanId": link.span_id.hex()} for link in span.links],
        "status": {} if span.error is None else {"code": _ERROR, "message": span.error},
    }


def _attributes(attributes: Attributes) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, tuple):
        return {"arrayValue": {"values": [_value(one) for one in value]}}
    return {"stringValue": value}
