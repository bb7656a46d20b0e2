"""What an executor keeps when its stream breaks, and how the next attachment goes on with it."""

import asyncio

import grpc
import numpy as np
import pytest

from common.token_hashes import hash_tokens
from executor_svc.fake import next_token
from paceline.internal.v1 import executor_pb2 as pb
from tests.executor_svc.test_executor import POISON, PoisonedRunner, first_plan, start, tokens_of, u16, u32
from tests.executor_svc.test_service import attach, attach_and_look, attach_message, plan_message, refusal, served


def said(prompt, count):
    """What the fake model says after `prompt`."""
    known = list(prompt)
    for _ in range(count):
        known.append(next_token(known))
    return known[len(prompt) :]


def ids(data):
    return np.frombuffer(data, dtype="<u4").tolist()


async def begin(stub, step_count, *requests, **values):
    """An attachment that has run some steps."""
    call = await attach(stub, **values)
    epoch = values.get("epoch", 5)
    await call.write(plan_message(first_plan(*requests), epoch=epoch))
    await call.read()
    for step in range(2, step_count + 1):
        await call.write(plan_message(pb.Plan(step=step, sampling_row_count=len(requests)), epoch=epoch))
        await call.read()
    return call


async def test_a_broken_stream_is_resumed_where_it_was():
    """Neither the cache nor a token is lost with a line: the next attachment plans the next step."""
    async with served() as stub:
        (await begin(stub, 3, start(0, [1, 2], [5]))).cancel()
        call, attached = await attach_and_look(stub, resume=True)
        await call.write(
            plan_message(pb.Plan(step=4, appended_slots=u16(0), appended_block_ids=u32(2), sampling_row_count=1))
        )
        result = (await call.read()).result

    (held,) = attached.held
    assert attached.last_step == 3
    assert (held.slot, held.request_id, held.choice, held.epoch) == (0, "r0", 0, 5)
    assert ids(held.output_ids) == said([1, 2], 3)
    assert held.tokens_hash == hash_tokens(u32(1, 2), held.output_ids)
    assert (held.computed_count, held.state) == (4, pb.HELD_STATE_DECODING)
    assert [ids(table) for table in held.block_tables] == [[5]]
    assert tokens_of(result) == said([1, 2], 4)[-1:]


async def test_a_restarted_scheduler_resumes_and_the_dead_one_is_shut_out():
    """Its epoch is higher; whatever the old one still sends belongs to a life that is over."""
    async with served() as stub:
        old = await begin(stub, 2, start(0, [1], [0]))
        new, attached = await attach_and_look(stub, epoch=9, scheduler_id="t", resume=True)
        old_code, _ = await refusal(old)
        late = stub.Attach()
        await late.write(attach_message(epoch=5, resume=True))
        late_code, _ = await refusal(late)
        await new.write(plan_message(pb.Plan(step=3, sampling_row_count=1), epoch=9))

        assert tokens_of((await new.read()).result) == said([1], 3)[-1:]
        assert attached.held[0].epoch == 5
        assert (old_code, late_code) == (grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION)


async def test_the_step_that_runs_ends_and_the_plan_behind_it_is_dropped():
    """What has begun writes to the cache; it must be over before anybody is told what the cache holds."""
    async with served(step_us=100_000) as stub:
        call = await attach(stub)
        await call.write(plan_message(first_plan(start(0, [1], [0]))))
        await call.write(plan_message(pb.Plan(step=2, sampling_row_count=1)))
        await asyncio.sleep(0.03)
        call.cancel()
        await stub.service.detached.wait()
        _, attached = await attach_and_look(stub, resume=True)

    assert attached.last_step == 1
    assert ids(attached.held[0].output_ids) == said([1], 1)


