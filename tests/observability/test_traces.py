"""One trace for each request, whatever becomes of it."""

import asyncio
import sys
import time
from dataclasses import replace

import grpc
import pytest

from common.otlp_json import to_otlp_json
from executor_svc.fake import FakeRunner
from paceline.v1 import inference_pb2, observation_pb2, observation_pb2_grpc
from paceline_cli.sight.spans import tree_of
from paceline_cli.sight.trace_view import waterfall
from tests.observability.otlp_receiver import OtlpReceiver, value_of
from tests.observability.test_overview import look
from tests.system import FAST, request, started, until

SLOW = replace(FAST, fake_step_us=20_000)
POISON = 1
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
CALLER = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture
def receiver():
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


async def received(system, receiver, *request_ids):
    """The spans of these requests, once they have come."""
    await until(lambda: all(system.app.engine.observer.find(one).ended_at is not None for one in request_ids))
    assert await asyncio.to_thread(system.app.sink.flush, 5)
    requests = receiver.requests()
    return [requests[one] for one in request_ids]


def check_tree(root):
    """Children lie within their parents, and belong to the same trace."""
    for child in root.children:
        assert child.span.start_time_unix_nano >= root.span.start_time_unix_nano - 1000
        assert child.span.end_time_unix_nano <= root.span.end_time_unix_nano + 1000
        check_tree(child)


def event_attributes(event):
    return {one.key: value_of(one.value) for one in event.attributes}


async def test_a_streamed_request_is_one_trace_from_the_caller_to_the_phases_of_the_executor(receiver):
    """Why was it slow? The answer must be in one place: queue, prefill, decode, and what the executor did."""
    async with started(otlp_endpoint=receiver.endpoint) as system:
        call = system.inference.Generate(request("hello world", 6, request_id="r"), metadata=[("traceparent", CALLER)])
        assert [message async for message in call]
        (root,) = await received(system, receiver, "r")

    check_tree(root)
    assert root.span.trace_id.hex() == CALLER[3:35]
    assert root.span.parent_span_id.hex() == CALLER[36:52]
    assert (root.name, root.span.kind, root.service) == ("text_completion fake", 2, "paceline-scheduler")
    assert [child.name for child in root.children if child.name != "door"] == ["queue", "prefill", "decode"]
    prefill = root.child("prefill")
    assert {child.name for child in prefill.children} >= {"forward"}
    assert {child.name for child in prefill.children} <= {"wait", "prepare", "forward", "sample"}
    assert {(child.service, child.instance_id) for child in prefill.children} == {("paceline-executor", "e0")}
    assert prefill.attributes["paceline.tokens"] == 11
    decode = root.child("decode")
    assert decode.attributes["paceline.steps"] >= 5
    assert decode.attributes["paceline.steps.forward_s"] > 0
    assert root.events == ["first token"]
    assert root.attributes["gen_ai.operation.name"] == "text_completion"
    assert root.attributes["gen_ai.usage.input_tokens"] == 11
    assert root.attributes["gen_ai.usage.output_tokens"] == 6
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < root.attributes["gen_ai.response.time_to_first_chunk"] <= root.seconds
    assert not any("messages" in key for key in root.attributes), "content without having been asked for"


async def test_a_long_prompt_has_a_span_for_each_chunk(receiver):
    """Chunks that wait behind others are what makes first tokens late; they must be seen one by one."""
    config = replace(FAST, max_num_batched_tokens=8, fake_block_count=256)
    async with started(executor=config, otlp_endpoint=receiver.endpoint) as system:
        assert [m async for m in system.generate(request("x" * 40, 2, request_id="long"))]
        assert [m async for m in system.generate(request("x" * 400, 2, request_id="longer"))]
        long, longer = await received(system, receiver, "long", "longer")

    assert [child.attributes["paceline.tokens.from"] for child in long.children_of("prefill")] == [0, 8, 16, 24, 32]
    assert len(longer.children_of("prefill")) == 32
    assert sum(child.attributes["paceline.tokens"] for child in longer.children_of("prefill")) >= 400 - 40


