"""Steps that are begun before the one before them has ended: the device never waits for its host."""

import gc
import queue
import threading
import time
import weakref

import pytest

from executor_svc.config import ExecutorConfig
from executor_svc.executor import BrokenDeviceError, Executor, PlanError
from executor_svc.fake import next_token
from executor_svc.model_thread import Attachment, ModelThread
from executor_svc.native.model import NativeDecoder
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc.core.layer_groups import LayerGroup
from tests.executor_svc.conftest import load_folder, needs_compiler
from tests.executor_svc.test_executor import first_plan, start, tokens_of, u16, u32
from tests.scheduler_svc.core.fleet import AheadRunner, Fleet, capacity, executor_groups, make_request


class GatedRunner(AheadRunner):
    """A device that ends no step before it may."""

    def __init__(self, group=None):
        config = ExecutorConfig(
            model="fake", fake_block_count=12, max_num_seqs=4, max_model_len=64, fake_step_us=0, fake_token_us=0
        )
        super().__init__(config, executor_groups((group or LayerGroup(4),)))
        self.may_end = threading.Event()
        self.launch_count = 0

    def launch(self, batch):
        step = super().launch(batch)
        self.launch_count += 1
        return step

    def compute(self, batch):
        assert self.may_end.wait(60)
        return super().compute(batch)


class Calls:
    """Stands in for an event loop."""

    def call_soon_threadsafe(self, callback, *arguments):
        callback(*arguments)


@pytest.fixture
def runner():
    return GatedRunner()


class BrokenMetrics:
    """Cannot count."""

    def note_step(self, plan, result):
        raise OverflowError("too much")


@pytest.fixture
def thread(runner, request):
    thread = ModelThread(Executor(runner), Calls(), getattr(request, "param", None))
    yield thread
    runner.may_end.set()
    thread.stop()
    assert thread.join(60)


def attach(thread, **values):
    attachment = Attachment(1, "s", outcomes=queue.SimpleQueue(), **values)
    thread.begin(attachment)
    return attachment


