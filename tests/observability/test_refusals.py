"""Why calls are not let in, as Prometheus is told it."""

import asyncio
import secrets
from collections import Counter
from dataclasses import replace

import grpc
import pytest

from paceline.v1 import fleet_pb2, inference_pb2
from scheduler_svc.load_meter import RecentCount
from scheduler_svc.observation.tracing import Tracing
from scheduler_svc.refusals import REASONS
from tests.observability.otlp_receiver import OtlpReceiver
from tests.observability.test_overview import look
from tests.system import FAST, request, started, until

SLOW = replace(FAST, fake_step_us=20_000)


def refused(system):
    return Counter(system.app.engine.meter.refused_counts)


async def fails(call):
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in call:
            pass
    return ended.value.code()


async def traced(system, message, flags="01"):
    """A request of a caller whose own trace has these flags; returns (trace id, span id) of the caller."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    header = f"00-{trace_id}-{span_id}-{flags}"
    await fails(system.inference.Generate(message, metadata=[("traceparent", header)]))
    return trace_id, span_id


async def at_door(system):
    await until(lambda: system.app.engine.arrivals._arrivals)


def named(request_id, **fields):
    return request("hello", 4, request_id=request_id, **fields)


async def test_each_mistake_is_counted_as_what_it_is():
    """Whoever looks at a curve of refusals must know whom to talk to: each reason has another remedy."""
    going_on = named("unknown")
    going_on.resume_from.add(output_token_count=1, text_length=1)
    async with started(1, SLOW, max_prompt_bytes=1000) as system:
        running = system.generate(named("mine", detach_timeout_s=30))
        await running.read()
        for message in (
            request(temperature=-1.0),
            request(model="another"),
            request("hello", 10**6),
            request("x" * 1001),
            request("hello", 250, choice_count=1, ignore_eos=True, stop_token_ids=[10**6]),
            request("other", request_id="mine"),
            going_on,
        ):
            await fails(system.generate(message))
        counts = refused(system)
        running.cancel()

    assert counts == {"invalid": 3, "too_large": 2, "id_taken": 1, "lost": 1}
    assert counts.keys() <= set(REASONS)


async def test_no_executor_is_not_taken_for_a_scheduler_that_leaves():
    """One is mended by starting something, the other by nothing at all."""
    async with started(0) as system:
        assert await fails(system.generate(request())) is grpc.StatusCode.UNAVAILABLE
        before = refused(system)
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
        waiting = asyncio.ensure_future(fails(system.generate(request())))
        await at_door(system)
        system.stopping.set()
        assert await waiting is grpc.StatusCode.UNAVAILABLE
        counts = refused(system)

    assert before == {"no_executor": 1}
    assert counts - before == {"leaving": 1}


async def test_who_gives_up_at_the_door_is_counted_and_why():
    """Users who do not wait for the first executor are those that scale to zero costs; they must not vanish."""
    async with started(0) as system:
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
        by_id = asyncio.ensure_future(fails(system.generate(named("by-id"))))
        await at_door(system)
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="by-id"))
        assert await by_id is grpc.StatusCode.CANCELLED
        first = refused(system)

        hangs_up = system.inference.Generate(named("hangs-up"), timeout=60)
        await at_door(system)
        hangs_up.cancel()
        await until(lambda: refused(system) - first)
        second = refused(system)

        assert await fails(system.generate(named("late"), timeout=1.0)) is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: refused(system) - second)
        third = refused(system)

        lease = fleet_pb2.LeaseScalingRequest(holder_id="a", starting_executor_count=1, next_ready_ms=60_000)
        await system.fleet.LeaseScaling(lease)
        assert await fails(system.generate(named("hopeless"), timeout=5)) is grpc.StatusCode.DEADLINE_EXCEEDED
        fourth = refused(system)

    assert (first, second - first) == ({"cancelled": 1}, {"cancelled": 1})
    assert (third - second, fourth - third) == ({"deadline": 1}, {"deadline": 1})


async def test_what_is_wrong_with_a_batch_itself_is_counted_too():
    """It ends the whole call; not to count it would make the largest failures the quietest."""
    async with started() as system:
        call = system.inference.GenerateBatch()
        for _ in range(2):
            await call.write(inference_pb2.GenerateBatchRequest(index=3, request=request()))
        await fails(call)
        counts = refused(system)

    assert counts == {"invalid": 1}


async def test_a_full_queue_is_counted_as_one():
    """It is the only reason that more executors help with."""
    async with started(1, replace(SLOW, max_num_seqs=1), max_waiting_requests=1) as system:
        calls = [system.generate(named(f"r{n}")) for n in range(2)]
        await until(lambda: system.scheduler.waiting_count == 1)
        assert await fails(system.generate(request())) is grpc.StatusCode.RESOURCE_EXHAUSTED
        counts = refused(system)
        lately = (await look(system)).refused_in_last_minute_count
        for call in calls:
            call.cancel()

    assert counts == {"queue_full": 1}
    assert lately == 1


async def test_a_mistake_of_ours_at_the_door_is_counted_and_remembered(monkeypatch):
    """A service that lets nobody in by its own fault must not look like one that nobody calls."""

    def break_down(*_):
        raise ZeroDivisionError("what another user has sent")

    receiver = OtlpReceiver()
    async with started(otlp_endpoint=receiver.endpoint, trace_requests=0) as system:
        monkeypatch.setattr(system.app.door, "_read", break_down)
        code = await fails(system.generate(named("r")))
        batch = system.inference.GenerateBatch()
        await batch.write(inference_pb2.GenerateBatchRequest(index=1, request=named("b")))
        await fails(batch)
        counts, meter = refused(system), system.app.engine.meter
        remembered = system.app.engine.observer.find("r")
        assert await asyncio.to_thread(system.app.sink.flush, 5)
        sent = receiver.requests()
    receiver.close()

    assert code is grpc.StatusCode.INTERNAL
    assert counts == {"internal": 2}
    assert (meter.arrived_request_count, meter.ended_request_count) == (0, 0)
    assert remembered.summary.outcome == "error"
    assert sent.keys() == {"r", "b"}, "it is recorded although nobody asked for it"
    for root in sent.values():
        assert (root.span.status.code, root.attributes["error.type"]) == (2, "INTERNAL")
        assert "ZeroDivisionError" in root.span.status.message
        assert "another user" not in root.span.status.message


async def test_a_request_that_we_fail_at_after_its_acceptance_is_one_request(monkeypatch):
    """Two spans of one id are none to a viewer; two entries of one request make who reads them doubt all others."""
    receiver = OtlpReceiver()

    def break_down(*_):
        raise ZeroDivisionError

    async with started(1, SLOW, otlp_endpoint=receiver.endpoint) as system:
        monkeypatch.setattr(system.app.engine.answers, "read", break_down)
        await fails(system.generate(named("r")))
        await until(lambda: system.app.engine.observer.ended)
        assert await asyncio.to_thread(system.app.sink.flush, 5)
        ended = [one.summary.outcome for one in system.app.engine.observer.ended]
        counts, sent = refused(system), receiver.requests()
    receiver.close()

    assert counts == {"internal": 1}
    assert ended == ["length"]
    assert sent.keys() == {"r"}


async def test_who_traces_finds_a_refusal_in_the_trace():
    """A caller's trace that ends at the wire says that we were never asked."""
    receiver = OtlpReceiver()
    async with started(0, otlp_endpoint=receiver.endpoint, trace_requests=0) as system:
        await traced(system, named("not an id"), "00")
        await fails(system.generate(named("r")))
        callers = {
            await traced(system, named("not an id")): ("not an id", "INVALID_ARGUMENT", "invalid"),
            await traced(system, named("early")): ("early", "UNAVAILABLE", "no_executor"),
        }
        assert await asyncio.to_thread(system.app.sink.flush, 5)
        roots = {(one.span.trace_id.hex(), one.span.parent_span_id.hex()): one for one in receiver.roots()}
        kept = system.app.engine.observer.ended
    receiver.close()

    assert roots.keys() == callers.keys(), "nobody else is recorded"
    for caller, (request_id, code, reason) in callers.items():
        root = roots[caller]
        facts = root.attributes
        assert (root.name, root.span.kind, root.span.status.code) == ("text_completion fake", 2, 2)
        assert root.span.status.message
        assert "must be" not in root.span.status.message, "what tells a sender of a mistake may quote what was sent"
        assert facts["gen_ai.response.id"] == request_id
        assert (facts["rpc.response.status_code"], facts["error.type"], facts["paceline.refused"]) == (
            code,
            code,
            reason,
        )
        assert root.children == []
    assert not kept, "refusals must not push what ran out of the memory"