async def test_a_cancelled_request_is_no_error_of_the_server(receiver):
    """Whoever looks for what is broken must not find users who changed their minds."""
    async with started(executor=SLOW, otlp_endpoint=receiver.endpoint) as system:
        call = system.inference.Generate(request("hello", 40, request_id="r"))
        await call.read()
        await call.read()
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="r"))
        (root,) = await received(system, receiver, "r")

    check_tree(root)
    assert root.attributes["rpc.response.status_code"] == "CANCELLED"
    assert root.span.status.code == 0
    assert "error.type" not in root.attributes


async def test_a_preempted_request_shows_when_it_gave_way_and_when_it_went_on(receiver):
    """A pause in a stream is explained: who had the blocks meanwhile, and what was computed again."""
    config = replace(SLOW, fake_block_count=12, fake_step_us=2000)
    async with started(executor=config, otlp_endpoint=receiver.endpoint, policy="priority") as system:
        low = asyncio.ensure_future(read(system, request("a" * 12, 24, request_id="low", priority=0)))
        await until(lambda: (one := system.app.engine.find("low", 0)) is not None and one.output_count > 2)
        high = asyncio.ensure_future(read(system, request("b" * 12, 24, request_id="high", priority=5)))
        await asyncio.gather(low, high)
        low, high = await received(system, receiver, "low", "high")
        meter = system.app.engine.meter

    check_tree(low)
    assert "preempted" in low.events
    assert "placed again" in low.events
    assert [child.name for child in low.children if child.name in ("queue", "decode")] == 2 * ["queue", "decode"]
    (gave_way,) = (event for event in low.span.events if event.name == "preempted")
    cause = event_attributes(gave_way)["paceline.preempted.for"]
    assert cause in ("a stronger claim", "blocks of the cache")  # by how far it was when the other one came
    assert low.children_of("queue")[1].attributes["paceline.queue.waited_for"][0] == "blocks of the cache"
    assert [child.attributes["paceline.attempt"] for child in low.children_of("decode")] == [1, 2]
    assert [child.attributes["paceline.attempt"] for child in high.children_of("decode")] == [1]
    assert any(one.startswith(f"it gave way for {cause} at +") for one in low.attributes["paceline.account"])
    assert low.attributes["paceline.recomputations"] == 1
    assert "preempted" not in high.events
    assert meter.preemption_count == 1
    assert 12 <= meter.recomputed_token_count <= 40


async def test_a_request_that_moves_shows_both_executors(receiver):
    """After a kill the stream goes on; the trace says from where, to where and how long nobody computed it."""
    async with started(executor_count=1, executor=SLOW, otlp_endpoint=receiver.endpoint, lease_s=0.5) as system:
        (first,) = system.tasks
        reading = asyncio.ensure_future(read(system, request("hello", 20, request_id="r")))
        await until(lambda: (one := system.app.engine.find("r", 0)) is not None and one.output_count > 3)
        system.add_executor(SLOW, name="e1")
        await system.ready(2)
        first.cancel()
        await reading
        (root,) = await received(system, receiver, "r")

    check_tree(root)
    assert [child.attributes["paceline.executor.id"] for child in root.children_of("decode")] == ["e0", "e1"]
    losses = [event for event in root.events if event.startswith("executor")]
    assert losses in (["executor lost"], ["executor cut off", "executor did not come back"])
    assert "placed again" in root.events
    assert [child.name for child in root.children_of("queue")] == ["queue", "queue"]


async def test_a_request_that_fails_is_recorded_although_nobody_asked_for_it(receiver):
    """Errors are what people look for; sampling must not lose them."""
    message = request("hello", 200, request_id="late", detach_timeout_s=60)  # the service's own clock ends it
    async with started(executor=SLOW, otlp_endpoint=receiver.endpoint, trace_requests=0, policy="fifo") as system:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await read(system, message, timeout=0.5)
        (root,) = await received(system, receiver, "late")

    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert root.attributes["gen_ai.response.finish_reasons"] == ["deadline"]


