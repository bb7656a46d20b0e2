"""Sends spans to an OTLP receiver, Jaeger say, with OpenTelemetry's SDK. Imported only where traces are wanted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache

import structlog
from opentelemetry.exporter.otlp.proto.grpc import exporter
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
_MOST_PENDING_BYTES = 32 * 1024 * 1024
"""Spans that wait to be sent; more of them are dropped, and counted: a receiver that is away costs memory to nobody."""

_MOST_MESSAGE_BYTES = 2 * 1024 * 1024
"""Of the spans that are sent together. Receivers refuse a message of more than 4 MiB, with all that is in it."""

_SPAN_BYTES, _PART_BYTES = 256, 64
"""Of a span without what it says, and of an attribute, an event or a link without its texts: more than they have."""

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
        self._sent_count = self._sent_bytes = 0
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
        readable = [_readable(span) for span in some]
        size = sum(map(_size, readable))
        pending_count = self._sent_count - self._counting.done_count
        pending_bytes = self._sent_bytes - self._counting.done_bytes
        if pending_count + len(some) > _MOST_PENDING or pending_bytes + size > _MOST_PENDING_BYTES:
            self._overflow_count += len(some)
            return
        self._sent_count += len(some)
        self._sent_bytes += size
        for span in readable:
            self._processor.on_end(span)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is sent; whether it was in time."""
        return self._processor.force_flush(round(timeout_s * 1000))

    def close(self) -> None:
        """Send what is left, as far as a receiver takes it at once: nobody waits for one that is away or slow."""
        closing = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(_EXPORT_TIMEOUT_S)


class _CountingExporter(SpanExporter):
    """Sends messages that receivers take, counts, and says when a receiver is away and when it is back."""

    def __init__(self, sender: SpanExporter, endpoint: str) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it says so for every batch, and not in our way
        self._failure = _last_failure()
        self._exporter = sender
        self._endpoint = endpoint
        self._is_away = False
        self.exported_count = self.failed_count = 0
        self.done_bytes = 0  # of both

    @property
    def done_count(self) -> int:
        """Spans that do not wait any more."""
        return self.exported_count + self.failed_count

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        results = [self._send(message) for message in _messages(spans)]
        is_whole = all(result is SpanExportResult.SUCCESS for result in results)
        return SpanExportResult.SUCCESS if is_whole else SpanExportResult.FAILURE

    def _send(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send one message."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001  counted like any other failure: nothing may wait for ever
            result, self._failure.reason = SpanExportResult.FAILURE, f"{type(error).__name__}: {error}"
        is_away = result is not SpanExportResult.SUCCESS
        if is_away:
            self.failed_count += len(spans)
        else:
            self.exported_count += len(spans)
        self.done_bytes += sum(map(_size, spans))
        if is_away and not self._is_away:
            log.warning(
                "traces cannot be sent; serving goes on without them",
                endpoint=self._endpoint,
                reason=self._failure.reason,
                what_to_do="is a receiver there, and does it take OTLP over gRPC? Port 4318 is usually OTLP over HTTP",
            )
        elif self._is_away and not is_away:
            log.info("traces are sent again", endpoint=self._endpoint)
        self._is_away = is_away
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastFailure(logging.Handler):
    """Why the exporter could not send: it tells nobody but its log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.reason = record.getMessage().rpartition("error code: ")[2]


@lru_cache(maxsize=1)
def _last_failure() -> _LastFailure:
    """Listens to the exporter's log instead of everybody else."""
    failure, exporter_log = _LastFailure(), logging.getLogger(exporter.__name__)
    exporter_log.setLevel(logging.ERROR)
    exporter_log.propagate = False
    exporter_log.filters.clear()  # one of them drops what is said again soon: the reason may be another by then
    exporter_log.addHandler(failure)
    return failure


def _messages(some: Sequence[ReadableSpan]) -> Iterator[list[ReadableSpan]]:
    """The spans in runs that are small enough to be sent together."""
    message: list[ReadableSpan] = []
    size = 0
    for span in some:
        span_size = _size(span)
        if message and size + span_size > _MOST_MESSAGE_BYTES:
            yield message
            message, size = [], 0
        message.append(span)
        size += span_size
    if message:
        yield message


def _size(span: ReadableSpan) -> int:
    """Bytes of a span in a message, or somewhat more."""
    size = _SPAN_BYTES + _PART_BYTES * len(span.links) + _size_of_text(span.status.description or "")
    for attributes in (span.attributes, *(event.attributes for event in span.events)):
        size += _PART_BYTES
        for value in (attributes or {}).values():
            texts = [value] if isinstance(value, str) else value if isinstance(value, tuple) else ()
            size += _PART_BYTES + sum(_size_of_text(str(text)) for text in texts)
    return size


def _size_of_text(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


@lru_cache(maxsize=1024)
def _resource(origin: spans.Origin) -> Resource:
    """What OTEL_RESOURCE_ATTRIBUTES say comes with it."""
    return Resource.create(
        {"service.name": origin.service, "service.instance.id": origin.instance_id, "service.version": RELEASE}
    )


def _context(trace_id: bytes, span_id: bytes) -> SpanContext:
    return SpanContext(int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big"), False, _SAMPLED)


def _cut(attributes: spans.Attributes) -> spans.Attributes:
    """With texts that are not too long: OpenTelemetry's own spans would see to that, these are made without them."""
    return {name: spans.cut(value) if isinstance(value, str) else value for name, value in attributes.items()}


def _readable(span: spans.Span) -> ReadableSpan:
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id),
        parent=_context(span.trace_id, span.parent_id) if span.parent_id else None,
        resource=_resource(span.origin),
        attributes=_cut(span.attributes),
        events=[Event(event.name, _cut(event.attributes), event.at_ns) for event in span.events],
        links=[Link(_context(link.trace_id, link.span_id)) for link in span.links],
        kind=_KINDS[span.kind],
        status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, spans.cut(span.error)),
        start_time=span.begin_ns,
        end_time=span.end_ns,
        instrumentation_scope=_SCOPE,
    )
