"""The SDK in a program that uses OpenTelemetry: its span is the parent of everything."""

import asyncio
import subprocess
import sys
import types

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from paceline import Client, Overloaded
from paceline.aio import AsyncClient
from tests.observability.otlp_receiver import OtlpReceiver
from tests.system import started


@pytest.fixture
def exporter(monkeypatch):
    """What the program records, as its own exporter gets it."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


@pytest.fixture
def receiver():
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


def spans_by_name(exporter):
    return {span.name: span for span in exporter.get_finished_spans()}


async def test_the_server_goes_on_with_the_trace_of_the_program(exporter, receiver):
    """One trace from the user's code to the executor, whatever the server would have recorded by itself."""
    tracer = trace.get_tracer("program")
    async with started(otlp_endpoint=receiver.endpoint, trace_requests=0.0) as system:
        with tracer.start_as_current_span("question") as question:
            async with AsyncClient(system.address) as client:
                await client.generate("hello", max_output_tokens=4, request_id="r", stream=False)
        await asyncio.to_thread(system.app.sink.flush, 5)
        root = receiver.requests()["r"]

    (client_span,) = [span for span in exporter.get_finished_spans() if span.kind is trace.SpanKind.CLIENT]
    assert client_span.parent.span_id == question.get_span_context().span_id
    assert client_span.name == "text_completion"
    assert client_span.attributes["gen_ai.usage.output_tokens"] == 4
    assert client_span.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert client_span.attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert int(root.span.trace_id.hex(), 16) == client_span.context.trace_id
    assert int(root.span.parent_span_id.hex(), 16) == client_span.context.span_id


async def test_an_error_is_the_status_of_the_span_and_leaving_early_is_none(exporter):
    """What the user saw is what the trace says."""
    async with started(max_waiting_requests=0) as system, AsyncClient(system.address, max_retries=0) as client:
        with pytest.raises(Overloaded):
            await client.generate("hello", max_output_tokens=4, stream=False)
    failed = spans_by_name(exporter)["text_completion"]
    exporter.clear()
    async with started() as system, AsyncClient(system.address) as client:
        async with client.chat("hello", max_output_tokens=40) as stream:
            await anext(stream)
    left = spans_by_name(exporter)["chat"]

    assert failed.status.status_code is trace.StatusCode.ERROR
    assert failed.attributes["error.type"] == "RESOURCE_EXHAUSTED"
    assert left.status.status_code is trace.StatusCode.UNSET
    assert "gen_ai.usage.output_tokens" not in left.attributes


async def generate_with_asyncio(address, **parameters):
    """By the client for asyncio, in one piece."""
    async with AsyncClient(address) as client:
        return await client.generate("hello", stream=False, **parameters)


async def generate_on_a_thread(address, **parameters):
    """The same, by the client for threads."""

    def generate():
        with Client(address) as client:
            return client.generate("hello", stream=False, **parameters)

    return await asyncio.to_thread(generate)


both_clients = pytest.mark.parametrize("generate", [generate_with_asyncio, generate_on_a_thread])


@both_clients
async def test_an_answer_of_one_chunk_has_a_time_to_its_first_chunk(exporter, generate):
    """Classifiers ask for one token: they are what the figure matters most to."""
    async with started() as system:
        await generate(system.address, max_output_tokens=1)

    assert spans_by_name(exporter)["text_completion"].attributes["gen_ai.response.time_to_first_chunk"] > 0


class Breaking(SpanProcessor):
    """The program's own, with a mistake in one of its methods."""

    def __init__(self, method):
        setattr(self, method, self.break_down)

    def break_down(self, *_, **__):
        raise ZeroDivisionError("a mistake in the program's tracing")


@both_clients
@pytest.mark.parametrize("method", ["on_start", "on_end"])
async def test_a_mistake_in_the_tracing_of_the_program_costs_no_answer(monkeypatch, caplog, generate, method):
    """The answer was there; whoever lost it to a picture of it would switch tracing off for ever."""
    provider = TracerProvider()
    provider.add_span_processor(Breaking(method))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    async with started() as system:
        output = await generate(system.address, max_output_tokens=3)

    assert len(output.token_ids) == 3
    assert "OpenTelemetry failed in this program" in caplog.text
    assert "a mistake in the program's tracing" in caplog.text


