"""What is sent to a receiver of traces: however much is said, it takes it, and it costs a bounded memory."""

import json
import threading

import pytest
from structlog.testing import capture_logs

from common import span_exporter, spans
from common.http_pages import HttpPages
from common.processes import ANY_PORT
from common.span_exporter import OtlpSink
from common.spans import CUT, Origin, Span, SpanEvent, messages_json
from tests.observability.otlp_receiver import OtlpReceiver

TEXT = "gen_ai.input.messages"


@pytest.fixture
def receiver():
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


@pytest.fixture
def sink(receiver):
    sink = OtlpSink(receiver.endpoint)
    yield sink
    sink.close()


@pytest.fixture
def limit(monkeypatch):
    """Sets OpenTelemetry's limit for texts."""

    def set_limit(value):
        monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", str(value))
        spans.text_limit.cache_clear()

    yield set_limit
    monkeypatch.undo()
    spans.text_limit.cache_clear()


def span(number, text="", **fields):
    """A span that says something."""
    span_id = number.to_bytes(8, "big")
    return Span("x", b"a" * 16, span_id, b"", Origin("s", "i"), 1, 2, attributes={TEXT: text}, **fields)


def test_a_large_prompt_costs_nobody_a_span(receiver, sink):
    """Receivers refuse a message of more than 4 MiB: one user's text would take everybody else's spans with it."""
    large = [span(number, "x" * 500_000) for number in range(1, 11)]
    sink.send([*large, *(span(number, "small") for number in range(100, 120))])
    assert sink.flush(5)

    assert (sink.exported_count, sink.dropped_count) == (30, 0)
    texts = [one.attributes[TEXT] for one in receiver.spans]
    assert {len(text) for text in texts if text != "small"} == {32 * 1024}
    assert sum(text.endswith(CUT) for text in texts) == 10


def test_texts_are_as_long_as_opentelemetrys_own_limit_says(receiver, sink, limit):
    """Who sets it for all programs of theirs sets it for this one, wherever the text stands."""
    limit(200)
    event = SpanEvent(1, "e", {"said": "y" * 300})
    sink.send([span(1, "x" * 200), span(2, "x" * 201, events=(event,), error="z" * 300)])
    sink.flush(5)

    whole, cut = sorted(receiver.spans, key=lambda one: one.span.span_id)
    assert whole.attributes[TEXT] == "x" * 200
    assert cut.attributes[TEXT] == "x" * (200 - len(CUT)) + CUT
    assert cut.span.events[0].attributes[0].value.string_value == "y" * (200 - len(CUT)) + CUT
    assert cut.span.status.message == "z" * (200 - len(CUT)) + CUT


@pytest.mark.parametrize("said", ["", "many", "-1", "5"])
def test_a_limit_that_is_none_is_not_followed(said, limit):
    """A mistake in the environment must not empty all traces, nor keep the scheduler from its work."""
    limit(said)

    assert spans.text_limit() == 32 * 1024


def test_more_than_a_message_takes_is_sent_in_several(receiver, sink, limit):
    """Many spans of a middle size are too much together as well."""
    limit(10_000_000)
    sink.send([span(number, "é" * 400_000) for number in range(1, 13)])
    sink.flush(5)

    assert (sink.exported_count, sink.dropped_count) == (12, 0)
    assert len(receiver.spans) == 12


def test_what_waits_for_a_receiver_is_bounded_in_bytes(receiver, sink, monkeypatch):
    """One that is away for an hour must not cost the scheduler its memory, whatever users say meanwhile."""
    monkeypatch.setattr(span_exporter, "_MOST_PENDING_BYTES", 1_000_000)
    is_back = threading.Event()
    export = span_exporter.OTLPSpanExporter.export
    monkeypatch.setattr(
        span_exporter.OTLPSpanExporter, "export", lambda *arguments: is_back.wait(60) and export(*arguments)
    )
    for number in range(1, 101):
        sink.send([span(number, "x" * 30_000)])
    waiting_count = 100 - sink.dropped_count
    is_back.set()
    sink.flush(5)
    sink.send([span(200, "x" * 30_000)])
    sink.flush(5)

    assert waiting_count == 32
    assert len(receiver.spans) == sink.exported_count == 33


@pytest.mark.parametrize("text", ["plain ", 'quoted "\\\n', "日本語 ", "🙂"])
def test_messages_that_were_cut_are_still_json(text, limit):
    """Whoever shows a conversation reads it as JSON, and a half of that is nothing."""
    limit(1000)
    said = [("system", "be brief"), ("user", text * 1000), ("user", "and this?")]
    written = messages_json(said)

    assert len(written) <= 1000
    first, second = json.loads(written)
    assert first == {"role": "system", "parts": [{"type": "text", "content": "be brief"}]}
    assert second["role"] == "user"
    kept = second["parts"][0]["content"].removesuffix(CUT)
    assert len(kept) > 50
    assert (text * 1000).startswith(kept)


def test_messages_that_fit_are_whole(limit):
    """The limit is of what is written, brackets and all."""
    said = [("user", "hello"), ("assistant", "yes?")]
    whole = messages_json(said)
    limit(max(128, len(whole)))

    assert [one["parts"][0]["content"] for one in json.loads(whole)] == ["hello", "yes?"]
    assert messages_json(said) == whole


def test_a_conversation_of_very_many_messages_is_cut_too(limit):
    """What stands around each text counts as well."""
    limit(1000)
    written = messages_json(("user", "") for _ in range(10_000))

    assert len(written) <= 1000
    assert len(json.loads(written)) > 10


def test_the_log_says_why_traces_cannot_be_sent_and_what_a_receiver_must_speak(receiver, sink):
    """The mistake that is made most is a receiver's port for HTTP: without a reason it looks like a broken network."""
    pages = HttpPages([])
    over_http = OtlpSink(f"http://127.0.0.1:{pages.start(ANY_PORT, '127.0.0.1')}")
    receiver.fails = True
    with capture_logs() as lines:
        for one in (sink, over_http):
            one.send([span(1)])
            one.flush(20)
    over_http.close()
    pages.stop()

    refused, not_grpc = (line for line in lines if line["event"].startswith("traces cannot be sent"))
    assert refused["reason"] == "StatusCode.INVALID_ARGUMENT, error details: not today"
    assert "UNAVAILABLE" in not_grpc["reason"]
    assert "OTLP over gRPC? Port 4318" in not_grpc["what_to_do"]