async def test_a_deadline_that_passes_while_it_runs_shows_how_far_it_came(receiver):
    """A time-out is asked about by who has waited it out: the trace says that it ran, and what took the time."""
    message = request("hello", 200, request_id="late", ignore_eos=True, detach_timeout_s=60)
    async with started(executor=SLOW, otlp_endpoint=receiver.endpoint) as system:
        with pytest.raises(grpc.aio.AioRpcError):
            await read(system, message, timeout=2.0)
        (root,) = await received(system, receiver, "late")

    check_tree(root)
    assert [child.name for child in root.children if child.name != "door"] == ["queue", "prefill", "decode"]
    assert root.child("decode").seconds > 0
    assert root.events == ["first token"]
    assert 0 < root.attributes["gen_ai.usage.output_tokens"] < 200
    assert root.attributes["gen_ai.response.finish_reasons"] == ["deadline"]
    assert root.attributes["rpc.response.status_code"] == root.attributes["error.type"] == "DEADLINE_EXCEEDED"
    assert (root.span.status.code, root.span.status.message) == (2, "deadline")


async def test_a_request_that_we_fail_at_is_an_error_without_children(receiver, monkeypatch):
    """What went wrong before anything could be queued or computed is told by the one span there is."""

    def break_down(*_):
        raise ZeroDivisionError

    async with started(otlp_endpoint=receiver.endpoint) as system:
        monkeypatch.setattr(system.app.door, "_read", break_down)
        call = system.inference.Generate(request("hello", 6, request_id="r"), metadata=[("traceparent", CALLER)])
        with pytest.raises(grpc.aio.AioRpcError):
            assert [message async for message in call]
        (root,) = await received(system, receiver, "r")
        shown = await look(system)

    assert (root.span.trace_id.hex(), root.span.parent_span_id.hex()) == (CALLER[3:35], CALLER[36:52])
    assert [child.name for child in root.children if child.name != "door"] == []
    assert root.attributes["rpc.response.status_code"] == root.attributes["error.type"] == "INTERNAL"
    assert root.span.status.code == 2
    assert [(one.request_id, one.outcome) for one in shown.requests] == [("r", "error")]


async def test_a_request_that_is_recorded_for_its_failure_is_shown_as_recorded(receiver):
    """Whoever sees that it failed looks for its trace, and must not be told that there is none."""
    async with started(0, otlp_endpoint=receiver.endpoint, trace_requests=0.0) as system:
        system.add_executor(FAST, PoisonedRunner(FAST))
        await system.ready()
        await read(system, request("fine", 2, request_id="fine"))
        with pytest.raises(grpc.aio.AioRpcError):
            await read(system, request("a\x01", 5, request_id="bad"))
        await received(system, receiver, "bad")
        overview = await look(system)
        whole = system.app.engine.meter.whole

    assert {one.request_id: one.is_traced for one in overview.requests} == {"bad": True, "fine": False}
    assert {one.trace_id for one in whole.exemplars.values()} == {
        one.trace_id for one in overview.requests if one.request_id == "bad"
    }


class PoisonedRunner(FakeRunner):
    """Fails whenever one token is among those that a step computes."""

    def run(self, batch):
        if POISON in batch.token_ids:
            raise RuntimeError("no kernel for this token")
        return super().run(batch)


async def test_a_request_that_breaks_its_step_is_an_error_with_its_reason(receiver):
    """What went wrong stands in the trace; those beside it are no errors."""
    async with started(0, otlp_endpoint=receiver.endpoint, trace_requests=0.0) as system:
        system.add_executor(FAST, PoisonedRunner(FAST))
        await system.ready()
        with pytest.raises(grpc.aio.AioRpcError):
            await read(system, request("a\x01", 5, request_id="bad"))
        (root,) = await received(system, receiver, "bad")

    check_tree(root)
    assert root.span.status.code == 2
    assert "no kernel for this token" in root.span.status.message
    assert root.attributes["error.type"] == "INTERNAL"
    assert root.attributes["gen_ai.response.finish_reasons"] == ["error"]