async def test_an_error_of_a_call_is_told_also_where_the_tracing_of_the_program_fails(monkeypatch):
    """What the user has to know is what the server said."""
    provider = TracerProvider()
    provider.add_span_processor(Breaking("on_end"))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    async with started(max_waiting_requests=0) as system, AsyncClient(system.address, max_retries=0) as client:
        with pytest.raises(Overloaded):
            await client.generate("hello", max_output_tokens=4, stream=False)


@both_clients
async def test_calls_do_not_wait_for_opentelemetry_to_be_imported(monkeypatch, caplog, generate):
    """Programs import it on one thread while another one asks already: half of the module is there then."""
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", types.ModuleType("opentelemetry.trace"))
    async with started() as system:
        output = await generate(system.address, max_output_tokens=2)

    assert len(output.token_ids) == 2
    assert "OpenTelemetry failed" not in caplog.text


async def test_a_batch_is_one_span(exporter):
    """Thousands of prompts are one call of the program's."""
    async with started() as system, AsyncClient(system.address) as client:
        await client.generate_batch(["a", "b"], max_output_tokens=2)

    assert [span.name for span in exporter.get_finished_spans()] == ["generate_batch"]


def break_down(_done, _all):
    """An `on_progress` with a mistake."""
    raise ZeroDivisionError("a mistake in the picture of the progress")


def ask(address):
    """A batch by the client for threads."""
    with Client(address) as client:
        client.generate_batch(["a", "b"], max_output_tokens=2, on_progress=break_down)


async def ask_on_a_thread(address):
    """The same, for an event loop."""
    await asyncio.to_thread(ask, address)


async def ask_with_asyncio(address):
    """A batch by the client for asyncio."""
    async with AsyncClient(address) as client:
        await client.generate_batch(["a", "b"], max_output_tokens=2, on_progress=break_down)


@pytest.mark.parametrize("ask", [ask_on_a_thread, ask_with_asyncio])
async def test_an_error_of_the_programs_own_is_the_status_of_the_span(exporter, ask):
    """The batch ended in the middle because `on_progress` raised: its span must not look like one that went well."""
    async with started() as system:
        with pytest.raises(ZeroDivisionError):
            await ask(system.address)

    span = spans_by_name(exporter)["generate_batch"]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == "a mistake in the picture of the progress"
    assert span.attributes["error.type"] == "ZeroDivisionError"
    assert "rpc.response.status_code" not in span.attributes


async def test_a_reader_that_is_cancelled_has_no_error(exporter):
    """The program wanted nothing more: an alert on errors must not count that."""
    reading = asyncio.Event()
    async with started() as system, AsyncClient(system.address) as client:

        async def read():
            async for _ in client.generate("hello", max_output_tokens=200):
                reading.set()

        task = asyncio.create_task(read())
        await reading.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert spans_by_name(exporter)["text_completion"].status.status_code is trace.StatusCode.UNSET


async def test_threads_have_the_same_spans(exporter):
    """The client for programs without asyncio does the same."""

    def ask(address):
        with Client(address) as client:
            return client.generate("hello", max_output_tokens=3, stream=False)

    async with started() as system:
        output = await asyncio.to_thread(ask, system.address)

    span = spans_by_name(exporter)["text_completion"]
    assert len(output.token_ids) == span.attributes["gen_ai.usage.output_tokens"] == 3


async def test_what_the_program_does_not_record_is_left_to_the_server(monkeypatch, receiver):
    """A program whose sampler said no gets no span of the SDK's; the server may still record by its own measure."""
    monkeypatch.setattr(trace, "get_tracer", TracerProvider(sampler=ALWAYS_OFF).get_tracer)
    async with started(otlp_endpoint=receiver.endpoint) as system, AsyncClient(system.address) as client:
        await client.generate("hello", max_output_tokens=2, request_id="r", stream=False)
        await asyncio.to_thread(system.app.sink.flush, 5)

    assert not receiver.requests()["r"].span.parent_span_id


def test_the_sdk_imports_no_opentelemetry():
    """The SDK depends on grpcio and protobuf; nobody pays for what they do not use."""
    code = "import sys, paceline, paceline.aio; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