def until_true(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def decode(step, count=1, **changes):
    return pb.Plan(step=step, sampling_row_count=count, **changes)


def test_the_device_has_the_next_step_before_the_last_has_ended(runner, thread):
    """Between two steps it would wait for as long as the host takes to look at the one and prepare the other."""
    attachment = attach(thread, resume=False)
    attachment.outcomes.get(timeout=60)
    thread.submit(attachment, first_plan(start(0, [1, 2], [3, 4])))
    thread.submit(attachment, decode(2))
    until_true(lambda: runner.launch_count == 2)
    assert attachment.outcomes.empty()

    runner.may_end.set()
    first, second = (attachment.outcomes.get(timeout=60) for _ in range(2))

    assert tokens_of(first) == [next_token([1, 2])]
    assert tokens_of(second) == [next_token([1, 2, *tokens_of(first)])]


def test_who_takes_over_finds_the_steps_that_were_on_their_way(runner, thread):
    """A scheduler that comes back is owed every token that was computed, those of both steps too."""
    attachment = attach(thread, resume=False)
    attachment.outcomes.get(timeout=60)
    thread.submit(attachment, first_plan(start(0, [1, 2], [3, 4])))
    thread.submit(attachment, decode(2))
    until_true(lambda: runner.launch_count == 2)
    attachment.over = True
    successor = attach(thread, resume=True)
    runner.may_end.set()

    attached = successor.outcomes.get(timeout=60)

    first = next_token([1, 2])
    assert attached.last_step == 2
    assert attached.held[0].output_ids == u32(first, next_token([1, 2, first]))
    assert attached.held[0].computed_count == 3


@pytest.mark.parametrize("thread", [BrokenMetrics()], indirect=True)
def test_what_cannot_be_counted_is_told_all_the_same(runner, thread):
    """A mistake in what only watches must not end what it watches."""
    runner.may_end.set()
    attachment = attach(thread, resume=False)
    thread.submit(attachment, first_plan(start(0, [1, 2], [3, 4])))
    for step in (2, 3, 4):
        thread.submit(attachment, decode(step))

    attachment.outcomes.get(timeout=60)
    assert [attachment.outcomes.get(timeout=60).step for _ in range(4)] == [1, 2, 3, 4]


def test_a_plan_that_makes_no_sense_is_refused_after_the_step_on_its_way(runner, thread):
    """The scheduler has to hear of it; what was computed before is still owed to it."""
    attachment = attach(thread, resume=False)
    attachment.outcomes.get(timeout=60)
    thread.submit(attachment, first_plan(start(0, [1, 2], [3, 4])))
    thread.submit(attachment, decode(2, dropped_slots=b"\x00"))
    until_true(lambda: runner.launch_count == 1)
    runner.may_end.set()

    result, refusal = (attachment.outcomes.get(timeout=60) for _ in range(2))

    assert tokens_of(result) == [next_token([1, 2])]
    assert isinstance(refusal, PlanError)
    successor = attach(thread, resume=False)
    assert successor.outcomes.get(timeout=60).last_step == 0


def test_nothing_goes_on_from_a_step_that_broke_the_device(runner, monkeypatch):
    """Its tokens never came: a step that went on from them would read whatever lies there."""
    runner.may_end.set()
    executor = Executor(runner)
    first = executor.begin(first_plan(start(0, [1], [0, 1]), start(1, [2], [2, 3])))
    runner.broken_slot = 0
    monkeypatch.setattr(runner, "check_device", lambda: 1 / 0)

    with pytest.raises(BrokenDeviceError):
        executor.finish(first)
    with pytest.raises(PlanError):
        executor.begin(decode(2, 2))


def test_a_row_that_ended_meanwhile_was_computed_in_vain(runner):
    """What a device did before it could know better must not reach anybody, nor be counted."""
    runner.may_end.set()
    said = next_token([1])
    requests = [start(0, [1], [0, 1], stops=[said]), start(1, [2], [2, 3])]
    ahead, by_step = Executor(runner), Executor(GatedRunner())
    by_step._runner.may_end.set()

    first = ahead.begin(first_plan(*requests))
    second = ahead.begin(decode(2, 2))
    results = [ahead.finish(first), ahead.finish(second)]

    assert [tokens_of(result) for result in results] == [
        tokens_of(by_step.execute(plan)) for plan in (first_plan(*requests), decode(2, 2))
    ]
    assert tokens_of(results[1])[0] == -1
    assert ahead.inventory() == by_step.inventory()


def test_a_slot_whose_request_ended_is_given_away_while_a_step_still_computes_it(runner):
    """Whenever a request ends the device would else wait for its host, with all other requests."""
    runner.may_end.set()
    said, block_ids = next_token([1]), [0, 1]
    plans = [
        first_plan(start(0, [1], block_ids, stops=[said]), start(1, [2], [2, 3])),
        decode(2, 2),
        decode(
            3,
            2,
            dropped_slots=u16(0),
            new_requests=[start(0, [9], block_ids)],
            chunk_slots=u16(0),
            chunk_token_counts=u32(1),
        ),
        decode(4, 2),
    ]
    ahead, by_step = Executor(runner), Executor(GatedRunner())
    by_step._runner.may_end.set()

    begun = [ahead.begin(plan) for plan in plans[:2]]
    results = [ahead.finish(begun[0])]
    assert not ahead.has_to_wait(plans[2])
    begun.append(ahead.begin(plans[2]))
    results.append(ahead.finish(begun[1]))
    begun.append(ahead.begin(plans[3]))
    results += [ahead.finish(step) for step in begun[2:]]

    assert [tokens_of(result) for result in results] == [tokens_of(by_step.execute(plan)) for plan in plans]
    assert tokens_of(results[1])[0] == -1
    assert tokens_of(results[2])[0] == next_token([9])
    assert ahead.inventory() == by_step.inventory()


def test_the_step_after_one_that_failed_is_run_again(runner):
    """It went on from a token that was wrong; the rows that did not fail must not notice."""
    runner.may_end.set()
    executor = Executor(runner)
    first = executor.begin(first_plan(start(0, [1], [0, 1]), start(1, [2], [2, 3])))
    runner.broken_slot = 0
    second = executor.begin(decode(2, 2))

    results = [executor.finish(first), executor.finish(second)]

    said = next_token([2])
    assert [tokens_of(result) for result in results] == [[-1, said], [-1, next_token([2, said])]]
    assert [error.slot for error in results[0].errors] == [0]


@pytest.mark.parametrize(
    ("plan", "waits"),
    [
        (decode(2, 2), False),
        (decode(2, 1, skipped_slots=u16(0)), False),
        (decode(2, 1, dropped_slots=u16(0)), True),
        (decode(2, 2, copies=u32(0, 7)), True),
    ],
)
def test_what_touches_a_step_on_its_way_waits_for_it(runner, plan, waits):
    """A dropped request's last tokens would be lost, and a copied block may be written to at that moment."""
    runner.may_end.set()
    executor = Executor(runner)
    first = executor.begin(first_plan(start(0, [1], [0, 1]), start(1, [2], [2, 3])))

    assert executor.has_to_wait(plan) == waits
    executor.finish(first)
    assert not executor.has_to_wait(plan)


@pytest.mark.parametrize(("block", "waits"), [(0, False), (3, True), (5, False), (9, False)])
def test_a_block_that_a_step_on_its_way_may_read_again_is_not_written_yet(block, waits):
    """Behind a window blocks go to others at once; a row that fails is run again, and reads what it read before."""
    runner = GatedRunner(LayerGroup(2, window=3))
    runner.may_end.set()
    executor = Executor(runner)
    first = executor.begin(first_plan(start(0, [1, 2, 3, 4], [3, 4, 6]), start(1, [2], [7])))
    plan = decode(2, 2, appended_slots=u16(1), appended_block_ids=u32(block))

    assert executor.has_to_wait(plan) == waits
    executor.finish(first)


def test_draws_are_waited_for(runner):
    """They are made on the host: a device does not have such a token."""
    runner.may_end.set()
    drawing = start(0, [1], [0, 1])
    drawing.sampling.temperature = 1.0
    executor = Executor(runner)
    executor.begin(first_plan(drawing))

    assert executor.has_to_wait(decode(2))


def test_the_fleet_of_the_scheduler_tests_works_ahead():
    """Their scenarios and properties are to hold for steps on their way; they say nothing if there never is one."""
    fleet = Fleet()
    fleet.join("e", capacity(4, 12, 4, 8))
    fleet.add(make_request("r", [1, 2], 6))
    while fleet.alive:
        fleet.plan("e")
        fleet.plan("e")
        fleet.run("e")

    assert fleet.begun_ahead_count >= 4
    fleet.assert_tokens()


@needs_compiler
def test_a_decoder_that_nobody_has_is_gone_at_once(serving_folder):
    """Its weights are most of what a process has: where its steps failed the self-test, torch needs the memory."""
    gc.disable()
    try:
        decoder = load_folder(serving_folder("llama"))._model
        assert isinstance(decoder, NativeDecoder)
        is_there = weakref.ref(decoder)
        del decoder
        assert is_there() is None
    finally:
        gc.enable()


@needs_compiler
def test_a_step_that_nobody_waits_for_ends_before_its_memory_goes(serving_folder):
    """C++ still writes to it; and whoever ends the threads must not wait for ever."""
    executor = Executor(load_folder(serving_folder("llama"), threads=3))
    executor.begin(first_plan(start(0, [1, 2, 3], [1, 2])))
    del executor
    gc.collect()


@needs_compiler
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_steps_in_cpp_find_the_tokens_of_the_step_before(load_runner, architecture):
    """Parity is proven for steps one by one; ahead they must say the same."""
    runner = load_runner(architecture, block_size=16)
    assert runner.info.mode == "native"
    groups = len(runner.info.layer_groups)
    said = []
    for is_ahead in (False, True):
        executor = Executor(runner)
        requests = [start(0, [5, 6, 7], [1, 2]), start(1, [9], [3, 4])]
        for request, blocks in zip(requests, ([[1, 2], [5, 6]], [[3, 4], [7, 8]]), strict=True):
            del request.block_tables[:]
            request.block_tables.extend(u32(*table) for table in blocks[:groups])
        plans = [first_plan(*requests), *(decode(step, 2) for step in range(2, 9))]
        said.append(all_ahead(executor, plans) if is_ahead else [tokens_of(executor.execute(plan)) for plan in plans])

    assert said[0] == said[1]


def all_ahead(executor, plans):
    """The tokens of all plans, each begun before the one before is finished."""
    begun, tokens = executor.begin(plans[0]), []
    for plan in plans[1:]:
        assert not executor.has_to_wait(plan)
        following = executor.begin(plan)
        tokens.append(tokens_of(executor.finish(begun)))
        begun = following
    return [*tokens, tokens_of(executor.finish(begun))]
