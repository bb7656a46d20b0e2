"""A whole fleet in one thread: the scheduler core, the real step messages, and executors with the fake model."""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest

from executor_svc import batch as executor_batch
from executor_svc.config import ExecutorConfig
from executor_svc.executor import Begun, Executor, PlanError
from executor_svc.fake import FakeRunner, _mix, next_token
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc import wire
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, Outputs, ProtocolError, Result
from scheduler_svc.core.request import FinishReason, Request, RequestState, Sampling, with_choices
from scheduler_svc.core.scheduler import Scheduler


def capacity(block_size: int, block_count: int, slot_count: int, step_token_count: int) -> Capacity:
    """A model whose layers all see everything."""
    return Capacity((LayerGroup(block_size),), block_count, slot_count, step_token_count)


def executor_groups(groups: tuple[LayerGroup, ...]) -> tuple[executor_batch.LayerGroup, ...]:
    """The layer groups of a capacity, as the executor has them."""
    return tuple(executor_batch.LayerGroup(group.block_size, group.window, group.chunk) for group in groups)


class CheckingRunner(FakeRunner):
    """A fake model that looks at everything a row sees, whether it samples or not.

    Beside the tokens it keeps where each belongs: layer group, position, and a sum over all tokens up to it. So a block
    that was given away too early, never written, or taken from another beginning is found when it is read.
    """

    def __init__(self, config, layer_groups):
        super().__init__(config, layer_groups)
        self._places = np.full((*self._cache.shape, 2), -1, dtype=np.int64)  # (layer group, position)
        self._sums = np.zeros(self._cache.shape, dtype=np.uint64)
        self.broken_slot = None  # its row fails once, after it has written something

    def run(self, batch):
        start = 0
        poisoned = False
        for row, count in enumerate(batch.query_lengths.tolist()):
            token_ids = batch.token_ids[start : start + count]
            start += count
            poisoned |= self._take_in(batch, row, token_ids)
        if poisoned:
            if self.broken_slot in batch.slots and len(batch.slots) == 1:
                self.broken_slot = None  # the row was found
            raise ValueError("a row is broken")
        return super().run(batch)

    def copy_blocks(self, sources, destinations):
        super().copy_blocks(sources, destinations)
        self._places[destinations] = self._places[sources]
        self._sums[destinations] = self._sums[sources]

    def _take_in(self, batch, row, token_ids):
        end = int(batch.context_lengths[row])
        start = end - len(token_ids)
        before = {self._sum_before(batch, row, number, start) for number in range(len(batch.block_tables))}
        assert len(before) == 1, "layer groups hold different beginnings"
        positions = np.arange(start, end)
        sums = np.uint64(before.pop()) + np.cumsum(_terms(token_ids, positions), dtype=np.uint64)
        garbage = batch.slots[row] == self.broken_slot
        for number, (group, tables) in enumerate(zip(self.info.layer_groups, batch.block_tables, strict=True)):
            blocks, offsets = tables[row, positions // group.block_size], positions % group.block_size
            assert (blocks >= 0).all(), "a token is written to no block"
            self._places[blocks, offsets] = -7 if garbage else np.stack([np.full(len(blocks), number), positions], 1)
            self._sums[blocks, offsets] = sums
        return garbage

    def _sum_before(self, batch, row, number, start):
        """The sum over all tokens before `start`, after looking at those that are seen from there."""
        group = self.info.layer_groups[number]
        first = int(group.first_seen(np.array([start]))[0])
        if start == 0:
            return 0
        first = min(first, start - 1)
        positions = np.arange(first, start)
        if group.chunk and start % group.chunk == 0:
            return self._any_sum(batch, row, start)
        blocks, offsets = batch.block_tables[number][row, positions // group.block_size], positions % group.block_size
        places = self._places[blocks, offsets]
        if group.window == 1:
            return self._any_sum(batch, row, start)
        assert (places == np.stack([np.full(len(positions), number), positions], 1)).all(), (
            "a block holds something else"
        )
        sums = self._sums[blocks, offsets]
        tokens = self._cache[blocks, offsets] - (number << 16)
        assert (np.diff(sums) == _terms(tokens[1:], positions[1:])).all(), "a token is not what it was computed from"
        return int(sums[-1])

    def _any_sum(self, batch, row, start):
        """Nothing is seen in this layer group: take the word of another, if there is one."""
        for number, group in enumerate(self.info.layer_groups):
            if not group.chunk and group.window != 1:
                return self._sum_before(batch, row, number, start)
        raise AssertionError("no layer group to take the sum from")


class AheadRunner(CheckingRunner):
    """A device that works by itself, as slowly as can be: a step runs when it, or a later one, is waited for."""

    _last = None  # launched

    def launch(self, batch):
        self._last = LaunchedStep(self, batch, self._last)
        return self._last

    def run(self, batch):
        if self._last is not None:
            self._last.wait()
        return self.compute(batch)

    def compute(self, batch):
        return super().run(batch)


class LaunchedStep:
    def __init__(self, runner, batch, before):
        self.keeps_tokens = not (batch.sampling.temperature > 0).any()
        self._runner, self._batch, self._before = runner, batch, before
        self._output = self.error = None

    def wait(self):
        if self._batch is None:
            return
        is_garbage = False
        if self._before is not None:
            self._before.wait()
            self._batch = self._batch.known(self._before.token_ids)
            is_garbage = self._before.error is not None
        self.token_ids = np.full(len(self._batch.sampling), 7)  # what a step that fails leaves behind
        try:
            self._output = self._runner.compute(self._batch)
            self.token_ids = self._output.token_ids
        except ValueError as error:
            self.error = error
        except AssertionError as error:
            if not is_garbage:
                raise
            self.error = error
        self._batch = self._before = None

    def result(self):
        self.wait()
        if self.error is not None:
            raise self.error
        return self._output


def _terms(token_ids, positions):
    return _mix(token_ids.astype(np.uint64) + (positions.astype(np.uint64) << np.uint64(20)))


def fake_executor(capacity: Capacity) -> Executor:
    """An executor with the fake model, which takes no time."""
    config = ExecutorConfig(
        model="fake",
        fake_block_count=capacity.block_count,
        max_num_seqs=capacity.slot_count,
        max_num_batched_tokens=capacity.step_token_count,
        max_model_len=512,
        fake_step_us=0,
        fake_token_us=0,
    )
    return Executor(AheadRunner(config, executor_groups(capacity.layer_groups)))


class Fleet:
    """Drives a scheduler and its executors event by event; every message crosses the wire format.

    A step takes `step_s` seconds and `token_s` for each token, by the executors' own account. An executor has begun the
    plan after it, if there is one and that can be, before it finishes a step.
    """

    def __init__(self, policy=None, *, reuse: bool = True, step_s: float = 0.1, token_s: float = 0.05) -> None:
        self.scheduler = Scheduler(policy, reuse=reuse)
        self.requests: list[Request] = []  # each choice by itself
        self.tokens: dict[Request, list[int]] = {}  # what each request's user received
        self.computed_count = 0  # tokens that executors computed
        self.begun_ahead_count = 0  # steps that were begun before the one before had ended
        self.durable_counts: dict[Request, int] = {}  # tokens of each request that are written down
        self.absent: dict[str, tuple[Executor, Capacity]] = {}  # alive, and not attached
        self._acknowledged: dict[str, int] = {}
        self._last: dict[str, tuple[bytes, Result]] = {}  # plan and result that each executor has seen last
        self._executors: dict[str, Executor] = {}
        self._plans: dict[str, deque[tuple[bytes, int]]] = {}  # sent and not run, each with its tokens
        self._begun: dict[str, Begun] = {}  # by executor: the step of the oldest plan that was not run
        self._step_s, self._token_s = step_s, token_s

    def join(self, executor_id: str, capacity: Capacity) -> None:
        self.scheduler.join(executor_id, capacity)
        self._executors[executor_id] = fake_executor(capacity)
        self._plans[executor_id] = deque()

    def cut(self, executor_id: str, run_count: int, *, may_return: bool) -> list[Request]:
        """Let the stream break: of the plans on their way `run_count` arrived and ran, and all results are lost."""
        for _ in range(min(len(self._plans[executor_id]), run_count)):
            self._execute(executor_id)
        while executor_id in self._begun:
            self._execute(executor_id)
        executor, _ = self._executors.pop(executor_id), self._plans.pop(executor_id)
        self.absent[executor_id] = executor, self.scheduler.executors[executor_id].capacity
        return self.scheduler.lose(executor_id, may_return=may_return)

    def come_back(self, executor_id: str) -> Outputs:
        """Attach an executor again, with what it still has."""
        executor, capacity = self.absent.pop(executor_id)
        message = pb.Attached.FromString(executor.inventory().SerializeToString())
        outputs = self.scheduler.resume(executor_id, capacity, wire.decode_inventory(message, self.find))
        self._executors[executor_id], self._plans[executor_id] = executor, deque()
        self._acknowledged.pop(executor_id, None)
        self._receive(outputs)
        return outputs

    def vanish(self, executor_id: str) -> None:
        """Let an absent executor be gone for good."""
        del self.absent[executor_id]
        self.scheduler.give_up(executor_id)

    def find(self, request_id: str, choice: int) -> Request | None:
        request = self.scheduler.get(request_id)
        return request and request.family[choice]

    def commit(self) -> None:
        """Write down everything up to now, and tell the executors with their next plans."""
        self.durable_counts = {request: len(tokens) for request, tokens in self.tokens.items()}
        self._acknowledged = {
            name: executor.in_flight[0].step - 1 if executor.in_flight else executor.step
            for name, executor in self.scheduler.executors.items()
        }

    def restart(self, scheduler: Scheduler, run_counts: Sequence[int]) -> dict[Request, Request]:
        """Let the scheduler be killed and another one take over what was written down; returns new by old requests.

        Of the plans on their way to each executor as many as `run_counts` say arrived and ran.
        """
        owners = {r: r.executor.executor_id if r.executor else r.awaits for r in self.alive}
        for executor_id, run_count in zip(list(self._executors), cycle(run_counts), strict=False):
            self.cut(executor_id, run_count, may_return=True)
        for capacity in self.scheduler._capacities:
            scheduler.expect(capacity)
        self.scheduler = scheduler
        successors: dict[Request, Request] = {}
        for first in [request for request in self.requests if request.choice == 0 and not request.has_ended]:
            successors |= self._successors(first)
            new = successors[first]
            self.scheduler.restore(new, [owners.get(choice, "") for choice in first.family])
        self.requests = [successors.get(request, request) for request in self.requests]
        self.tokens = {
            successors.get(request, request): tokens
            if request.state is RequestState.FINISHED
            else tokens[: self.durable_counts.get(request, 0)]
            for request, tokens in self.tokens.items()
        }
        self.durable_counts = {successors.get(r, r): count for r, count in self.durable_counts.items()}
        return successors

    def _successors(self, first: Request) -> dict[Request, Request]:
        """The choices of a request as they were written down."""
        new = with_choices(_unplaced(first), len(first.family))
        for old, choice in zip(first.family, new.family, strict=True):
            kept = (
                self.tokens[old]
                if old.state is RequestState.FINISHED
                else (self.tokens[old][: self.durable_counts.get(old, 0)])
            )
            if kept:
                choice.token_ids = first.token_ids[: first.prompt_count] + array("I", kept)
            if old.state is RequestState.FINISHED:
                choice.state, choice.finish_reason, choice.error = old.state, old.finish_reason, old.error
        return dict(zip(first.family, new.family, strict=True))

    def _receive(self, outputs: Outputs) -> None:
        for request, token in outputs.tokens:
            self.tokens[request].append(token)

    def lose(self, executor_id: str) -> list[Request]:
        del self._executors[executor_id], self._plans[executor_id]
        self._begun.pop(executor_id, None)
        return self.scheduler.lose(executor_id)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        for choice in request.family:
            self.requests.append(choice)
            self.tokens[choice] = []

    def plan(self, executor_id: str, now: float = 0.0):
        plan = self.scheduler.plan(executor_id, now)
        if plan is not None:
            message = wire.encode_plan(plan, self._acknowledged.get(executor_id, 0))
            self._plans[executor_id].append((message.SerializeToString(), plan.token_count))
        return plan

    def break_row(self, executor_id: str, slot: int) -> None:
        """Let whoever computes in that slot next make the step fail."""
        self._executors[executor_id]._runner.broken_slot = slot

    def has_plan(self, executor_id: str) -> bool:
        return bool(self._plans[executor_id])

    def run(self, executor_id: str) -> Outputs:
        """Let the executor run its oldest plan, and apply the result."""
        data, token_count = self._plans[executor_id][0]
        result = wire.decode_result(pb.StepResult.FromString(self._execute(executor_id)))
        result = replace(result, seconds=self._step_s + self._token_s * token_count)
        outputs = self.scheduler.apply(executor_id, result)
        self._last[executor_id] = data, result
        self._receive(outputs)
        return outputs

    def _execute(self, executor_id: str) -> bytes:
        """Let an executor run its oldest plan, and begin the next one if that can be; returns the result."""
        executor, plans = self._executors[executor_id], self._plans[executor_id]
        data, token_count = plans.popleft()
        begun = self._begun.pop(executor_id, None) or executor.begin(pb.Plan.FromString(data))
        if plans and not executor.has_to_wait(following := pb.Plan.FromString(plans[0][0])):
            self._begun[executor_id] = executor.begin(following)
            self.begun_ahead_count += 1
        self.computed_count += token_count
        return executor.finish(begun).SerializeToString()

    def repeat(self, executor_id: str) -> None:
        """Let a plan that was run, and a result that was applied, arrive again: both sides refuse them."""
        if executor_id not in self._last or executor_id not in self._executors:
            return
        data, result = self._last[executor_id]
        executor = self._executors[executor_id]
        before = executor.inventory()
        with pytest.raises(PlanError):
            executor.execute(pb.Plan.FromString(data))
        assert executor.inventory() == before
        with pytest.raises(ProtocolError):
            self.scheduler.apply(executor_id, result)

    def swap(self, executor_id: str) -> None:
        """Let two plans on their way arrive the wrong way round: the later one is refused, as if it had not come."""
        if len(self._plans[executor_id]) < 2 or executor_id in self._begun:
            return
        executor = self._executors[executor_id]
        before = executor.inventory()
        with pytest.raises(PlanError):
            executor.execute(pb.Plan.FromString(self._plans[executor_id][1][0]))
        assert executor.inventory() == before

    def run_all(self, step_limit: int = 10_000) -> int:
        """Plan and run until nothing is left that could run; returns the number of rounds."""
        for round_count in range(step_limit):
            planned = [self.plan(executor_id) for executor_id in self._executors]
            runnable = [executor_id for executor_id in self._executors if self._plans[executor_id]]
            if not runnable and not any(planned):
                return round_count
            for executor_id in runnable:
                self.run(executor_id)
        raise AssertionError(f"not done after {step_limit} steps: the scheduler makes no progress")

    @property
    def alive(self) -> list[Request]:
        return [request for request in self.requests if request.state is not RequestState.FINISHED]

    def assert_nothing_is_left(self) -> None:
        """Every request has ended, and everything is free again."""
        self.scheduler.check_invariants()
        assert self.scheduler.request_count == 0
        for executor in self.scheduler.executors.values():
            assert executor.cache.pool.free_count == executor.capacity.block_count
            assert executor.slots.free_count == executor.capacity.slot_count
            assert executor.promised_count == executor.backlog_count == 0

    def assert_tokens(self, layer_groups: tuple[LayerGroup, ...] = (LayerGroup(1),)) -> None:
        """Every user has received what the model says, or a beginning of it."""
        for request, received in self.tokens.items():
            assert received == expected_tokens(request, layer_groups)[: len(received)]


def make_request(
    request_id: str,
    prompt: list[int],
    max_output_count: int,
    *,
    seed: int | None = None,
    choices: int = 1,
    **fields,
) -> Request:
    """A request as the edge would make it."""
    return with_choices(
        Request(
            request_id=request_id,
            token_ids=array("I", prompt),
            prompt_count=len(prompt),
            max_output_count=max_output_count,
            sampling=Sampling(temperature=0.0 if seed is None else 1.0, seed=seed or 0),
            **fields,
        ),
        choices,
    )


def _unplaced(request: Request) -> Request:
    """The request as it was accepted."""
    wanted = ("max_output_count", "sampling", "stop_token_ids", "deadline", "length_is_bounded", "priority", "tenant")
    return Request(
        request_id=request.request_id,
        token_ids=request.token_ids[: request.prompt_count],
        prompt_count=request.prompt_count,
        cache_salt=request.cache_salt,
        **{name: getattr(request, name) for name in wanted},
    )


def expected_tokens(request: Request, layer_groups: tuple[LayerGroup, ...] = (LayerGroup(1),)) -> list[int]:
    """What the fake model says to the request when nothing disturbs it."""
    known = list(request.token_ids[: request.prompt_count])
    seed = request.sampling.seed if request.sampling.temperature else None
    groups = executor_groups(layer_groups)
    for index in range(request.max_output_count):
        known.append(next_token(known, seed, index, request.choice, groups))
        if known[-1] in request.stop_token_ids:
            break
    return known[request.prompt_count :]


def is_whole(request: Request) -> bool:
    """Whether the request ended by itself, not because somebody ended it."""
    return request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
