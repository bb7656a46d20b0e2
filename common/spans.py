"""Spans as plain values: made after the fact from times that were noted, then exported or shown.

The names of attributes are those of OpenTelemetry's conventions for generative AI and for RPC where these have one
(https://github.com/open-telemetry/semantic-conventions-genai, https://opentelemetry.io/docs/specs/semconv/rpc/).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

Value = str | bool | int | float | tuple[str, ...] | tuple[int, ...]
Attributes = Mapping[str, Value]


class SpanKind(IntEnum):
    """Numbers as in `opentelemetry.proto.trace.v1.Span.SpanKind`."""

    INTERNAL = 1
    SERVER = 2
    CLIENT = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """The process that a span tells of."""

    service: str  # `service.name`
    instance_id: str  # `service.instance.id`


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened in the time of a span."""

    at_ns: int  # since 1970
    name: str
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpanLink:
    """A span that this one has to do with, in another trace perhaps."""

    trace_id: bytes
    span_id: bytes


@dataclass(frozen=True, slots=True)
class Span:
    """A part of what was done, with its beginning and its end in nanoseconds since 1970."""

    name: str
    trace_id: bytes  # 16 bytes
    span_id: bytes  # 8 bytes
    parent_id: bytes  # 8 bytes; b"" for none
    origin: Origin
    begin_ns: int
    end_ns: int
    kind: SpanKind = SpanKind.INTERNAL
    attributes: Attributes = field(default_factory=dict)
    events: tuple[SpanEvent, ...] = ()
    links: tuple[SpanLink, ...] = ()
    error: str | None = None  # what went wrong; None: nothing did


def child_id(parent_id: bytes, *names: str | int) -> bytes:
    """The id of a child: the same each time when the same spans are made again, and no other's."""
    return hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8, key=parent_id).digest()
