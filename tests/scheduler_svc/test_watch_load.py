"""The load, as an autoscaler is told it, over a real server."""

import asyncio
import time

import grpc
import pytest
from prometheus_client import CollectorRegistry

from autoscaler_svc.fleet_client import FleetClient
from autoscaler_svc.load import ExecutorState
from autoscaler_svc.observe import LoadWatch, decode_load
from autoscaler_svc.scaling_settings import Targets
from paceline.v1 import fleet_pb2, inference_pb2
from tests.system import request, started, until


async def look(system, **fields):
    """What is told first."""
    call = system.fleet.WatchLoad(fleet_pb2.WatchLoadRequest(**fields))
    message = await call.read()
    call.cancel()
    return decode_load(message)


async def test_tells_what_waits_runs_and_was():
    """Exact figures without a scrape in between are what the split makes possible."""
    async with started() as system:
        before = await look(system)
        assert (before.unfinished_request_count, before.arrived_request_count) == (0, 0)
        assert [message async for message in system.generate(request("hello", 8))]
        await system.idle()
        after = await look(system)

    assert (after.arrived_request_count, after.ended_request_count) == (1, 1)
    assert (after.arrived_prompt_token_count, after.generated_token_count) == (5, 8)
    assert after.computed_token_count >= 12
    assert (after.mean_prompt_token_count, after.mean_output_token_count) == (5, 8)
    assert after.first_token.count == after.per_token.count == 1
    assert 0 < after.per_token.p50_s < after.first_token.p99_s + 1
    (executor,) = after.executors
    assert executor.state is ExecutorState.READY
    assert (executor.slot_count, executor.block_count, executor.cache_token_count) == (8, 64, 256)
    assert executor.step_us + executor.token_us > 0  # eight steps do not tell one from the other
    assert executor.startup_s > 0


async def test_tells_who_waits_and_what_is_ahead_of_them():
    """A queue is tokens and seconds, not a number of requests."""
    async with started(executor_count=0) as system:
        executor = system.add_executor(name="e0")
        await system.ready()
        executor.cancel()
        await until(lambda: not system.scheduler.executors)
        calls = [asyncio.ensure_future(system.generate(request("x" * 20, 4)).read()) for _ in range(3)]
        await asyncio.gather(*calls)
        load = await look(system)

        assert (load.waiting_request_count, load.waiting_token_count) == (3, 60)
        assert load.backlog_token_count == 60
        assert load.backlog_s == 0  # nobody is there whose speed would say it
        assert load.oldest_waiting_s >= 0


async def test_a_request_that_nobody_is_there_for_is_told_at_once():
    """Scale from zero does not wait for the next look."""
    async with started() as system:
        (executor,) = system.tasks
        executor.cancel()
        await until(lambda: not system.scheduler.executors)
        call = system.fleet.WatchLoad(fleet_pb2.WatchLoadRequest(interval_ms=60_000))
        await call.read()
        reading = asyncio.ensure_future(call.read())
        generating = system.generate(request())
        await generating.read()
        async with asyncio.timeout(10):
            assert (await reading).waiting_request_count == 1
        call.cancel()


async def test_counts_who_came_within_the_targets_of_whoever_asks():
    """Attainment is what a policy is judged by."""
    async with started() as system:
        call = system.fleet.WatchLoad(
            fleet_pb2.WatchLoadRequest(interval_ms=100, first_token_target_ms=60_000, per_token_target_us=1)
        )
        await call.read()
        assert [message async for message in system.generate(request())]
        await system.idle()
        while not (message := await call.read()).ended_request_count:
            pass
        call.cancel()

    assert message.first_token.within_target_count == 1
    assert message.per_token.within_target_count == 0


@pytest.mark.parametrize("interval_ms", [1, 99, 60_001])
async def test_an_interval_out_of_range_is_refused(interval_ms):
    """A reader that asks every millisecond would be the load."""
    async with started() as system:
        with pytest.raises(grpc.aio.AioRpcError, match=r"interval_ms is .*, must be 100 to 60000"):
            await system.fleet.WatchLoad(fleet_pb2.WatchLoadRequest(interval_ms=interval_ms)).read()


async def test_the_stream_ends_cleanly_with_the_scheduler():
    """A reader that is cut off would take a restart for a failure."""
    async with started() as system:
        call = system.fleet.WatchLoad(fleet_pb2.WatchLoadRequest(interval_ms=100))
        await call.read()
        system.stopping.set()
        async with asyncio.timeout(10):
            while await call.read() is not grpc.aio.EOF:
                pass

        assert await call.code() is grpc.StatusCode.OK


