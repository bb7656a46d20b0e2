"""Spans of a trace, read from OTLP/JSON and put into a tree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_ERROR = 2  # opentelemetry.proto.trace.v1.Status.StatusCode
_FEW = 4  # spans of one name, one after the other, that are still shown one by one


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""

    at_ns: int
    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Span:
    """A part of what was done; several alike where `count` is more than 1."""

    name: str
    service: str
    instance: str
    begin_ns: int
    end_ns: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    error: str | None = None
    children: list[Span] = field(default_factory=list)
    count: int = 1
    busy_ns: int = 0  # the time in it; of several less than from its begin to its end

    @property
    def executor_id(self) -> str:
        """Where it was computed; "" for what the scheduler did."""
        here = self.facts.get("paceline.executor.id", "")
        return str(here or (self.instance if self.service.endswith("executor") else ""))

    @property
    def choice(self) -> int:
        """Which of several continuations it was for."""
        return int(self.facts.get("paceline.choice", 0))

    @property
    def attempt(self) -> int:
        """The number of the placement on an executor that it is part of."""
        return int(self.facts.get("paceline.attempt", 0))

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Span]]:
        """Itself and all beneath it, each with its depth, in the order of a tree."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


def tree_of(otlp_json: str) -> list[Span]:
    """The spans that have no parent among the others, the earliest first; each with its children, likewise."""
    spans: dict[str, Span] = {}
    parents: dict[str, str] = {}
    for resource in json.loads(otlp_json).get("resourceSpans", []):
        process = _facts(resource.get("resource", {}).get("attributes", []))
        for scope in resource.get("scopeSpans", []):
            for raw in scope.get("spans", []):
                spans[raw["spanId"]] = _span(raw, process)
                parents[raw["spanId"]] = raw.get("parentSpanId", "")
    roots: list[Span] = []
    for span_id, span in sorted(spans.items(), key=lambda item: (item[1].begin_ns, -item[1].end_ns)):
        parent = spans.get(parents[span_id])
        (roots if parent is None or parent is span else parent.children).append(span)
    return roots


def folded(span: Span) -> Span:
    """The same with long rows of like children as one each: `prefill` 30 times, and what these had beneath them."""
    children: list[Span] = []
    row: list[Span] = []
    for child in [*span.children, None]:
        if row and (child is None or _kind(child) != _kind(row[0])):
            children += [_one_of(row)] if len(row) > _FEW else [folded(one) for one in row]
            row = []
        if child is not None:
            row.append(child)
    return Span(
        span.name, span.service, span.instance, span.begin_ns, span.end_ns, span.facts, span.events, span.error,
        children, span.count, span.busy_ns,
    )  # fmt: skip


def _kind(span: Span) -> tuple[str, str, int, int, bool]:
    return span.name, span.executor_id, span.choice, span.attempt, span.error is None


def _one_of(row: list[Span]) -> Span:
    """Spans alike as one: from the first to the last, with the time in them."""
    by_name: dict[str, list[Span]] = {}
    for span in row:
        for child in span.children:
            by_name.setdefault(child.name, []).append(child)
    first = row[0]
    tokens = sum(int(span.facts.get("paceline.tokens", 0)) for span in row)
    chunks = sum(int(span.facts.get("paceline.chunks", 1)) for span in row)
    return Span(
        first.name, first.service, first.instance, first.begin_ns, max(span.end_ns for span in row),
        {**first.facts, **({"paceline.tokens": tokens} if tokens else {}), "paceline.chunks": chunks},
        tuple(event for span in row for event in span.events), first.error,
        [_one_of(some) for some in by_name.values()], sum(span.count for span in row),
        sum(span.busy_ns for span in row),
    )  # fmt: skip


def _span(raw: Mapping[str, Any], process: Mapping[str, Any]) -> Span:
    begin_ns, end_ns = int(raw["startTimeUnixNano"]), int(raw["endTimeUnixNano"])
    status = raw.get("status", {})
    return Span(
        name=raw.get("name", ""),
        service=str(process.get("service.name", "")),
        instance=str(process.get("service.instance.id", "")),
        begin_ns=begin_ns,
        end_ns=end_ns,
        facts=_facts(raw.get("attributes", [])),
        events=tuple(
            Event(int(event["timeUnixNano"]), event.get("name", ""), _facts(event.get("attributes", [])))
            for event in raw.get("events", [])
        ),
        error=status.get("message", "error") if status.get("code") == _ERROR else None,
        busy_ns=end_ns - begin_ns,
    )


def _facts(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    return {attribute["key"]: _value(attribute.get("value", {})) for attribute in attributes}


def _value(value: Mapping[str, Any]) -> Any:
    """A value of OTLP: 64-bit integers are texts in the JSON of protobuf."""
    if "intValue" in value:
        return int(value["intValue"])
    if "arrayValue" in value:
        return tuple(_value(one) for one in value["arrayValue"].get("values", []))
    return next(iter(value.values()), "")
