"""Spans as plain values: made after the fact from times that were noted, then exported or shown.

The names of attributes are those of OpenTelemetry's conventions for generative AI and for RPC where these have one
(https://github.com/open-telemetry/semantic-conventions-genai, https://opentelemetry.io/docs/specs/semconv/rpc/).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

import structlog

log = structlog.get_logger()

Value = str | bool | int | float | tuple[str, ...] | tuple[int, ...]
Attributes = Mapping[str, Value]

CUT = "… [cut]"
"""How a text ends that was too long for a span."""

_TEXT_LIMIT = 32 * 1024
_LIMIT_NAMES = ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT")
_LEAST_LIMIT = 128


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


@cache
def text_limit() -> int:
    """Characters of a text in a span. The variables are those that OpenTelemetry has for it."""
    for name in _LIMIT_NAMES:
        if said := os.environ.get(name, ""):
            if said.isdecimal() and int(said) >= _LEAST_LIMIT:
                return int(said)
            log.warning(
                "not a limit for texts in traces; the default holds",
                variable=name,
                value=said,
                least=_LEAST_LIMIT,
                default=_TEXT_LIMIT,
            )
    return _TEXT_LIMIT


def cut(text: str) -> str:
    """The text, or as much of it as a span takes."""
    limit = text_limit()
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


def messages_json(said: Iterable[tuple[str, str]]) -> str:
    """What was said, by (role, text), as the JSON of a GenAI span. Where that is too long, the text in which it becomes
    so is cut and those after it are left out: what is there is still JSON.
    """
    entries: list[str] = []
    left = text_limit() - len("[]")
    for role, text in said:
        entry = _message_json(role, text[:left])
        if len(text) <= left and len(entry) <= left:
            entries.append(entry)
            left -= len(entry) + len(", ")
            continue
        kept = text[:left]
        while len(entry := _message_json(role, kept + CUT)) > left and kept:
            kept = kept[: len(kept) * left // len(entry)]
        if len(entry) <= left:
            entries.append(entry)
        break
    return f"[{', '.join(entries)}]"


def _message_json(role: str, text: str) -> str:
    return json.dumps({"role": role, "parts": [{"type": "text", "content": text}]})