def test_refusals_cost_no_more_spans_than_was_said_and_hide_no_failures():
    """A full queue refuses thousands a second, whose callers may all trace."""
    now = 0.0

    class Sink:
        def send(self, spans):
            """Not called."""

    tracing = Tracing(Sink(), requests_per_s=0.0, clock=lambda: now)
    caller = tracing.accept("00-0123456789abcdef0123456789abcdef-0123456789abcdef-01")
    recorded = sum(tracing.is_refusal_recorded(caller) for _ in range(1000))
    now = 1.0
    later = sum(tracing.is_refusal_recorded(caller) for _ in range(1000))

    assert (recorded, later) == (10, 10)
    assert tracing.is_recorded(tracing.accept(None), failed=True)
    assert not tracing.is_refusal_recorded(tracing.accept(None))
    assert not Tracing(None).is_refusal_recorded(caller)


def test_refusals_of_the_last_minute_are_forgotten_after_it():
    """Whoever opens the page now must see those of a moment ago, and not those of an hour ago as if they were new."""
    lately = RecentCount()
    for at in (100.2, 100.9, 130.0, 159.5):
        lately.note(at)

    assert [lately.count(now) for now in (159.9, 175.0, 300.0)] == [4, 2, 0]
    for second in range(1_000):
        lately.note(300.0 + second)
    assert lately.count(1_299.5) == 60
