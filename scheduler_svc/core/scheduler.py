"""The scheduler: events in, plans and outputs out, time as an argument."""

import heapq
import math

from scheduler_svc.core.executor import Executor, most_blocks
from scheduler_svc.core.placement import Placement
from scheduler_svc.core.plan import Capacity, NeverFitsError, Outputs, Plan, ProtocolError, Result
from scheduler_svc.core.policies import Policy
from scheduler_svc.core.request import FinishReason, Request, RequestState
from scheduler_svc.core.step_plan import StepPlanner, grow_decoding


class Scheduler:
    """Holds every request and every block table of one pool of executors, and decides what each step computes.

    An event (`add`, `finish`, `expire`, `join`, `lose`, `drain`, `apply`) changes what is known; `plan` asks what an
    executor should compute next. Nothing here waits, reads a clock or talks to anybody.
    """

    def __init__(self, policy: Policy | None = None, *, reuse: bool = True) -> None:
        """Start with no request and no executor.

        `policy` orders requests; None is first come, first served. With `reuse`, what was computed for one request is
        kept for others that begin with the same tokens.
        """
        self.policy = policy or Policy()
        self.executors: dict[str, Executor] = {}
        self._reuse = reuse
        self._requests: dict[str, Request] = {}  # by id, choice 0 of every request that has not ended
        self._placement = Placement(self.policy)
        self._capacities: dict[Capacity, None] = {}  # of all executors that ever joined
        self._moments: list[tuple[float, int, Request]] = []  # a heap of (when `expire` has to look, arrival, request)
        self._ended_moment_count = 0  # how many of them have ended: never the majority for long
        self._arrival_count = 0

    # --- requests -----------------------------------------------------------------------------------------------

    @property
    def waiting_count(self) -> int:
        """Requests that wait to be placed."""
        return len(self._placement.queue) + len(self._placement.stranded)

    @property
    def waiting_token_count(self) -> int:
        """Known tokens of the requests that wait to be placed."""
        return self._placement.waiting_token_count

    @property
    def request_count(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def get(self, request_id: str) -> Request | None:
        """The request of that id that has not ended; where it has several choices, the first, which may have."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Accept a request with all its choices; from here on it is not lost.

        Raises `NeverFitsError` with the arithmetic when no executor that ever joined could hold it even alone. Before
        the first has joined it waits.
        """
        self._check_fits(request)
        self._requests[request.request_id] = request
        for choice in request.family:
            choice.arrival = self._arrival_count
            choice.rank = self.policy.rank(choice)
            self._arrival_count += 1
            if choice.deadline != math.inf:  # a policy that looks ahead looks at once
                moment = -math.inf if self.policy.sheds else choice.deadline
                heapq.heappush(self._moments, (moment, choice.arrival, choice))
        self._placement.push(request)

    def _check_fits(self, request: Request) -> None:
        needs = [(most_blocks(capacity, request), capacity.block_count) for capacity in self._capacities]
        if not needs or any(needed <= there for needed, there in needs):
            return
        needed, there = min(needs, key=lambda need: need[0] - need[1])
        raise NeverFitsError(
            f"request '{request.request_id}' needs up to {needed} cache blocks ({request.prompt_count} prompt + "
            f"{request.max_output_count} output tokens) but the largest executor has {there}; shorten the prompt or "
            f"lower max_output_tokens"
        )

    def finish(self, request: Request, output_count: int, reason: FinishReason, error: str = "") -> None:
        """End a request now, keeping its first `output_count` generated tokens.

        Legal in every state. Its blocks are free for the next plan; what steps in flight still compute for it is
        dropped on arrival. Of several choices only this one ends, and those that wait to be forked from it.
        """
        if request.state is RequestState.FINISHED:
            return
        if request.unforked_count:
            for choice in request.choices[1:]:
                self.finish(choice, 0, reason, error)
            request.unforked_count = 0
        was_waiting = request.state is RequestState.WAITING
        request.state = RequestState.FINISHED
        if request.executor is not None:
            executor = request.executor
            executor.release(request)
            self._placement.note_change(executor)
        elif was_waiting and not request.is_unforked and not self._is_unsettled(request):
            self._placement.remove_ended(request)
        del request.token_ids[request.prompt_count + output_count :]
        request.finish_reason = reason
        request.error = error
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._placement.lengths.note_ended(output_count, request.max_output_count)
        if request.deadline != math.inf:
            self._note_moment_ended()
        if request.has_ended:
            del self._requests[request.request_id]

    def cancel(self, request: Request) -> None:
        """End a request that nobody wants any more, with all its choices."""
        for choice in request.family:
            self.finish(choice, choice.output_count, FinishReason.CANCELLED)

    # --- deadlines ----------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Request]:
        """End the requests whose deadline has passed, or which cannot meet it any more; returns them."""
        expired: list[Request] = []
        while (moment := self.next_moment) is not None and moment <= now:
            request = self._moments[0][2]
            if (moment := self._placement.last_moment(request, now)) > now:
                heapq.heapreplace(self._moments, (moment, request.arrival, request))
                continue
            choices = [choice for choice in request.family if choice.state is not RequestState.FINISHED]
            self.finish(request, request.output_count, FinishReason.DEADLINE, _too_late(request, now))
            expired += [choice for choice in choices if choice.state is RequestState.FINISHED]
        return expired

    @property
    def next_moment(self) -> float | None:
        """When `expire` has something to look at: the earliest deadline, or the last moment to start somebody."""
        while self._moments and self._moments[0][2].state is RequestState.FINISHED:
            heapq.heappop(self._moments)
            self._ended_moment_count -= 1
        return self._moments[0][0] if self._moments else None

    def _note_moment_ended(self) -> None:
        """A request with a deadline has ended; let go of the ended ones when they become the majority."""
        self._ended_moment_count += 1
        if self._ended_moment_count > len(self._moments) // 2 + 16:
            self._moments = [entry for entry in self._moments if entry[2].state is not RequestState.FINISHED]
            heapq.heapify(self._moments)
            self._ended_moment_count = 0

    # --- executors ----------------------------------------------------------------------------------------------

    def join(self, executor_id: str, capacity: Capacity) -> None:
        """Take up an executor that is attached and empty."""
        assert executor_id not in self.executors, f"executor {executor_id!r} joined twice"
        executor = self.executors[executor_id] = Executor(executor_id, capacity, reuse=self._reuse)
        self._capacities[capacity] = None
        self._placement.add_executor(executor)

    def drain(self, executor_id: str, draining: bool = True) -> None:
        """Place nothing new on an executor; what runs there goes on. Or, with False, place again."""
        executor = self.executors[executor_id]
        executor.draining = draining
        if draining:
            self._placement.look_again()
        else:
            self._placement.note_change(executor)
            self._placement.call_back_stranded()

    def lose(self, executor_id: str) -> list[Request]:
        """Give up an executor with everything on it. Its requests wait again, in their old order; returns them.

        Results of its plans that come later belong to attempts that are over: do not apply them.
        """
        executor = self.executors.pop(executor_id)
        self._placement.remove_executor(executor)
        coming_back = executor.coming_back()
        lost = sorted(executor.running, key=lambda request: request.rank)
        for request in lost:
            executor.release(request)
            request.state = RequestState.WAITING
        for request in lost + coming_back:
            self._placement.push(request)
        return lost + coming_back

    # --- steps --------------------------------------------------------------------------------------------------

    def plan(self, executor_id: str, now: float) -> Plan | None:
        """Decide what the next step on this executor computes; None when there is nothing, or no credit, for one.

        Requests that decode come first, each with one token, so that an admitted request keeps producing. What is
        left of the token budget goes to requests that catch up, in chunks; waiting requests join these, placed where
        their next token is expected soonest. The policy may have it otherwise.
        """
        executor = self.executors[executor_id]
        if not executor.has_credit:
            return None
        plan = self._plan_step(executor, now)
        while plan is None and executor.is_stuck and (weakest := executor.weakest) is not None:
            self._placement.preempt(executor, weakest)  # all of them lack blocks, and each of them holds some
            plan = self._plan_step(executor, now)
        if plan is not None and plan.chunks:
            self._placement.note_change(executor)  # its backlog is smaller
        return plan

    def _plan_step(self, executor: Executor, now: float) -> Plan | None:
        executor.slots.pause_exhausted()
        grow_decoding(executor, self._placement.preempt)
        self._placement.place(now)
        if executor.forking:
            self._fork(executor, now)
        planner = StepPlanner(executor, lambda: self._place_more(executor, now))
        return planner.plan(now, prefill_first=self.policy.prefill_first)

    def _place_more(self, executor: Executor, now: float) -> None:
        self._placement.note_change(executor)
        self._placement.place(now, may_displace=False)  # whoever is part of the step stays

    def _fork(self, executor: Executor, now: float) -> None:
        """Start the choices whose prompt is computed. Who finds no room here queues like everybody else."""
        for parent in sorted(executor.forking, key=lambda request: request.rank):
            executor.adopt(parent)
            if parent.computed_count < parent.prompt_count - 1:
                continue
            executor.forking.remove(parent)
            parent.unforked_count = 0
            for choice in parent.choices[1:]:
                if choice.state is RequestState.FINISHED:
                    continue
                choice.token_ids = parent.token_ids[:]
                if executor.has_room_to_fork():
                    self._placement.note_placed(choice, now)
                    executor.fork(parent, choice)
                else:
                    self._placement.push(choice)

    def apply(self, executor_id: str, result: Result) -> Outputs:
        """Take in the result of the oldest plan in flight: append its tokens, end what ends with them.

        Raises `ProtocolError` when the result does not answer that plan; nothing was changed then.
        """
        executor = self.executors[executor_id]
        plan = _answered_plan(executor, result)
        executor.take_answered()
        if result.seconds:
            executor.step_times.observe(plan.token_count, result.seconds, plan.planned_at)
        outputs = Outputs(tokens=[], finished=[])
        _settle_blocks(executor, plan, result)
        self._append_tokens(plan, result.token_ids, outputs)
        self.policy.note_tokens(outputs.tokens)
        for request, message in _failed_requests(plan, result):
            choices = [choice for choice in request.family if choice.state is not RequestState.FINISHED]
            self.finish(request, request.output_count, FinishReason.ERROR, message)
            outputs.finished.extend(choice for choice in choices if choice.state is RequestState.FINISHED)
        self._placement.settle(executor, plan.step)
        if plan.settling or plan.chunks:
            self._placement.note_change(executor)
        return outputs

    def _append_tokens(self, plan: Plan, token_ids: list[int], outputs: Outputs) -> None:
        """Append one token to each row's request, in the order of rows, and end what ends with it."""
        finished = RequestState.FINISHED
        # The hot loops: every running request, every step.
        tokens = [
            pair for pair in zip(plan.rows, token_ids, strict=True) if pair[1] >= 0 and pair[0].state is not finished
        ]
        for request, token in tokens:
            request.token_ids.append(token)
        outputs.tokens.extend(tokens)
        for request in [request for request, token in tokens if token in request.stop_token_ids]:
            self.finish(request, request.output_count, FinishReason.STOP)
            outputs.finished.append(request)
        for row in plan.last_rows:
            request = plan.rows[row]
            if request.state is not finished and token_ids[row] >= 0:
                self.finish(request, request.output_count, FinishReason.LENGTH)
                outputs.finished.append(request)

    # --- checks -------------------------------------------------------------------------------------------------

    def _is_unsettled(self, request: Request) -> bool:
        return any(request is other for executor in self.executors.values() for _, other in executor.unsettled)

    def check_invariants(self) -> None:
        """Hold everything that is kept twice against each other. Tests call it after every event."""
        queued = self._placement.check_invariants()
        running: set[Request] = set()
        coming_back: set[Request] = set()
        for executor in self.executors.values():
            executor.check_invariants()
            running |= executor.running
            coming_back |= set(executor.coming_back())
        assert not queued & coming_back, "a request is queued before the results of its last placement are in"
        ended = sum(entry[2].state is RequestState.FINISHED for entry in self._moments)
        assert ended == self._ended_moment_count, "the ended requests in the heap of deadlines are miscounted"
        alive = {c for r in self._requests.values() for c in r.family if c.state is not RequestState.FINISHED}
        unforked = {request for request in alive if request.is_unforked}
        assert not unforked & (queued | coming_back | running), "a choice is somewhere before it was forked"
        assert queued | coming_back | running | unforked == alive, "a request is lost, or ended and kept"
        assert all(not request.has_ended for request in self._requests.values()), "a request ended and is kept"
        for request in alive:
            expected = RequestState.RUNNING if request in running else RequestState.WAITING
            assert request.state is expected, "a request's state differs from where it is"
            assert request.state is RequestState.RUNNING or not request.tables, "a waiting request holds blocks"
            assert request.output_count < request.max_output_count, "a request goes on beyond its length"


def _too_late(request: Request, now: float) -> str:
    """Why the request is refused before its deadline; empty when that has passed."""
    if now >= request.deadline:
        return ""
    return (
        f"request '{request.request_id}' is refused {request.deadline - now:.3g} s before its deadline: the "
        f"{len(request.token_ids)} tokens before its next one cannot be computed in that time; allow more time or "
        f"shorten the prompt"
    )


def _settle_blocks(executor: Executor, plan: Plan, result: Result) -> None:
    """Offer what the step has filled, before its requests may end; what a failing row has written is never offered."""
    for chunk in plan.chunks:
        request = chunk.request
        if request.executor is executor and not chunk.samples and chunk.slot not in result.errors:
            request.computed_count = chunk.start + chunk.count
            executor.settle(request)
    for row in plan.settling:
        request = plan.rows[row]
        if request.executor is executor and result.token_ids[row] >= 0:
            request.computed_count = len(request.token_ids)
            executor.settle(request)


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
