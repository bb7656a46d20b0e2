"""The time before a request is accepted: users wait it out, so operators see it."""

import asyncio
from dataclasses import replace

import grpc
import pytest
from prometheus_client import CollectorRegistry

from paceline.v1 import fleet_pb2, inference_pb2, observation_pb2
from paceline_cli.sight.listing import listing
from paceline_cli.sight.top_view import Look, picture
from tests.observability.otlp_receiver import OtlpReceiver
from tests.observability.test_overview import look, stages
from tests.observability.test_traces import check_tree, read, received
from tests.paceline_cli.test_trace import trace
from tests.system import FAST, request, started, until

SLOW = replace(FAST, fake_step_us=20_000)


async def held(system, count=1):
    """Wait until the overview shows so many at the door; returns it."""
    while (overview := await look(system)).at_door_request_count != count:
        await asyncio.sleep(0.01)
    return overview


def value(system, name):
    registry = CollectorRegistry()
    registry.register(system.app.metrics())
    return registry.get_sample_value(f"paceline_{name}")


async def test_the_start_of_the_first_executor_is_part_of_what_a_request_took():
    """Scale from zero is what makes first tokens latest of all; a figure without it is a lie to who is asked why."""
    receiver = OtlpReceiver()
    async with started(0, otlp_endpoint=receiver.endpoint) as system:
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
        reading = asyncio.ensure_future(read(system, request("hello", 4, request_id="r")))
        during = await held(system)
        told = (value(system, "requests_at_door"), during.oldest_at_door_ms, during.load.waiting_request_count)
        await until(lambda: system.app.engine.arrivals.held_since(*system.app.engine.arrivals._held) is not None)
        await asyncio.sleep(0.1)
        system.add_executor(name="e0")
        await reading
        (root,) = await received(system, receiver, "r")
        await system.idle()
        after = await held(system, 0)
        meter = system.app.engine.meter
        first_token_s, whole_s, door_s = meter.first_token.sum_s, meter.whole.sum_s, meter.door.sum_s
        counts = value(system, "door_seconds_count"), value(system, "requests_at_door")
    receiver.close()

    check_tree(root)
    door = root.child("door")
    assert told[0] == told[2] == 1
    assert door.attributes["paceline.door.held_for"] == ["the first executor"]
    assert door.span.start_time_unix_nano == root.span.start_time_unix_nano
    assert door.seconds >= door_s >= 0.1
    assert door.span.end_time_unix_nano <= root.child("queue").span.start_time_unix_nano
    assert whole_s >= first_token_s >= door_s
    assert root.attributes["gen_ai.response.time_to_first_chunk"] >= door.seconds
    assert root.attributes["gen_ai.latency.time_in_queue"] < root.attributes["gen_ai.latency.e2e"] - door_s
    (shown,) = after.requests
    assert stages(shown) == ["DOOR", "QUEUE", "PREFILL", "DECODE"]
    assert shown.phases[0].begin_ms == 0
    assert shown.first_token_ms >= shown.phases[0].end_ms >= 100
    assert shown.accepted_unix_ms >= shown.received_unix_ms + 99
    assert counts == (1, 0)


async def test_a_request_of_a_batch_shows_how_long_it_waited_for_room():
    """A batch is not refused when the queue is full, it waits: what waits there is not in the queue, nor forgotten."""
    receiver = OtlpReceiver()
    config = replace(SLOW, max_num_seqs=1)
    async with started(1, config, otlp_endpoint=receiver.endpoint, max_waiting_requests=2) as system:
        calls = [asyncio.ensure_future(read(system, request(f"p{n}", 12, request_id=f"r{n}"))) for n in range(2)]
        await until(lambda: system.scheduler.waiting_count == 1)
        batch = system.inference.GenerateBatch()
        await batch.write(inference_pb2.GenerateBatchRequest(index=1, request=request("b", 2, request_id="b")))
        during = await held(system)
        await batch.done_writing()
        answer = await batch.read()
        await asyncio.gather(*calls)
        (root,) = await received(system, receiver, "b")
    receiver.close()

    check_tree(root)
    assert answer.output.request_id == "b"
    assert root.child("door").attributes["paceline.door.held_for"] == ["room in the queue"]
    assert root.attributes["rpc.method"] == "paceline.v1.InferenceService/GenerateBatch"
    assert during.load.waiting_request_count == 1, "who waits for room is not in the queue yet"