async def test_two_autoscalers_do_not_act_at_once():
    """The second has the right when the first gives it back, or is silent for long enough."""
    async with started() as system:
        first, second = FleetClient(system.address, "first"), FleetClient(system.address, "second")

        assert await first.renew()
        assert not await second.renew()
        assert first.may_act
        assert not second.may_act
        await first.close()
        assert await second.renew()
        await second.close()


async def test_requests_before_the_first_executor_are_held_while_an_autoscaler_is_there():
    """Scale from zero, the very first time: only executors know what the model takes."""
    async with started(executor_count=0) as system:
        with pytest.raises(grpc.aio.AioRpcError, match="no executor has joined yet"):
            await system.generate(request()).read()
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
        reading = asyncio.ensure_future(system.generate(request()).read())
        while not (await look(system)).waiting_request_count:
            await asyncio.sleep(0.01)
        system.add_executor(name="e0")

        assert (await reading).prompt_token_count == 5


async def test_who_waits_for_the_first_executor_can_be_cancelled():
    """Nobody pays for the start of an executor whose answer nobody wants."""
    async with started(executor_count=0) as system:
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
        reading = asyncio.ensure_future(system.generate(request(request_id="mine")).read())
        while not (await look(system)).waiting_request_count:
            await asyncio.sleep(0.01)
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="mine"))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await reading
        load = await look(system)

    assert ended.value.code() is grpc.StatusCode.CANCELLED
    assert load.waiting_request_count == 0


async def test_an_autoscaler_that_restarts_costs_nobody_at_the_door_an_answer():
    """An upgrade of the autoscaler takes seconds; who waits for its first executor waits on."""
    async with started(executor_count=0) as system:
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
        reading = asyncio.ensure_future(system.generate(request()).read())
        while not (await look(system)).waiting_request_count:
            await asyncio.sleep(0.01)
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a", release=True))
        await asyncio.sleep(0.3)
        system.add_executor(name="e0")

        assert (await reading).prompt_token_count == 5


async def test_a_scheduler_that_restarts_with_nobody_there_waits_for_who_may_act(tmp_path):
    """After a lull its journal has nobody in it, and an autoscaler may still think that it may act."""
    journal = str(tmp_path / "journal.db")
    async with started(executor_count=0, journal=journal) as system:
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a"))
    async with started(executor_count=0, journal=journal) as system:
        with pytest.raises(grpc.aio.AioRpcError, match="the scheduler has restarted") as refusal:
            await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="b"))

    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_executor_that_is_about_to_attach_is_there():
    """Refusing somebody eight seconds before a start that is over would be a lie."""
    async with started() as system:
        lease = fleet_pb2.LeaseScalingRequest(holder_id="a", starting_executor_count=1, next_ready_ms=8000)
        await system.fleet.LeaseScaling(lease)
        link = system.app.fleet.members["e0"].link
        system.app.engine.lost(link, may_return=True)
        link.is_attached = False

        await system.generate(request(), timeout=5).read()


async def test_a_deadline_before_the_next_executor_is_told_at_once():
    """Who has two seconds and would wait for eight can do something better with them."""
    async with started(executor_count=0) as system:
        lease = fleet_pb2.LeaseScalingRequest(holder_id="a", starting_executor_count=1, next_ready_ms=8000)
        await system.fleet.LeaseScaling(lease)
        began_at = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError, match="no executor is there and the next one takes") as refusal:
            await system.generate(request(), timeout=5).read()

    assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began_at < 4


async def test_a_watch_survives_what_it_watches():
    """A scheduler that restarts is an unknown load, and then a known one again."""
    watch = LoadWatch("127.0.0.1:1", 1.0, Targets())
    keeping = asyncio.create_task(watch.keep())
    assert await watch.next(0.3) is None
    keeping.cancel()
    async with started() as system:
        watch = LoadWatch(system.address, 0.1, Targets())
        keeping = asyncio.create_task(watch.keep())
        load = await watch.next(10)
        assert load is not None
        assert len(load.ready) == 1
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def test_prometheus_is_told_the_same_figures():
    """One truth, whichever way it is read."""
    async with started() as system:
        assert [message async for message in system.generate(request("hello", 8))]
        await system.idle()
        registry = CollectorRegistry()
        registry.register(system.app.metrics())
        load = await look(system)

        def value(name, **labels):
            return registry.get_sample_value(f"paceline_{name}", labels)

        assert value("requests_arrived_total") == load.arrived_request_count == 1
        assert value("tokens_generated_total") == load.generated_token_count == 8
        assert value("blocks") == load.block_count == 64
        assert value("first_token_seconds_count") == load.first_token.count == 1
        assert value("per_token_seconds_bucket", le="+Inf") == 1
        assert value("executors", state="ready") == 1
        assert value("executor_blocks", executor_id="e0") == 64
