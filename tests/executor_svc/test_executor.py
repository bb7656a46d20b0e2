"""The executor's side of the step stream, plan by plan, on the fake model."""

from weakref import WeakSet

import numpy as np
import pytest

from executor_svc.batch import StepBatch, StepOutput
from executor_svc.config import ExecutorConfig
from executor_svc.executor import BrokenDeviceError, Executor, PlanError
from executor_svc.fake import FakeRunner, next_token
from paceline.internal.v1 import executor_pb2 as pb

POISON = 66


class Activations:
    """What a step takes of the memory until nobody refers to it."""


class StarvedRunner(FakeRunner):
    """Has no memory for more than `limit` tokens in a step, as torch says it."""

    limit = 3

    def __init__(self, config: ExecutorConfig) -> None:
        super().__init__(config)
        self.taken: WeakSet[Activations] = WeakSet()
        self.most_taken = 0

    def run(self, batch: StepBatch) -> StepOutput:
        activations = Activations()
        self.taken.add(activations)
        self.most_taken = max(self.most_taken, len(self.taken))
        if len(batch.token_ids) > self.limit:
            raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().run(batch)


class PoisonedRunner(FakeRunner):
    """Fails whenever one token is among those that a step computes; can lose its device altogether."""

    device_works = True

    def run(self, batch: StepBatch) -> StepOutput:
        if POISON in batch.token_ids or not self.device_works:
            raise RuntimeError("no kernel for this token")
        return super().run(batch)

    def check_device(self) -> None:
        if not self.device_works:
            raise RuntimeError("device lost")


@pytest.fixture
def runner():
    return PoisonedRunner(
        ExecutorConfig(model="fake", block_size=4, fake_block_count=8, max_num_seqs=4, fake_step_us=0, fake_token_us=0)
    )


@pytest.fixture
def executor(runner):
    return Executor(runner)


def u16(*values):
    return np.array(values, dtype="<u2").tobytes()


def u32(*values):
    return np.array(values, dtype="<u4").tobytes()


def start(slot, tokens, blocks, *, max_output_count=10, stops=()):
    return pb.NewRequest(
        slot=slot,
        request_id=f"r{slot}",
        token_ids=u32(*tokens),
        block_tables=[u32(*blocks)],
        sampling=pb.Sampling(top_p=1),
        stop_token_ids=u32(*stops),
        max_output_count=max_output_count,
    )


