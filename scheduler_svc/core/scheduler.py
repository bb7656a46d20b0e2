"""The scheduler: events in, plans and outputs out, time as an argument."""

import heapq
import math

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.core.blocks import blocks_for
from scheduler_svc.core.executor import Executor
from scheduler_svc.core.plan import Capacity, Chunk, NeverFitsError, NewRequest, Outputs, Plan, ProtocolError, Result
from scheduler_svc.core.queue import WaitingQueue
from scheduler_svc.core.request import FinishReason, Request, RequestState


class Scheduler:
    """Holds every request and every block table of one pool of executors, and decides what each step computes.

    An event (`add`, `finish`, `expire`, `join`, `lose`, `drain`, `apply`) changes what is known; `plan` asks what an
    executor should compute next. Nothing here waits, reads a clock or talks to anybody.
    """

    def __init__(self) -> None:
        """Start with no request and no executor."""
        self.executors: dict[str, Executor] = {}
        self._requests: dict[str, Request] = {}  # by id; every request that is not FINISHED
        self._waiting = WaitingQueue()
        self._stranded: set[Request] = set()  # WAITING; no executor that is here now could ever hold them
        self._largest: Capacity | None = None  # of all executors that ever joined
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap of (deadline, arrival, request)
        self._ended_deadline_count = 0  # how many of them have ended: never the majority for long
        self._arrival_count = 0
        self._attempt_count = 0

    # --- requests -----------------------------------------------------------------------------------------------

    @property
    def waiting_count(self) -> int:
        """Requests that wait to be placed."""
        return len(self._waiting) + len(self._stranded)

    @property
    def waiting_token_count(self) -> int:
        """Known tokens of the requests that wait to be placed."""
        return self._waiting.token_count

    @property
    def request_count(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def get(self, request_id: str) -> Request | None:
        """The request of that id that has not ended."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Accept a request; from here on it is not lost.

        Raises `NeverFitsError` with the arithmetic when no executor that ever joined could hold it even alone. Before
        the first has joined it waits.
        """
        self._check_fits(request)
        request.arrival = self._arrival_count
        self._arrival_count += 1
        self._requests[request.request_id] = request
        self._waiting.push(request)
        if request.deadline != math.inf:
            heapq.heappush(self._deadlines, (request.deadline, request.arrival, request))

    def _check_fits(self, request: Request) -> None:
        largest = self._largest
        if largest is None or blocks_for(request.cache_limit, largest.block_size) <= largest.block_count:
            return
        needed = blocks_for(request.cache_limit, largest.block_size)
        raise NeverFitsError(
            f"request '{request.request_id}' needs up to {needed} cache blocks of {largest.block_size} tokens "
            f"({request.prompt_count} prompt + {request.max_output_count} output tokens) but the largest executor has "
            f"{largest.block_count}; shorten the prompt or lower max_output_tokens"
        )

    def finish(self, request: Request, output_count: int, reason: FinishReason, error: str = "") -> None:
        """End a request now, keeping its first `output_count` generated tokens.

        Legal in every state. Its blocks are free for the next plan; what steps in flight still compute for it is
        dropped on arrival.
        """
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.RUNNING:
            assert request.executor is not None
            request.executor.release(request)
            request.state = RequestState.FINISHED
        else:
            request.state = RequestState.FINISHED
            if request in self._stranded:
                self._stranded.remove(request)
            elif not self._is_unsettled(request):
                self._waiting.note_ended(request)
        del request.token_ids[request.prompt_count + output_count :]
        request.finish_reason = reason
        request.error = error
        del self._requests[request.request_id]
        if request.deadline != math.inf:
            self._forget_deadline()

    def cancel(self, request: Request) -> None:
        """End a request that nobody wants any more."""
        self.finish(request, request.output_count, FinishReason.CANCELLED)

    def expire(self, now: float) -> list[Request]:
        """End the requests whose deadline has passed, and return them."""
        expired = []
        while (deadline := self.next_deadline) is not None and deadline <= now:
            request = self._deadlines[0][2]
            self.finish(request, request.output_count, FinishReason.DEADLINE)
            expired.append(request)
        return expired

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of a request that has not ended."""
        while self._deadlines and self._deadlines[0][2].state is RequestState.FINISHED:
            heapq.heappop(self._deadlines)
            self._ended_deadline_count -= 1
        return self._deadlines[0][0] if self._deadlines else None

    def _forget_deadline(self) -> None:
        """A request with a deadline has ended; let go of the ended ones when they become the majority."""
        self._ended_deadline_count += 1
        if self._ended_deadline_count > len(self._deadlines) // 2 + 16:
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not RequestState.FINISHED]
            heapq.heapify(self._deadlines)
            self._ended_deadline_count = 0

    # --- executors ----------------------------------------------------------------------------------------------

    def join(self, executor_id: str, capacity: Capacity) -> None:
        """Take up an executor that is attached and empty."""
        assert executor_id not in self.executors, f"executor {executor_id!r} joined twice"
        self.executors[executor_id] = Executor(executor_id, capacity)
        if self._largest is None or capacity.token_count > self._largest.token_count:
            self._largest = capacity
        self._call_back_stranded()

    def drain(self, executor_id: str, draining: bool = True) -> None:
        """Place nothing new on an executor; what runs there goes on. Or, with False, place again."""
        self.executors[executor_id].draining = draining
        if not draining:
            self._call_back_stranded()

    def _call_back_stranded(self) -> None:
        for request in self._stranded:
            self._waiting.push(request)
        self._stranded.clear()

    def lose(self, executor_id: str) -> list[Request]:
        """Give up an executor with everything on it. Its requests wait again, in their old order; returns them.

        Results of its plans that come later belong to attempts that are over: do not apply them.
        """
        executor = self.executors.pop(executor_id)
        unsettled = [request for _, request in executor.unsettled if request.state is RequestState.WAITING]
        lost = sorted(executor.running, key=lambda request: request.arrival)
        for request in lost:
            executor.release(request)
            request.state = RequestState.WAITING
        for request in lost + unsettled:
            self._waiting.push(request)
        return lost + unsettled

    # --- steps --------------------------------------------------------------------------------------------------

    def plan(self, executor_id: str, now: float) -> Plan | None:
        """Decide what the next step on this executor computes; None when there is nothing, or no credit, for one.

        Running requests that decode come first, each with one token, so that an admitted request keeps producing.
        What is left of the token budget goes to requests that catch up, oldest first, in chunks; waiting requests
        join these, placed on whichever executor has the least work ahead.
        """
        executor = self.executors[executor_id]
        if not executor.has_credit:
            return None
        executor.slots.pause_exhausted()
        appended = self._grow_decoding(executor)
        self._place(now)
        decoding = np.flatnonzero(executor.slots.decoding)
        started, chunks, more = _plan_chunks(executor, executor.capacity.step_token_count - len(decoding))
        if not len(decoding) and not chunks:
            return None
        executor.slots.planned[decoding] += 1
        return _seal(executor, decoding, started, chunks, appended + more)

    def _place(self, now: float) -> None:
        """Move waiting requests, oldest first, to executors, until the one whose turn it is has to wait.

        A request that needs a larger executor than there is, and takes requests, steps aside until one joins.
        """
        while (request := self._waiting.first()) is not None:
            candidates = [executor for executor in self.executors.values() if executor.has_room_for(request)]
            if not candidates:
                if any(e.could_ever_hold(request) and not e.draining for e in self.executors.values()):
                    return
                self._stranded.add(self._waiting.pop())
                continue
            self._waiting.pop()
            self._attempt_count += 1
            request.attempt = self._attempt_count
            request.placement_count += 1
            request.state = RequestState.RUNNING
            request.placed_at = now if request.placed_at is None else request.placed_at
            min(candidates, key=Executor.work_ahead).start(request)

    def _grow_decoding(self, executor: Executor) -> list[tuple[int, int]]:
        """Give a block to every decoding request that needs one, oldest first; returns (slot, block) pairs."""
        appended = []
        for request in executor.slots.without_room():
            if request.executor is executor and self._make_room(executor, request, 1):
                appended += [(request, block) for block in executor.append_blocks(request, 1)]
        return [(request.slot, block) for request, block in appended if request.executor is executor]

    def _make_room(self, executor: Executor, request: Request, count: int) -> bool:
        """Preempt the youngest until `count` blocks are free; False when `request` itself was the youngest."""
        while executor.blocks.free_count < count:
            youngest = max(executor.running, key=lambda other: other.arrival)
            self._preempt(executor, youngest)
            if youngest is request:
                return False
        return True

    def _preempt(self, executor: Executor, request: Request) -> None:
        """Take a request off its executor. It is queued again once the plans that know it are answered: the tokens
        that these still bring count.
        """
        executor.release(request)
        request.state = RequestState.WAITING
        if executor.in_flight:
            executor.unsettled.append((executor.step, request))
        else:
            self._waiting.push(request)

    def apply(self, executor_id: str, result: Result) -> Outputs:
        """Take in the result of the oldest plan in flight: append its tokens, end what ends with them.

        Raises `ProtocolError` when the result does not answer that plan; nothing was changed then.
        """
        executor = self.executors[executor_id]
        plan = _answered_plan(executor, result)
        executor.in_flight.popleft()
        outputs = Outputs(tokens=[], finished=[])
        for chunk in plan.chunks:
            if chunk.request.executor is executor and not chunk.samples:
                chunk.request.computed_count = chunk.start + chunk.count
        self._append_tokens(plan.rows, result.token_ids, outputs)
        for request, message in _failed_requests(plan, result):
            self.finish(request, request.output_count, FinishReason.ERROR, message)
            outputs.finished.append(request)
        while executor.unsettled and executor.unsettled[0][0] <= plan.step:
            _, request = executor.unsettled.popleft()
            if request.state is RequestState.WAITING:
                self._waiting.push(request)
        return outputs

    def _append_tokens(self, rows: list[Request], token_ids: list[int], outputs: Outputs) -> None:
        """Append one token to each row's request, in the order of rows. The hot loop: every running request, every
        step.
        """
        tokens = outputs.tokens
        for request, token in zip(rows, token_ids, strict=True):
            if request.state is RequestState.FINISHED or token < 0:
                continue
            known = request.token_ids
            if request.state is RequestState.RUNNING:
                request.computed_count = len(known)
            known.append(token)
            tokens.append((request, token))
            if token in request.stop_token_ids:
                self.finish(request, request.output_count, FinishReason.STOP)
                outputs.finished.append(request)
            elif len(known) == request.final_length:
                self.finish(request, request.output_count, FinishReason.LENGTH)
                outputs.finished.append(request)

    # --- checks -------------------------------------------------------------------------------------------------

    def _is_unsettled(self, request: Request) -> bool:
        return any(request is other for executor in self.executors.values() for _, other in executor.unsettled)

    def check_invariants(self) -> None:
        """Hold everything that is kept twice against each other. Tests call it after every event."""
        queued = self._waiting.check_invariants()
        running: set[Request] = set()
        unsettled: set[Request] = set()
        for executor in self.executors.values():
            executor.check_invariants()
            running |= executor.running
            unsettled |= {r for _, r in executor.unsettled if r.state is not RequestState.FINISHED}
        assert not queued & unsettled, "a request is queued before the results of its last placement are in"
        assert not self._stranded & (queued | unsettled), "a request is set aside and queued"
        ended = sum(entry[2].state is RequestState.FINISHED for entry in self._deadlines)
        assert ended == self._ended_deadline_count, "the ended requests in the heap of deadlines are miscounted"
        somewhere = queued | unsettled | running | self._stranded
        assert somewhere == set(self._requests.values()), "a request is lost, or ended and kept"
        for request in self._requests.values():
            expected = RequestState.RUNNING if request in running else RequestState.WAITING
            assert request.state is expected, "a request's state differs from where it is"
            assert request.state is RequestState.RUNNING or not request.block_ids, "a waiting request holds blocks"
            assert request.output_count < request.max_output_count, "a request goes on beyond its length"


def _plan_chunks(executor: Executor, budget: int) -> tuple[list[Request], list[Chunk], list[tuple[int, int]]]:
    """Spend the token budget on requests that catch up, oldest first; returns (started, chunks, appended blocks).

    They take blocks from nobody: each was placed when its blocks were free, and waits for those that decoding
    requests took since. It cannot wait for ever: decoding requests end, and give back more than they took.
    """
    started: list[Request] = []
    chunks: list[Chunk] = []
    appended: list[tuple[int, int]] = []
    for request in list(executor.catching_up):
        wanted = min(budget, len(request.token_ids) - request.planned_count)
        count, block_ids = executor.take_blocks_for(request, wanted)
        if count == 0:
            continue
        if request in executor.starting:
            executor.starting.remove(request)
            started.append(request)
        else:
            appended += [(request.slot, block) for block in block_ids]
        start = request.planned_count
        executor.advance(request, count)
        budget -= count
        chunks.append(Chunk(request.slot, request, start, count, request.planned_count == len(request.token_ids)))
    return started, chunks, appended


def _seal(
    executor: Executor,
    decoding: NDArray[np.int64],
    started: list[Request],
    chunks: list[Chunk],
    appended: list[tuple[int, int]],
) -> Plan:
    """Make the plan a value, and count it as sent."""
    sampling_slots = [chunk.slot for chunk in chunks if chunk.samples]
    row_slots = np.sort(np.concatenate((decoding, np.array(sampling_slots, dtype=np.int64))))
    dropped, paused = executor.slots.collect_changes([request.slot for request in started])
    executor.step += 1
    plan = Plan(
        step=executor.step,
        dropped_slots=dropped,
        new_requests=tuple(_describe(request) for request in started),
        appended=tuple(appended),
        paused_slots=paused,
        chunks=tuple(chunks),
        row_slots=row_slots,
        rows=executor.slots.owners[row_slots].tolist(),
    )
    executor.in_flight.append(plan)
    return plan


def _describe(request: Request) -> NewRequest:
    return NewRequest(
        slot=request.slot,
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=request.token_ids[:],
        output_count=request.output_count,
        block_ids=tuple(request.block_ids),
        sampling=request.sampling,
        stop_token_ids=request.stop_token_ids,
        max_output_count=request.max_output_count,
        trace=request.trace,
    )


def _answered_plan(executor: Executor, result: Result) -> Plan:
    """The plan that the result answers."""
    if not executor.in_flight:
        raise ProtocolError(f"result of step {result.step}, but no plan is in flight")
    plan = executor.in_flight[0]
    if plan.step != result.step:
        raise ProtocolError(f"result of step {result.step}, but step {plan.step} is next")
    if len(plan.rows) != len(result.token_ids):
        raise ProtocolError(f"step {plan.step} samples {len(plan.rows)} rows, its result has {len(result.token_ids)}")
    if result.errors or min(result.token_ids, default=0) < 0:
        _check_missing_tokens(plan, result)
    return plan


def _check_missing_tokens(plan: Plan, result: Result) -> None:
    owners = _owners(plan)
    for slot in result.errors:
        if slot not in owners:
            raise ProtocolError(f"step {plan.step} does not compute slot {slot}, but its result reports an error there")
    for slot, request, token in zip(plan.row_slots.tolist(), plan.rows, result.token_ids, strict=True):
        if token < 0 and request.state is not RequestState.FINISHED and slot not in result.errors:
            raise ProtocolError(f"step {plan.step} has no token for slot {slot}, whose request has not ended")


def _failed_requests(plan: Plan, result: Result) -> list[tuple[Request, str]]:
    """The requests that failed in this step and have not ended otherwise, each with what went wrong."""
    if not result.errors:
        return []
    failed = [(_owners(plan)[slot], message) for slot, message in result.errors.items()]
    return [(request, message) for request, message in failed if request.state is not RequestState.FINISHED]


def _owners(plan: Plan) -> dict[int, Request]:
    """Who is in each slot that the plan computes."""
    chunked = {chunk.slot: chunk.request for chunk in plan.chunks}
    return chunked | dict(zip(plan.row_slots.tolist(), plan.rows, strict=True))
