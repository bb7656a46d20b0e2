"""The step stream as raw messages: what an executor accepts, and what it refuses."""

import asyncio
import threading
from contextlib import asynccontextmanager

import grpc
import pytest

from executor_svc.config import ExecutorConfig
from executor_svc.executor import Executor
from executor_svc.fake import FakeRunner, next_token
from executor_svc.model_thread import ModelThread
from executor_svc.service import ExecutorService
from paceline.internal.v1 import executor_pb2 as pb
from paceline.internal.v1 import executor_pb2_grpc
from tests.executor_svc.test_executor import first_plan, start, tokens_of
from tests.system import until

INCARNATION = 7


@asynccontextmanager
async def served(step_us=0.0, resume_window_s=60.0, runner=FakeRunner, metrics=None):
    """An executor with the fake model behind a real server; yields a stub."""
    config = ExecutorConfig(model="fake", block_size=4, fake_block_count=8, max_num_seqs=4, fake_step_us=step_us)
    thread = ModelThread(Executor(runner(config)), asyncio.get_running_loop(), metrics)
    server = grpc.aio.server()
    service = ExecutorService(thread, INCARNATION, resume_window_s, on_broken=lambda message: None)
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        stub.service = service
        yield stub
    await server.stop(0)
    thread.stop()
    thread.join()


def attach_message(epoch=5, scheduler_id="s", incarnation=INCARNATION, version=1, resume=False):
    request = pb.AttachRequest(protocol_version=version, scheduler_id=scheduler_id, resume=resume)
    return pb.SchedulerMessage(epoch=epoch, incarnation=incarnation, attach=request)


def plan_message(plan, epoch=5, incarnation=INCARNATION):
    return pb.SchedulerMessage(epoch=epoch, incarnation=incarnation, plan=plan)


async def attach(stub, **values):
    call, _ = await attach_and_look(stub, **values)
    return call


async def attach_and_look(stub, **values):
    """An attachment, and what the executor says that it has."""
    call = stub.Attach()
    await call.write(attach_message(**values))
    message = await call.read()
    assert message.WhichOneof("message") == "attached"
    assert (message.epoch, message.incarnation) == (values.get("epoch", 5), INCARNATION)
    return call, message.attached


async def read_to_the_end(call):
    while await call.read() is not grpc.aio.EOF:
        pass