async def test_what_was_dropped_is_told_until_it_is_acknowledged():
    """A request may end, and its slot be given away, before the scheduler has written its last tokens down."""
    async with served() as stub:
        call = await begin(stub, 2, start(0, [1], [0]))
        await call.write(plan_message(pb.Plan(step=3, dropped_slots=u16(0), acknowledged_step=1)))
        await call.read()
        call.cancel()
        call, unacknowledged = await attach_and_look(stub, resume=True)
        await call.write(plan_message(pb.Plan(step=4, acknowledged_step=3)))
        await call.read()
        call.cancel()
        _, acknowledged = await attach_and_look(stub, resume=True)

    (held,) = unacknowledged.held
    assert not held.HasField("slot")
    assert ids(held.output_ids) == said([1], 2)
    assert not acknowledged.held


async def test_a_slot_that_is_through_or_failed_is_told_as_halted():
    """Its end may not have arrived: the next scheduler must learn it, and must not plan for it."""
    async with served(runner=PoisonedRunner) as stub:
        call = await begin(stub, 1, start(0, [1], [0], max_output_count=1), start(1, [POISON], [1]))
        call.cancel()
        _, attached = await attach_and_look(stub, resume=True)

    through, failed = attached.held
    assert (through.state, failed.state) == (pb.HELD_STATE_HALTED, pb.HELD_STATE_HALTED)
    assert (ids(through.output_ids), ids(failed.output_ids)) == (said([1], 1), [])
    assert "request 'r1' failed: RuntimeError: no kernel for this token" in failed.error


async def test_nothing_is_kept_beyond_the_resume_window():
    """A scheduler that never comes back must not hold the cache of an executor that another one could use."""
    async with served(resume_window_s=0.05) as stub:
        (await begin(stub, 2, start(0, [1], [0]))).cancel()
        await stub.service.detached.wait()
        await asyncio.sleep(0.15)
        _, attached = await attach_and_look(stub, resume=True)

    assert (attached.last_step, len(attached.held)) == (0, 0)


async def test_an_attachment_in_time_stops_the_window():
    """The window is for silence; a resumed request may run for hours."""
    async with served(resume_window_s=0.1) as stub:
        (await begin(stub, 2, start(0, [1], [0]))).cancel()
        await stub.service.detached.wait()
        call, _ = await attach_and_look(stub, resume=True)
        await asyncio.sleep(0.2)
        await call.write(plan_message(pb.Plan(step=3, sampling_row_count=1)))

        assert tokens_of((await call.read()).result) == said([1], 3)[-1:]


async def test_a_plan_that_makes_no_sense_leaves_nothing_to_resume():
    """Half of it may have been taken in: whoever went on from there would compute nonsense."""
    async with served() as stub:
        call = await begin(stub, 2, start(0, [1], [0]))
        await call.write(plan_message(pb.Plan(step=3, dropped_slots=u16(0), paused_slots=u16(2))))
        code, _ = await refusal(call)
        _, attached = await attach_and_look(stub, resume=True)

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert (attached.last_step, len(attached.held)) == (0, 0)


async def test_an_executor_that_is_let_go_forgets_and_says_so():
    """After a drain the process ends; what it had is elsewhere."""
    async with served() as stub:
        call = await begin(stub, 1, start(0, [1], [0]))
        await call.write(pb.SchedulerMessage(epoch=5, incarnation=7, detach=pb.Detach()))
        assert await call.read() is grpc.aio.EOF
        async with asyncio.timeout(5):
            await stub.service.let_go.wait()
        await asyncio.sleep(0.05)
        _, attached = await attach_and_look(stub, resume=True)

    assert not attached.held


@pytest.mark.parametrize("announces", [True, False])
async def test_a_step_is_announced_before_it_runs_where_the_plan_asks_for_it(announces):
    """If the process dies in that step, the scheduler knows who was being computed."""
    async with served(step_us=50_000) as stub:
        call = await attach(stub)
        plan = first_plan(start(0, [1], [0]))
        plan.announces = announces
        await call.write(plan_message(plan))
        messages = [await call.read() for _ in range(1 + announces)]

    assert [message.WhichOneof("message") for message in messages] == ["started"] * announces + ["result"]
    assert all(message.started.step == 1 for message in messages[:-1])
