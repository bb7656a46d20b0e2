"""A line of the log about a request is found from its trace, and the other way round."""

import ast
import re

import grpc
import pytest
from structlog.testing import capture_logs

from paceline.v1 import inference_pb2
from tests.observability.prometheus import ROOT
from tests.observability.test_traces import CALLER, PoisonedRunner
from tests.system import FAST, request, started, until

SOURCES = sorted(path for folder in ("scheduler_svc", "executor_svc") for path in (ROOT / folder).rglob("*.py"))
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


def log_calls():
    """Every call of structlog in the services: where it stands, its event, and the names of what it says."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr=level), args=[ast.Constant(value=str(event)), *_]
                ) if level in LEVELS:
                    names = {keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords}
                    yield f"{path.name}:{node.lineno}", event, names


def test_every_line_about_one_request_has_its_ids():
    """Who was asked about a request searches for its id, and takes silence for an answer. A call may be a request."""
    about_one = [call for call in log_calls() if re.search(r"\b(request|call)\b", call[1])]
    without = [
        f"{where}: {event}"
        for where, event, names in about_one
        if not {"request_id", "trace_id"} <= names and not any(name.startswith("log_ids(") for name in names)
    ]

    assert len(about_one) >= 4  # it finds them
    assert not without


def test_every_line_about_several_requests_says_how_many():
    """Ids of a thousand are no line to read; their number says how much there is to look for."""
    about_several = [call for call in log_calls() if re.search(r"\brequests\b", call[1])]

    assert len(about_several) >= 3
    assert not [f"{where}: {event}" for where, event, names in about_several if "request_count" not in names]


async def ask_in_vain(system):
    """A request that breaks its step, by a caller who traces."""
    call = system.inference.Generate(request("a\x01", 5, request_id="bad"), metadata=[("traceparent", CALLER)])
    async for _ in call:
        pass


async def test_scheduler_and_executor_name_a_request_that_fails_alike():
    """What the executor saw and what the scheduler made of it are put together by the ids, on whichever machines."""
    async with started(0) as system:
        system.add_executor(FAST, PoisonedRunner(FAST))
        await system.ready()
        with capture_logs() as lines:
            with pytest.raises(grpc.aio.AioRpcError, match="no kernel for this token"):
                await ask_in_vain(system)
            await until(lambda: any(line["event"] == "request failed" for line in lines))

    about_it = {line["event"]: (line.get("request_id"), line.get("trace_id")) for line in lines}
    for event in ("a request fails by itself", "request failed"):
        assert about_it[event] == ("bad", CALLER[3:35])


def break_down(*_):
    raise ZeroDivisionError


async def generate(stub, message):
    async for _ in stub.Generate(message, metadata=[("traceparent", CALLER)]):
        pass


async def generate_batch(stub, message):
    call = stub.GenerateBatch(metadata=[("traceparent", CALLER)])
    await call.write(inference_pb2.GenerateBatchRequest(index=1, request=message))
    async for _ in call:
        pass


@pytest.mark.parametrize(
    ("ask", "broken"),
    [
        (generate, "scheduler_svc.door.Door._read"),
        (generate_batch, "scheduler_svc.door.Door._read"),
        (generate, "scheduler_svc.service._response"),
    ],
)
async def test_a_call_that_fails_by_a_mistake_of_ours_is_in_the_log_with_the_ids_of_its_request(
    monkeypatch, ask, broken
):
    """It is what a user reports: `INTERNAL`, and an id. The line with the reason has to be found by it."""
    async with started() as system:
        monkeypatch.setattr(broken, break_down)
        with capture_logs() as lines, pytest.raises(grpc.aio.AioRpcError, match="ZeroDivisionError"):
            await ask(system.inference, request("hello", 4, request_id="r"))

    (line,) = [line for line in lines if line["event"] == "call failed"]
    assert (line["request_id"], line["trace_id"]) == ("r", CALLER[3:35])
    assert isinstance(line["exc_info"], ZeroDivisionError)


async def test_what_could_not_be_observed_of_a_request_names_it(monkeypatch):
    """It is the trace that is broken then: without its ids in the log nothing leads there."""
    async with started() as system:
        monkeypatch.setattr("scheduler_svc.observation.observer.Timeline.end", break_down)
        with capture_logs() as lines:
            async for _ in system.inference.Generate(
                request("hello", 2, request_id="r"), metadata=[("traceparent", CALLER)]
            ):
                pass
            await until(lambda: lines)

    (line,) = [line for line in lines if line["event"].startswith("what was observed is lost")]
    assert (line["request_id"], line["trace_id"], line["hook"]) == ("r", CALLER[3:35], "on_ended")
