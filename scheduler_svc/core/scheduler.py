"""The scheduler: events in, plans and outputs out, time as an argument."""

import math
from collections.abc import Sequence

from scheduler_svc.core.absence import KILL_LIMIT, Absence, can_go_on, check_inventory, kill_message
from scheduler_svc.core.executor import Executor, most_blocks
from scheduler_svc.core.moments import Moments, too_late_message
from scheduler_svc.core.obstacles import Obstacle
from scheduler_svc.core.placement import Placement
from scheduler_svc.core.plan import Capacity, HeldAttempt, Inventory, NeverFitsError, Outputs, Plan, Result
from scheduler_svc.core.policies import Policy
from scheduler_svc.core.request import FinishReason, Request, RequestState
from scheduler_svc.core.results import answered_plan, owners_of, settle_blocks
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
        self.preempted = self._placement.preempted  # who had to leave an executor; for the caller to read and clear
        self._absences: dict[str, Absence] = {}  # by executor id; none of `executors`
        self._capacities: dict[Capacity, None] = {}  # of all executors that ever joined
        self._moments = Moments()
        self._arrival_count = 0

    # --- requests -----------------------------------------------------------------------------------------------

    @property
    def waiting_count(self) -> int:
        """Requests that wait to be placed, or for an executor to come back."""
        absent_count = sum(len(absence.requests) for absence in self._absences.values())
        return len(self._placement.queue) + len(self._placement.stranded) + absent_count

    @property
    def stranded_count(self) -> int:
        """Requests that no executor that is here could ever hold."""
        return len(self._placement.stranded)

    @property
    def waiting_token_count(self) -> int:
        """Known tokens of the requests that wait to be placed."""
        return self._placement.waiting_token_count

    @property
    def obstacle(self) -> Obstacle | None:
        """What those wait for who wait to be placed; None: nobody does."""
        return self._placement.obstacle

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
        self._register(request)
        self._placement.push(request)

    def restore(self, request: Request, owners: Sequence[str]) -> None:
        """Take up a request that an earlier life of the scheduler has accepted, with what it had generated.

        `owners` are the executors that had its choices, "" for none: these are waited for until `resume` or `give_up`.
        Of the choices some may have ended.
        """
        self._register(request)
        begun = any(choice.output_count or choice.state is RequestState.FINISHED for choice in request.family)
        if begun or any(owners[1:]):
            request.unforked_count = 0
            for choice in request.family[1:]:
                choice.token_ids = choice.token_ids[:]  # the prompt was one and the same until now
        for choice, owner in zip(request.family, owners, strict=True):
            if choice.state is RequestState.FINISHED or choice.is_unforked:
                continue
            if owner and owner not in self.executors:
                self._await(choice, owner)
            else:
                self._placement.push(choice)

    def _register(self, request: Request) -> None:
        self._requests[request.request_id] = request
        for choice in request.family:
            choice.arrival = self._arrival_count
            choice.rank = self.policy.rank(choice)
            self._arrival_count += 1
            if choice.deadline != math.inf and choice.state is not RequestState.FINISHED:
                self._moments.add(
                    choice, -math.inf if self.policy.sheds else choice.deadline
                )  # who sheds looks at once

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
        elif request.awaits:
            self._stop_awaiting(request)
        elif was_waiting and not request.is_unforked and not self._is_unsettled(request):
            self._placement.remove_ended(request)
        del request.token_ids[request.prompt_count + output_count :]
        request.finish_reason = reason
        request.error = error
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._placement.lengths.note_ended(output_count, request.max_output_count)
        if request.deadline != math.inf:
            self._moments.note_ended()
        if request.has_ended:
            del self._requests[request.request_id]

    def _end(self, request: Request, reason: FinishReason, error: str) -> list[Request]:
        """End a request with what it has; returns it and those that end with it, who waited to be forked from it."""
        choices = [choice for choice in request.family if choice.state is not RequestState.FINISHED]
        self.finish(request, request.output_count, reason, error)
        return [choice for choice in choices if choice.state is RequestState.FINISHED]

    def cancel(self, request: Request, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request that nobody wants any more, with all its choices."""
        for choice in request.family:
            self.finish(choice, choice.output_count, reason)

    # --- deadlines ----------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Request]:
        """End the requests whose deadline has passed, or which cannot meet it any more; returns them."""
        expired: list[Request] = []
        while (due := self._moments.first()) is not None and due[0] <= now:
            request = due[1]
            if (moment := self._placement.last_moment(request, now)) > now:
                self._moments.put_off(moment)
                continue
            expired += self._end(request, FinishReason.DEADLINE, too_late_message(request, now))
        return expired

    @property
    def next_moment(self) -> float | None:
        """When `expire` has something to look at: the earliest deadline, or the last moment to start somebody."""
        due = self._moments.first()
        return due[0] if due else None

    # --- executors ----------------------------------------------------------------------------------------------

    def expect(self, capacity: Capacity) -> None:
        """An executor of this size has joined and is not attached yet: what fits there may wait for it."""
        self._capacities[capacity] = None

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

    def hand_over(self, executor_id: str) -> None:
        """Take everybody off an executor that drains: they go on elsewhere."""
        executor = self.executors[executor_id]
        assert executor.draining, f"executor {executor_id!r} hands over and does not drain"
        for request in sorted(executor.running, key=lambda request: request.rank):
            self._placement.preempt(executor, request)

    def lose(self, executor_id: str, *, died: bool = False, may_return: bool = False) -> list[Request]:
        """Give up an executor with everything on it. Its requests wait again, in their old order; returns them.

        Where the process `died`, those that it computed are suspects: they catch up one after the other, and who has
        killed two ends instead. One that `may_return` is waited for, until `resume` or `give_up`. Results of its plans
        that come later belong to attempts that are over: do not apply them.
        """
        executor = self.executors.pop(executor_id)
        self._placement.remove_executor(executor)
        computing, prime_suspect = executor.computing()
        lost = sorted(executor.running, key=lambda request: request.rank) + executor.coming_back()
        for request in lost:
            if request.state is RequestState.RUNNING:
                executor.release(request)
                request.state = RequestState.WAITING
            self._await(request, executor_id)
        if lost:
            self._absences[executor_id].computing = computing
            self._absences[executor_id].prime_suspect = prime_suspect
        return lost if may_return else self.give_up(executor_id, died=died)

    def give_up(self, executor_id: str, *, died: bool = False) -> list[Request]:
        """Wait no longer for an executor to come back: its requests are queued, in their old order; returns them.

        Where it `died`, who has killed two ends instead, and is returned after the others.
        """
        absence = self._absences.pop(executor_id, Absence())
        ended: list[Request] = []
        for request in absence.requests:
            request.awaits = ""
            request.is_suspect |= died and request in absence.computing
            request.kill_count += died and request is absence.prime_suspect
            self._placement.push(request)
            if request.kill_count >= KILL_LIMIT:
                ended += self._end(request, FinishReason.ERROR, kill_message(request))
        return [request for request in absence.requests if request.state is RequestState.WAITING] + ended

    @property
    def absent(self) -> dict[str, list[Request]]:
        """Executors that somebody waits for, and who does."""
        return {name: list(absence.requests) for name, absence in self._absences.items()}

    def _await(self, request: Request, executor_id: str) -> None:
        request.awaits = executor_id
        self._absences.setdefault(executor_id, Absence()).requests[request] = None

    def _stop_awaiting(self, request: Request) -> None:
        absence = self._absences[request.awaits]
        del absence.requests[request]
        absence.computing.discard(request)
        request.awaits = ""
        if not absence.requests:
            self._absences = {name: other for name, other in self._absences.items() if other is not absence}

    def resume(self, executor_id: str, capacity: Capacity, inventory: Inventory) -> Outputs:
        """Take up an executor that is attached with what it held before, and go on with it where that is possible.

        Tokens that it had generated and nobody knew count. Everything else that it has is forgotten there with its next
        plan; of the requests that waited for it, those that it does not have are queued. Raises `ProtocolError` when
        the inventory makes no sense; nothing was changed then.
        """
        check_inventory(inventory, capacity)
        self.join(executor_id, capacity)
        executor = self.executors[executor_id]
        executor.step = inventory.last_step
        outputs = Outputs(tokens=[], finished=[])
        waiting = self._call_home(inventory, executor_id)
        for held in inventory.held:
            if held.request in waiting and held.request.state is RequestState.WAITING:
                self._take_output(held, outputs)
        self.policy.note_tokens(outputs.tokens)
        going_on = [held for held in inventory.held if held.request in waiting and can_go_on(held)]
        for held in going_on:
            self._go_on(held)
        executor.take_over(going_on)
        for held in inventory.held:
            if held.slot is not None and executor.slots.owners[held.slot] is None:
                executor.slots.empty(held.slot)
        self._placement.note_change(executor)
        self.give_up(executor_id)
        return outputs

    def _call_home(self, inventory: Inventory, executor_id: str) -> set[Request]:
        """Let those that the executor has, and that are nowhere else, wait for it alone; returns them."""
        known = (held.request for held in inventory.held)
        waiting = {r for r in known if r is not None and r.state is RequestState.WAITING and not self._is_unsettled(r)}
        for held in inventory.held:
            if held.request in waiting and (held.request.choice or held.output_ids):
                self._note_forked(held.request.family[0])
        for request in waiting:
            if request.awaits:
                self._stop_awaiting(request)
            else:
                self._placement.withdraw(request)
            self._await(request, executor_id)
        return waiting

    def _note_forked(self, parent: Request) -> None:
        """The choices of a request were forked before the scheduler restarted: an executor holds one that was."""
        if not parent.unforked_count:
            return
        parent.unforked_count = 0
        if parent.executor is not None:
            parent.executor.forking.discard(parent)
        for choice in parent.choices[1:]:
            if choice.state is RequestState.WAITING:
                choice.token_ids = parent.token_ids[: parent.prompt_count]
                self._placement.push(choice)

    def _take_output(self, held: HeldAttempt, outputs: Outputs) -> None:
        """Append what was generated there and is not known here, and end what ended with it."""
        request = held.request
        assert request is not None
        if held.output_ids[: request.output_count] != request.output_ids:
            return  # another attempt, of which it was told before this one, went another way
        for token in held.output_ids[request.output_count :]:
            request.token_ids.append(token)
            request.is_suspect, request.kill_count = False, 0
            outputs.tokens.append((request, token))
            if token in request.stop_token_ids:
                self.finish(request, request.output_count, FinishReason.STOP)
            elif request.output_count == request.max_output_count:
                self.finish(request, request.output_count, FinishReason.LENGTH)
            if request.state is RequestState.FINISHED:
                break
        if request.state is RequestState.FINISHED:
            outputs.finished.append(request)
        elif held.error and held.attempt == request.attempt:
            outputs.finished.extend(self._end(request, FinishReason.ERROR, held.error))

    def _go_on(self, held: HeldAttempt) -> None:
        request = held.request
        assert request is not None
        self._stop_awaiting(request)
        request.state = RequestState.RUNNING
        request.attempt = held.attempt
        request.placement_count = max(1, request.placement_count)

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
        plan = answered_plan(executor, result)
        executor.take_answered()
        if result.seconds:
            executor.step_times.observe(plan.token_count, result.seconds, plan.planned_at)
        outputs = Outputs(tokens=[], finished=[])
        settle_blocks(executor, plan, result)
        self._append_tokens(plan, result.token_ids, outputs)
        self.policy.note_tokens(outputs.tokens)
        if executor.suspects:
            executor.clear_suspects(outputs.tokens)
        if result.errors:
            self._take_errors(executor, plan, result, outputs)
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

    def _take_errors(self, executor: Executor, plan: Plan, result: Result, outputs: Outputs) -> None:
        """End the requests that failed. One that only lacked memory moves, the first time."""
        owners = owners_of(plan)
        for slot, message in result.errors.items():
            request = owners[slot]
            if request.state is RequestState.FINISHED:
                continue
            if slot in result.out_of_memory and request.executor is executor:
                has_moved, request.starved_at = request.starved_at == request.output_count, request.output_count
                if not has_moved:
                    self._placement.preempt(executor, request)
                    continue
            outputs.finished.extend(self._end(request, FinishReason.ERROR, message))

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
        absent = self._check_absences()
        assert not absent & (queued | coming_back | running), "a request waits for an executor and is elsewhere"
        assert not queued & coming_back, "a request is queued before the results of its last placement are in"
        self._moments.check_invariants()
        alive = {c for r in self._requests.values() for c in r.family if c.state is not RequestState.FINISHED}
        unforked = {request for request in alive if request.is_unforked}
        assert not unforked & (queued | coming_back | running), "a choice is somewhere before it was forked"
        assert queued | coming_back | running | unforked | absent == alive, "a request is lost, or ended and kept"
        assert all(not request.has_ended for request in self._requests.values()), "a request ended and is kept"
        for request in alive:
            expected = RequestState.RUNNING if request in running else RequestState.WAITING
            assert request.state is expected, "a request's state differs from where it is"
            assert request.state is RequestState.RUNNING or not request.tables, "a waiting request holds blocks"
            assert request.output_count < request.max_output_count, "a request goes on beyond its length"

    def _check_absences(self) -> set[Request]:
        """Return the requests that wait for an executor, after holding what is kept of them against each other."""
        for name, absence in self._absences.items():
            assert absence.requests, "an executor is waited for, and nobody waits"
            assert absence.computing <= absence.requests.keys(), "a suspect does not wait"
            assert all(request.awaits == name for request in absence.requests), "a request waits for another executor"
        return {request for absence in self._absences.values() for request in absence.requests}