async def test_who_gives_up_at_the_door_is_found_with_the_reason():
    """Why mine timed out is asked of the requests that were never accepted, too."""
    receiver = OtlpReceiver()
    async with started(0, otlp_endpoint=receiver.endpoint) as system:
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
        with pytest.raises(grpc.aio.AioRpcError):
            await read(system, request("hello", 4, request_id="late"), timeout=1.0)
        await until(lambda: system.app.engine.observer.find("late") is not None)
        (root,) = await received(system, receiver, "late")
        (shown,) = (await held(system, 0)).requests
        counts = system.app.engine.meter.ended_request_count, system.app.engine.meter.whole.count
    receiver.close()

    check_tree(root)
    assert [child.name for child in root.children] == ["door"]
    assert root.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert "its deadline passed while it was held for the first executor" in root.span.status.message
    assert (stages(shown), shown.outcome) == (["DOOR"], "deadline")
    assert counts == (0, 0), "it was refused, and has not ended as the accepted ones do"


async def test_a_request_that_waits_at_the_door_now_can_be_asked_about():
    """Where is my request? That is asked while it hangs, and of an id; what is said later is the same trace."""
    async with started(0) as system:
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
        reading = asyncio.ensure_future(read(system, request("hello", 4, request_id="mine")))
        during = await held(system)
        told = await trace(system, "mine")
        system.add_executor(name="e0")
        await reading
        await system.idle()
        (after,) = (await held(system, 0)).requests

    (shown,) = during.requests
    assert (shown.request_id, stages(shown), shown.outcome) == ("mine", ["DOOR"], "")
    assert shown.stage == observation_pb2.REQUEST_STAGE_DOOR
    assert shown.accepted_unix_ms == 0
    assert shown.trace_id == after.trace_id
    assert told.exit_code == 0, told.stderr
    assert "door" in told.stdout
    assert "queue" not in told.stdout.splitlines()[1]
    lines = [line.plain for line in picture(during, Look(160, 40))]
    assert any("mine" in line and "door" in line for line in lines)
    assert listing([shown], 100)


async def test_whoever_waits_at_the_door_is_listed_after_those_that_are_in():
    """Those that run are the first thing to see; who is held is not to be taken for one that has ended."""
    config = replace(SLOW, max_num_seqs=1)
    async with started(1, config, max_waiting_requests=2) as system:
        await read(system, request("done", 2, request_id="done"))
        calls = []
        for name in ("runs", "waits"):
            calls.append(system.inference.Generate(request(name, 60, request_id=name)))
            await until(lambda name=name: system.app.engine.find(name, 0) is not None)
        batch = system.inference.GenerateBatch()
        await batch.write(inference_pb2.GenerateBatchRequest(index=1, request=request("b", 2, request_id="held")))
        during = await held(system)
        for call in (batch, *calls):
            call.cancel()
        await system.idle()

    assert [one.request_id for one in during.requests] == ["runs", "waits", "held", "done"]


async def test_a_request_that_is_not_held_is_not_said_to_have_been():
    """Most requests find the door open; they pay nothing for it and have nothing to explain."""
    async with started() as system:
        await read(system, request("hello", 4, request_id="r"))
        timeline = system.app.engine.observer.find("r")
        door_count = system.app.engine.meter.door.count

    assert (timeline.held_for, door_count) == ((), 0)
    assert timeline.received_at <= timeline.accepted_at


def test_top_says_who_is_at_the_door_and_only_then():
    """Nobody looks for what is not shown; nobody needs a figure that is nought."""
    overview = observation_pb2.GetOverviewResponse(at_door_request_count=3, oldest_at_door_ms=2000)
    overview.load.waiting_request_count, overview.load.oldest_waiting_ms = 4, 2500
    nobody = observation_pb2.GetOverviewResponse()

    for size in (Look(160, 40), Look(100, 12)):
        assert "3 at the door for 2" in "\n".join(line.plain for line in picture(overview, size))
        assert "door" not in "\n".join(line.plain for line in picture(nobody, size))