async def test_a_restarted_scheduler_goes_on_with_the_trace(receiver, tmp_path):
    """The parent is the caller's, whichever life of the scheduler ends the request."""
    path = str(tmp_path / "journal.db")
    message = request(chat=CHAT, request_id="r", max_output_tokens=30, detach_timeout_s=30)
    async with started(1, SLOW, otlp_endpoint=receiver.endpoint, journal=path, drain_timeout_s=0) as system:
        call = system.inference.Generate(message, metadata=[("traceparent", CALLER)])
        for _ in range(3):
            await call.read()
        span_id = system.app.engine.find("r", 0).trace.span_id
    restarted_ns = time.time_ns()
    async with started(1, SLOW, journal=path, otlp_endpoint=receiver.endpoint) as system:
        restored = await look(system)
        (root,) = await received(system, receiver, "r")

    check_tree(root)
    assert root.span.span_id == span_id
    assert root.span.trace_id.hex() == CALLER[3:35]
    assert root.span.parent_span_id.hex() == CALLER[36:52]
    assert root.events[0] == "restored"
    assert root.name.startswith("chat ")
    assert root.attributes["gen_ai.operation.name"] == "chat"
    assert root.attributes["rpc.method"] == "paceline.v1.InferenceService/Generate"
    assert root.span.start_time_unix_nano < restarted_ns
    assert all(child.span.start_time_unix_nano >= restarted_ns for child in root.children_of("queue"))
    (shown,) = restored.requests
    assert shown.received_unix_ms * 1_000_000 + shown.phases[0].begin_ms * 1e6 >= restarted_ns - 2_000_000
    assert root.attributes["gen_ai.usage.output_tokens"] == 30


async def test_each_choice_has_its_own_decode(receiver):
    """Several answers to one prompt are one request: the prompt is read once."""
    async with started(otlp_endpoint=receiver.endpoint) as system:
        await read(system, request("hello world", 6, request_id="r", choice_count=3, temperature=1.0))
        (root,) = await received(system, receiver, "r")

    check_tree(root)
    assert len(root.children_of("decode")) == 3
    assert root.attributes["gen_ai.request.choice.count"] == 3
    assert root.attributes["gen_ai.usage.output_tokens"] == 18


async def test_a_choice_that_gives_way_is_told_apart_from_those_that_go_on(receiver):
    """Time in the queue that is put down to another choice explains a pause that nobody had, and hides one that was."""
    config = replace(FAST, fake_block_count=12, fake_step_us=2000)  # both choices at once need more
    async with started(executor=config, otlp_endpoint=receiver.endpoint) as system:
        await read(system, request("a" * 12, 24, request_id="r", choice_count=2, temperature=1.0, ignore_eos=True))
        (root,) = await received(system, receiver, "r")
        (told,) = tree_of(to_otlp_json(system.app.engine.observer.spans(system.app.engine.observer.find("r"))))

    check_tree(root)
    rows = {
        choice: [child for child in root.children if child.attributes.get("paceline.choice") == choice]
        for choice in (0, 1)
    }
    assert [
        child for child in root.children if child.name != "door" and "paceline.choice" not in child.attributes
    ] == []
    names = {choice: list(dict.fromkeys(child.name for child in some)) for choice, some in rows.items()}
    assert names[0] == ["queue", "prefill", "decode"]
    story = [child.name for child in rows[1]]
    assert [name for name in story if name != "prefill"] in (
        ["decode", "queue", "decode"],
        2 * ["decode", "queue"] + ["decode"],
    )
    for child in [*root.children_of("prefill")]:
        assert {one.name for one in child.children} >= {"forward"}
    events = {event.name: event_attributes(event) for event in root.span.events}
    assert events["preempted"]["paceline.choice"] == 1
    assert events["placed again"] == {"paceline.choice": 1, "paceline.executor.id": "e0"}
    _, *pauses, first, second = told.facts["paceline.account"]
    assert pauses
    assert all(one.startswith("it gave way for blocks of the cache") for one in pauses)
    assert "queue" in second
    assert "2 times" not in first
    assert any("preempted #2" in line.plain for line in waterfall("r", [told], 120))


async def test_a_decode_that_runs_says_what_its_steps_take(receiver):
    """Why is it slow *now*? Model or scheduler is the first thing to know, and not only when it is over."""
    async with started(executor=SLOW, otlp_endpoint=receiver.endpoint) as system:
        call = system.generate(request("hello", 200, request_id="r", ignore_eos=True))
        for _ in range(5):
            await call.read()
        observer = system.app.engine.observer
        early = await decode_of(observer, 2)
        late = await decode_of(observer, 6)
        call.cancel()
        (root,) = await received(system, receiver, "r")

    assert 2 <= early["paceline.steps"] < late["paceline.steps"]
    assert late["paceline.steps.forward_s"] >= 0.02 * (late["paceline.steps"] - 1)
    assert root.child("decode").attributes["paceline.steps"] >= late["paceline.steps"]