def first_plan(*requests):
    """All of the requests' tokens in one step."""
    return pb.Plan(
        step=1,
        new_requests=requests,
        chunk_slots=u16(*(request.slot for request in requests)),
        chunk_token_counts=u32(*(len(request.token_ids) // 4 for request in requests)),
        sampling_row_count=len(requests),
    )


def tokens_of(result):
    return np.frombuffer(result.token_ids, dtype="<i4").tolist()


def test_decodes_without_being_told_again(executor):
    """A request that goes on decoding costs nothing on the wire: an empty plan computes its next token."""
    first = tokens_of(executor.execute(first_plan(start(1, [1, 2], [3]))))
    second = tokens_of(executor.execute(pb.Plan(step=2, sampling_row_count=1)))

    assert first == [next_token([1, 2])]
    assert second == [next_token([1, 2, *first])]


def test_answers_in_the_order_of_slots(executor):
    """The scheduler reads owners from its plan, by ascending slot, whatever order the plan names them in."""
    result = executor.execute(first_plan(start(2, [7], [0]), start(0, [8], [1])))

    assert tokens_of(result) == [next_token([8]), next_token([7])]


def test_stops_a_row_by_itself_and_says_so_with_minus_one(executor):
    """The surplus step of a pipelined plan must not do work for a request that has ended."""
    executor.execute(first_plan(start(0, [1], [0], max_output_count=1), start(1, [2], [1])))
    result = executor.execute(pb.Plan(step=2, sampling_row_count=2))

    assert tokens_of(result)[0] == -1
    assert tokens_of(result)[1] >= 0


def test_a_stop_token_halts_a_row(executor):
    """The executor knows the stop ids, so that a finished request does not cost a step until the scheduler reacts."""
    said = next_token([1])
    first = executor.execute(first_plan(start(0, [1], [0], stops=[said])))
    second = executor.execute(pb.Plan(step=2, sampling_row_count=1))

    assert (tokens_of(first), tokens_of(second)) == ([said], [-1])


def test_a_paused_slot_computes_nothing(executor):
    """At its length limit a request stays until its last result is in; it must not run on meanwhile."""
    executor.execute(first_plan(start(0, [1], [0]), start(1, [2], [1])))
    result = executor.execute(pb.Plan(step=2, paused_slots=u16(0), sampling_row_count=1))

    assert len(tokens_of(result)) == 1


def test_a_failing_row_fails_alone(executor):
    """One request that breaks the model must not take its batch along."""
    result = executor.execute(first_plan(start(0, [1], [0]), start(1, [POISON], [1]), start(2, [3], [2])))

    assert tokens_of(result) == [next_token([1]), -1, next_token([3])]
    assert [(error.slot, error.message) for error in result.errors] == [
        (1, "request 'r1' failed: RuntimeError: no kernel for this token")
    ]


def test_the_plan_already_queued_skips_a_failed_row(executor):
    """Plan N+1 was made before the failure of N was known; it must not fail again, nor shift the others' tokens."""
    executor.execute(first_plan(start(0, [1], [0]), start(1, [POISON], [1])))
    result = executor.execute(pb.Plan(step=2, sampling_row_count=2))

    assert tokens_of(result) == [next_token([1, next_token([1])]), -1]
    assert not result.errors


def test_a_request_that_fails_on_its_own_leaves_the_process_alive(executor):
    """A step with a single, failing row looks like a dead device; the device check tells them apart."""
    result = executor.execute(first_plan(start(0, [POISON], [0])))

    assert [error.slot for error in result.errors] == [0]


def test_a_dead_device_ends_the_process_instead_of_failing_requests(executor, runner):
    """Requests on a broken device are not at fault: they must be planned again elsewhere, not answered with errors."""
    runner.device_works = False

    with pytest.raises(BrokenDeviceError, match="device lost"):
        executor.execute(first_plan(start(0, [1], [0]), start(1, [2], [1])))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (pb.Plan(step=2), "plan of step 2, but step 1 is next"),
        (pb.Plan(step=1, dropped_slots=u16(3)), "slot 3 is dropped but is empty"),
        (pb.Plan(step=1, dropped_slots=u16(4)), "slot 4 is dropped, but there are 4"),
        (pb.Plan(step=1, paused_slots=u16(0)), "slot 0 is paused but is empty"),
        (pb.Plan(step=1, new_requests=[start(0, [1], [8])]), r"blocks \[8\] are given away, but there are 8"),
        (pb.Plan(step=1, new_requests=[start(0, [1], [0])] * 2), "slot 0 is started but is taken"),
        (pb.Plan(step=1, sampling_row_count=1), "samples 1 rows by the scheduler's count, 0 by the executor's"),
        (first_plan(start(0, [1, 2, 3, 4, 5], [0])), "slot 0 computes up to token 5 but has 1 blocks"),
        (pb.Plan(step=1, chunk_slots=u16(1), chunk_token_counts=u32(1)), "slot 1 is given a chunk but is empty"),
        (pb.Plan(step=1, chunk_slots=u16(9), chunk_token_counts=u32(1)), "slot 9 is given a chunk, but there are 4"),
        (pb.Plan(step=1, dropped_slots=b"x"), "a field of 1 bytes is not a whole number of 2-byte integers"),
        (pb.Plan(step=1, new_requests=[start(0, [257], [0])]), "up to 257, 0 of them computed.* ends at 256"),
        (pb.Plan(step=1, new_requests=[start(0, [], [0])]), "slot 0 starts with 0 tokens"),
        (pb.Plan(step=1, new_requests=[start(0, [1], [0])], appended_slots=u16(0)), "0 blocks are given to 1 slots"),
    ],
)
def test_refuses_a_plan_that_contradicts_what_it_knows(executor, plan, message):
    """Going on with two different ideas of the slots would give users wrong tokens; a bug must end the attachment."""
    with pytest.raises(PlanError, match=message):
        executor.execute(plan)


def test_a_step_that_lacks_memory_runs_in_smaller_parts():
    """Out of memory is no reason to die, nor to fail anybody whom a smaller step can serve."""
    config = ExecutorConfig(model="fake", block_size=4, fake_block_count=8, max_num_seqs=4, fake_step_us=0)
    executor = Executor(StarvedRunner(config))
    result = executor.execute(first_plan(start(0, [1, 2], [0]), start(1, [3, 4], [1]), start(2, [5, 6, 7, 8], [2])))

    assert tokens_of(result) == [next_token([1, 2]), next_token([3, 4]), -1]
    assert [(error.slot, error.out_of_memory) for error in result.errors] == [(2, True)]


def test_a_step_that_failed_holds_no_memory_while_its_halves_run():
    """The traceback of its error refers to all that it had computed: halves would find as little room as it did."""
    config = ExecutorConfig(model="fake", block_size=4, fake_block_count=8, max_num_seqs=4, fake_step_us=0)
    runner = StarvedRunner(config)
    Executor(runner).execute(first_plan(start(0, [1, 2], [0]), start(1, [3, 4], [1]), start(2, [5, 6, 7, 8], [2])))

    assert runner.most_taken == 1
