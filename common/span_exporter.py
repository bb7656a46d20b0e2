"""Sends spans to an OTLP receiver, Jaeger say, with OpenTelemetry's SDK. Imported only where traces are wanted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import lru_cache

import structlog
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from common import spans
from common.processes import RELEASE

log = structlog.get_logger()

_EXPORT_TIMEOUT_S = 3.0
_MOST_PENDING = 8192
"""Spans that wait to be sent; more of them are dropped, and counted: a receiver that is away costs memory to nobody."""

_KINDS = {
    spans.SpanKind.INTERNAL: SpanKind.INTERNAL,
    spans.SpanKind.SERVER: SpanKind.SERVER,
    spans.SpanKind.CLIENT: SpanKind.CLIENT,
}
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("paceline", RELEASE)


class OtlpSink:
    """Hands spans to a thread that sends them in batches."""

    def __init__(self, endpoint: str) -> None:
        """Send to `http://HOST:PORT`, or with TLS to `https://HOST:PORT`. Whether somebody listens shows later."""
        self._counting = _CountingExporter(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S), endpoint)
        self._processor = BatchSpanProcessor(
            self._counting, max_queue_size=_MOST_PENDING, schedule_delay_millis=1000, max_export_batch_size=512
        )
        self._sent_count = 0
        self._overflow_count = 0

    @property
    def dropped_count(self) -> int:
        """Spans that no receiver got."""
        return self._overflow_count + self._counting.failed_count

    @property
    def exported_count(self) -> int:
        """Spans that a receiver has taken."""
        return self._counting.exported_count

    def send(self, some: Sequence[spans.Span]) -> None:
        """Send these, some time soon."""
        pending_count = self._sent_count - self._counting.exported_count - self._counting.failed_count
        if pending_count + len(some) > _MOST_PENDING:
            self._overflow_count += len(some)
            return
        self._sent_count += len(some)
        for span in some:
            self._processor.on_end(_readable(span))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is sent; whether it was in time."""
        return self._processor.force_flush(round(timeout_s * 1000))

    def close(self) -> None:
        """Send what is left, as far as a receiver takes it at once: nobody waits for one that is away or slow."""
        closing = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(_EXPORT_TIMEOUT_S)


class _CountingExporter(SpanExporter):
    """Counts, and says when a receiver is away and when it is back."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it says so for every batch, and not in our way
        self._exporter = exporter
        self._endpoint = endpoint
        self._is_away = False
        self.exported_count = self.failed_count = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception:  # noqa: BLE001  counted like any other failure: nothing may wait for ever
            result = SpanExportResult.FAILURE
        is_away = result is not SpanExportResult.SUCCESS
        if is_away:
            self.failed_count += len(spans)
        else:
            self.exported_count += len(spans)
        if is_away and not self._is_away:
            log.warning("traces cannot be sent; serving goes on without them", endpoint=self._endpoint)
        elif self._is_away and not is_away:
            log.info("traces are sent again", endpoint=self._endpoint)
        self._is_away = is_away
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


@lru_cache(maxsize=1024)
def _resource(origin: spans.Origin) -> Resource:
    """What OTEL_RESOURCE_ATTRIBUTES say comes with it."""
    return Resource.create(
        {"service.name": origin.service, "service.instance.id": origin.instance_id, "service.version": RELEASE}
    )


def _context(trace_id: bytes, span_id: bytes) -> SpanContext:
    return SpanContext(int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big"), False, _SAMPLED)


def _readable(span: spans.Span) -> ReadableSpan:
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id),
        parent=_context(span.trace_id, span.parent_id) if span.parent_id else None,
        resource=_resource(span.origin),
        attributes=span.attributes,
        events=[Event(event.name, event.attributes, event.at_ns) for event in span.events],
        links=[Link(_context(link.trace_id, link.span_id)) for link in span.links],
        kind=_KINDS[span.kind],
        status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
        start_time=span.begin_ns,
        end_time=span.end_ns,
        instrumentation_scope=_SCOPE,
    )