async def decode_of(observer, step_count):
    """What the trace says of a decode that has run for so many steps."""
    timeline = observer.find("r")

    def attributes():
        return next(dict(span.attributes) for span in observer.spans(timeline) if span.name == "decode")

    await until(lambda: attributes()["paceline.steps"] >= step_count)
    return attributes()


async def test_no_more_requests_a_second_are_recorded_than_was_said(receiver):
    """The cost of tracing is bounded whatever the load; callers who trace are always served."""
    async with started(otlp_endpoint=receiver.endpoint, trace_requests=3.0) as system:
        for number in range(20):
            await read(system, request("hello", 2, request_id=f"r{number}"))
        call = system.inference.Generate(request("hello", 2, request_id="asked"), metadata=[("traceparent", CALLER)])
        assert [message async for message in call]
        await received(system, receiver, "asked")

    assert "asked" in receiver.requests()
    assert 3 <= len(receiver.requests()) <= 8


async def test_every_so_manieth_step_is_recorded_and_linked_to_its_requests(receiver):
    """Requests share steps: from a slow step to those who waited in it, and back, is one click."""
    async with started(otlp_endpoint=receiver.endpoint, trace_steps=4) as system:
        await asyncio.gather(*(read(system, request(f"hello {n}", 12, request_id=f"r{n}")) for n in range(3)))
        roots = await received(system, receiver, "r0", "r1", "r2")
        await asyncio.to_thread(system.app.sink.flush, 5)

    steps = [root for root in receiver.roots() if root.name == "step"]
    assert steps
    of_requests = {root.span.span_id for root in roots}
    assert {link.span_id for step in steps for link in step.span.links} == of_requests
    for step in steps:
        check_tree(step)
        assert {child.service for child in step.children} == {"paceline-executor"}
        assert "forward" in {child.name for child in step.children}
    linked = {link.span_id for root in roots for link in root.child("decode").span.links}
    assert linked
    assert linked <= {step.span.span_id for step in steps}


async def test_content_is_in_the_trace_that_is_sent_where_the_operator_asked_for_it_and_in_no_other(receiver):
    """Opt-in, and then as the conventions have it; the scheduler's own ports do not know who asks."""
    async with started(otlp_endpoint=receiver.endpoint, trace_content=True) as system:
        await read(system, request("hello", 4, request_id="r"))
        (root,) = await received(system, receiver, "r")
        async with grpc.aio.insecure_channel(system.address) as channel:
            stub = observation_pb2_grpc.ObservationServiceStub(channel)
            asked = await stub.GetTrace(observation_pb2.GetTraceRequest(request_id="r"))

    assert "messages" not in asked.otlp_json, "whoever reaches the port would read what others have asked"
    assert "gen_ai.usage.input_tokens" in asked.otlp_json
    assert '"content": "hello"' in root.attributes["gen_ai.input.messages"]
    assert '"role": "assistant"' in root.attributes["gen_ai.output.messages"]


async def test_serving_goes_on_when_nobody_takes_traces(receiver):
    """A tracing backend that is down costs spans, and nobody an answer."""
    receiver.fails = True
    async with started(otlp_endpoint=receiver.endpoint) as system:
        await read(system, request("hello", 4, request_id="r"))
        await asyncio.to_thread(system.app.sink.flush, 5)
        await until(lambda: system.app.sink.dropped_count)
        dropped = system.app.sink.dropped_count

    assert dropped >= 4


async def test_with_tracing_off_opentelemetry_is_not_even_imported():
    """Off means off: no import, no call, no thread."""
    code = (
        "import asyncio, sys\n"
        "from tests.system import request, started\n"
        "async def main():\n"
        "    async with started() as system:\n"
        "        assert [m async for m in system.generate(request('hello', 4))]\n"
        "asyncio.run(main())\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()

    assert said.decode().splitlines()[-1] == "[]"


async def read(system, message, timeout=None):
    """Read an answer to its end."""
    return [one async for one in system.generate(message, timeout=timeout)]