async def refusal(call):
    """The status that the executor ended the call with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_the_end(call)
    return caught.value.code(), caught.value.details()


async def test_runs_plans_and_reports_where_the_time_went():
    """One result for each plan, with the phases of the step: what traces and the idle share are made of."""
    async with served(step_us=2000) as stub:
        call = await attach(stub)
        await call.write(plan_message(first_plan(start(0, [1], [0]))))
        result = (await call.read()).result

    assert tokens_of(result) == [next_token([1])]
    assert result.timings.forward_us >= 2000


async def test_a_result_is_told_before_it_is_counted():
    """The next plan hangs on it; what nobody waits for comes after what somebody does."""

    class Metrics:
        def __init__(self):
            self.was_told = threading.Event()
            self.noted = []

        def note_step(self, plan, result):
            self.noted.append((plan.step, result.step, self.was_told.wait(20)))

    metrics = Metrics()
    async with served(metrics=metrics) as stub:
        call = await attach(stub)
        await call.write(plan_message(first_plan(start(0, [1], [0]))))
        result = (await call.read()).result
        metrics.was_told.set()
        await until(lambda: metrics.noted)

    assert metrics.noted == [(result.step, result.step, True)]
    assert result.timings.idle_us > 0


async def test_an_attachment_that_does_not_resume_starts_empty():
    """A scheduler that does not ask for what is there must not meet what it does not know."""
    async with served() as stub:
        first = await attach(stub)
        await first.write(plan_message(first_plan(start(0, [1], [0]))))
        await first.read()
        await first.done_writing()
        assert await first.read() is grpc.aio.EOF
        second = await attach(stub)
        await second.write(plan_message(first_plan(start(0, [2], [0]))))

        assert tokens_of((await second.read()).result) == [next_token([2])]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"epoch": 4}, "epoch 4 of scheduler 's' is stale: scheduler 's' has been attached with epoch 5"),
        ({"scheduler_id": "other"}, "epoch 5 of scheduler 'other' is stale"),
        ({"incarnation": 8}, "incarnation 8 is not the 7 of this executor"),
        ({"version": 2}, "protocol version 2 is not the 1 of this executor"),
    ],
)
async def test_refuses_a_stale_scheduler_and_leaves_the_attached_one_alone(values, reason):
    """Two schedulers that drive one cache would corrupt both; the executor owns the cache and therefore decides."""
    async with served() as stub:
        owner = await attach(stub)
        intruder = stub.Attach()
        await intruder.write(attach_message(**values))
        code, details = await refusal(intruder)
        await owner.write(plan_message(first_plan(start(0, [1], [0]))))

        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert reason in details
        assert tokens_of((await owner.read()).result) == [next_token([1])]


@pytest.mark.parametrize("epoch", [5, 6])
async def test_a_newer_attachment_takes_over(epoch):
    """A scheduler whose stream broke, or that restarted, must not wait for the old stream to time out."""
    async with served() as stub:
        old = await attach(stub)
        new = await attach(stub, epoch=epoch)
        code, _ = await refusal(old)
        await new.write(plan_message(first_plan(start(0, [1], [0])), epoch=epoch))

        assert code is grpc.StatusCode.ABORTED
        assert tokens_of((await new.read()).result) == [next_token([1])]


@pytest.mark.parametrize("values", [{"epoch": 4}, {"epoch": 6}, {"incarnation": 8}])
async def test_refuses_a_plan_that_was_meant_for_somebody_else(values):
    """A message of another epoch or incarnation belongs to another life of one side: nothing of it may happen."""
    async with served() as stub:
        call = await attach(stub)
        await call.write(plan_message(first_plan(start(0, [1], [0])), **values))

        assert (await refusal(call))[0] is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_refusal_comes_also_while_a_message_is_written():
    """gRPC sends neither a message nor a status where both are to go at once, and the scheduler would wait for ever."""
    async with served() as stub:
        for _ in range(50):
            call = stub.Attach()
            await call.write(attach_message())
            await call.write(plan_message(first_plan(start(0, [1], [0])), epoch=6))

            assert (await asyncio.wait_for(refusal(call), 20))[0] is grpc.StatusCode.FAILED_PRECONDITION


async def test_an_attachment_that_dies_while_it_opens_leaves_nothing_behind():
    """A drain waits for the scheduler to detach; a stream that never opened must not be waited for."""
    async with served() as stub:
        for _ in range(20):
            call = stub.Attach()
            await call.write(attach_message())
            call.cancel()
        await asyncio.sleep(0.2)
        call = await attach(stub)
        await call.write(plan_message(first_plan(start(0, [1], [0]))))

        assert tokens_of((await call.read()).result) == [next_token([1])]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        async with asyncio.timeout(5):
            await stub.service.detached.wait()


async def test_refuses_a_third_plan_without_a_result():
    """The credit bounds what lies in the queue; a scheduler that ignores it has lost count."""
    async with served(step_us=50_000) as stub:
        call = await attach(stub)
        await call.write(plan_message(first_plan(start(0, [1], [0]))))
        for step in (2, 3):
            await call.write(plan_message(pb.Plan(step=step, sampling_row_count=1)))
        code, details = await refusal(call)

        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "plan 3 is the third without a result" in details


async def test_a_contradicting_plan_ends_the_attachment_and_not_the_process():
    """A bug of one side must not cost the loaded model."""
    async with served() as stub:
        call = await attach(stub)
        await call.write(plan_message(pb.Plan(step=3)))
        code, details = await refusal(call)
        again = await attach(stub)
        await again.write(plan_message(first_plan(start(0, [1], [0]))))

        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "plan of step 3, but step 1 is next")
        assert tokens_of((await again.read()).result) == [next_token([1])]


async def test_refuses_a_stream_that_does_not_begin_with_attach():
    """Without an epoch there is no fence."""
    async with served() as stub:
        call = stub.Attach()
        await call.write(plan_message(pb.Plan(step=1)))

        assert (await refusal(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
