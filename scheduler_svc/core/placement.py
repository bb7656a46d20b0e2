"""Which waiting request goes to which executor."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from enum import Enum

from scheduler_svc.core.cache import FoundPrefix
from scheduler_svc.core.executor import Executor, fits
from scheduler_svc.core.obstacles import A_STRONGER_CLAIM, Obstacle, obstacle_to
from scheduler_svc.core.outlook import LengthOutlook
from scheduler_svc.core.plan import Capacity
from scheduler_svc.core.policies import Policy
from scheduler_svc.core.queue import WaitingQueue
from scheduler_svc.core.request import Request, RequestState

_LOOK_AHEAD = 16
"""Requests at the head of the queue that may find no room before nobody further behind is looked at."""

_LATE_LOOK_AHEAD = 256
"""Requests that cannot be finished in time before one of them is started although another further behind might be."""

_MOST_PREEMPTED = 65536  # only where nobody reads them


class _Outcome(Enum):
    """What came of looking for a place for a request."""

    PLACED = "placed"
    NO_ROOM = "no room"
    TOO_LATE = "too late"  # where there is room it could not be finished in time
    HOPELESS = "hopeless"  # not even its first token can come in time: `expire` ends it when its moment has come


class Placement:
    """Holds the requests that wait and moves them to executors, in the order of the policy."""

    def __init__(self, policy: Policy) -> None:
        """Start with nobody waiting and no executor."""
        self.queue = WaitingQueue(policy)
        self.lengths = LengthOutlook()
        self.stranded: set[Request] = set()  # WAITING; no executor that is here now could ever hold them
        self.preempted: deque[Request] = deque(maxlen=_MOST_PREEMPTED)  # in order, for whoever wants to know
        self._stranded_token_count = 0
        self._policy = policy
        self._executors: OrderedDict[Executor, None] = OrderedDict()  # the last one that changed is last
        self._kinds: Counter[Capacity] = Counter()  # of these executors
        self._change_count = 0  # changes by which some executor may have got room
        self._may_displace = False  # whether somebody may, for the rest of this look
        self._is_due = False  # whether anything changed since the last look
        self._attempt_count = 0

    # --- what changes -------------------------------------------------------------------------------------------

    def add_executor(self, executor: Executor) -> None:
        """Take requests to this executor too."""
        self._executors[executor] = None
        self._kinds[executor.capacity] += 1
        self.note_change(executor)
        self.call_back_stranded()

    def remove_executor(self, executor: Executor) -> None:
        """Take no more requests to it."""
        del self._executors[executor]
        self._kinds[executor.capacity] -= 1
        if not self._kinds[executor.capacity]:
            del self._kinds[executor.capacity]
        self._is_due = True  # what only it could hold steps aside

    def note_change(self, executor: Executor) -> None:
        """The executor may have room that it did not have: those who found none look there again."""
        if executor.draining or not executor.slots.free_count:
            return
        self._change_count += 1
        executor.changed_at = self._change_count
        self._executors.move_to_end(executor)
        self._is_due = True

    def call_back_stranded(self) -> None:
        """Let those queue again who were too large for everybody."""
        for request in self.stranded:
            self.push(request)
        self.stranded.clear()
        self._stranded_token_count = 0

    def _strand(self, request: Request) -> None:
        self.stranded.add(request)
        self._stranded_token_count += len(request.token_ids)

    @property
    def waiting_token_count(self) -> int:
        """Known tokens of the requests that wait here."""
        return self.queue.token_count + self._stranded_token_count

    def push(self, request: Request) -> None:
        """Queue a request that is WAITING."""
        request.tried_at = -1
        request.hopeless_at = None  # what it was worth before it ran says nothing of what is left of it
        request.hashes = []  # they take a quarter of the memory of its tokens, and are made again in milliseconds
        self.queue.push(request)
        self._is_due = True

    def withdraw(self, request: Request) -> None:
        """A request that waits here, or was about to, is placed without being asked for: its executor came back."""
        if request in self.stranded:
            self.remove_ended(request)
        else:
            self.queue.withdraw(request)

    def look_again(self) -> None:
        """Something changed that concerns no executor in particular."""
        self._is_due = True

    def remove_ended(self, request: Request) -> None:
        """A request that waits here has become FINISHED; its tokens are still all there."""
        if request in self.stranded:
            self.stranded.remove(request)
            self._stranded_token_count -= len(request.token_ids)
        else:
            self.queue.note_ended(request)

    @property
    def obstacle(self) -> Obstacle | None:
        """What the request waits for whose turn it is, and so everybody behind it; None: nobody waits here."""
        request = self.queue.first()
        if request is None:
            return Obstacle.LARGER if self.stranded else None
        return obstacle_to(request, self._executors, prefill_first=self._policy.prefill_first)

    # --- placing ------------------------------------------------------------------------------------------------

    def place(self, now: float, *, may_displace: bool = True) -> None:
        """Move waiting requests to executors until those whose turn it is have to wait.

        Who finds no room waits for it; as many others as the policy allows may go past, and all of them where it could
        never run. A request that needs a larger executor than there is, and takes requests, steps aside until one
        joins. Under a policy that looks at deadlines, who cannot be finished in time waits while another could be.
        """
        if not self._is_due or all(executor.draining for executor in self._executors):
            return
        self._is_due = False
        self._may_displace = may_displace and self._policy.displaces
        without_room: list[Request] = []
        too_late: list[Request] = []
        while (request := self.queue.first()) is not None and len(without_room) < _LOOK_AHEAD:
            closed = self._closed_kinds(request, without_room)
            if len(closed) == len(self._kinds) or len(too_late) == _LATE_LOOK_AHEAD:
                break
            outcome = self._try(request, now, closed)
            if outcome is _Outcome.PLACED:
                self.queue.pop(request)
                self._note_overtaken(without_room, request)
                continue
            if outcome is _Outcome.NO_ROOM and self._fits_nobody(request):
                self.queue.pop(request)
                self._strand(request)
                continue
            self.queue.skip(request)
            if outcome is _Outcome.NO_ROOM:
                without_room.append(request)
            elif outcome is _Outcome.TOO_LATE:
                too_late.append(request)
        if not without_room:
            self._place_late(too_late, now)
        self.queue.unskip()

    def _place_late(self, requests: list[Request], now: float) -> None:
        """Nobody who could be finished in time waits: start those who cannot, they may end early."""
        for request in requests:
            if self._try(request, now, set(), is_late=True) is not _Outcome.PLACED:
                return
            self.queue.pop_skipped(request)

    def _closed_kinds(self, request: Request, without_room: list[Request]) -> set[Capacity]:
        """The kinds of executors on which the request may not overtake somebody who waits for room there."""
        ahead = [other for other in without_room if not self._policy.may_overtake(request, other)]
        return {kind for kind in self._kinds if any(fits(kind, other) for other in ahead)} if ahead else set()

    def _note_overtaken(self, without_room: list[Request], request: Request) -> None:
        assert request.executor is not None
        for other in without_room:
            other.overtaken_count += request.executor.could_ever_hold(other)

    def _fits_nobody(self, request: Request) -> bool:
        return not any(e.could_ever_hold(request) and not e.draining for e in self._executors)

    def _try(
        self,
        request: Request,
        now: float,
        closed: set[Capacity],
        *,
        is_late: bool = False,
    ) -> _Outcome:
        """Start the request where its next token is expected first, if there is room and, unless `is_late`, time."""
        looks_ahead = self._policy.sheds and not is_late
        if looks_ahead:
            if request.hopeless_at is None:
                self.last_moment(request, now)
            if request.hopeless_at is not None and request.hopeless_at <= now:
                return _Outcome.HOPELESS
        best: tuple[tuple[float, int, str], Executor, FoundPrefix | None] | None = None
        outcome = _Outcome.NO_ROOM
        for executor in self._changed_since(request.tried_at):
            if not executor.slots.free_count or (closed and executor.capacity in closed):
                continue
            if not executor.takes(request, prefill_first=self._policy.prefill_first):
                continue
            found = executor.cache.find_prefix(request)
            if not self._has_room(executor, request, found):
                continue
            if looks_ahead and now + executor.seconds_to_end(request, found) > request.deadline:
                outcome = _Outcome.TOO_LATE
                continue
            expected = *executor.seconds_to_token(request, found), executor.executor_id
            if best is None or expected < best[0]:
                best = expected, executor, found
        if best is not None:
            self._start(best[1], request, best[2], now)
            return _Outcome.PLACED
        if outcome is _Outcome.NO_ROOM and not closed:
            request.tried_at = self._change_count
        if self._may_displace and not is_late and self._displace(request, closed, now):
            return _Outcome.PLACED
        return outcome

    def _has_room(self, executor: Executor, request: Request, found: FoundPrefix | None) -> bool:
        if not executor.has_room_for(request, found):
            return False
        if executor.running and not executor.will_have_room_for(request, found, self.lengths.share):
            executor.outgrown_by = request
            return False
        return True

    def _changed_since(self, change: int) -> Iterator[Executor]:
        for executor in reversed(self._executors):
            if executor.changed_at <= change:
                return
            yield executor

    def _start(self, executor: Executor, request: Request, found: FoundPrefix | None, now: float) -> None:
        self.note_placed(request, now)
        executor.start(request, found)
        if request.placement_count == 1:
            self._policy.note_started(request)

    def note_placed(self, request: Request, now: float) -> None:
        """A request is placed: it starts another attempt."""
        self._attempt_count += 1
        request.attempt = self._attempt_count
        request.placement_count += 1
        request.overtaken_count = 0
        request.state = RequestState.RUNNING
        request.placed_at = now if request.placed_at is None else request.placed_at

    def last_moment(self, request: Request, now: float) -> float:
        """When the request becomes hopeless: at its deadline, or before it, if it waits and the policy looks ahead."""
        if not self._policy.sheds or request.state is not RequestState.WAITING or request.is_unforked:
            return request.deadline
        executors = [executor for executor in self._executors if executor.could_ever_hold(request)]
        seconds = min((e.least_seconds_to_token(request, None, now) for e in executors), default=0.0)
        if (
            executors and request.deadline - seconds <= now
        ):  # looking up what is in the cache costs more: only if it matters
            found = ((executor, executor.cache.find_prefix(request)) for executor in executors)
            seconds = min(e.least_seconds_to_token(request, prefix, now) for e, prefix in found)
        request.hopeless_at = request.deadline - seconds
        return request.hopeless_at

    # --- displacing ---------------------------------------------------------------------------------------------

    def _displace(self, request: Request, closed: set[Capacity], now: float) -> bool:
        """Make room by preempting those whose claim is so much weaker that the policy lets them give way: where the
        fewest have to, and then where the next token is expected first.
        """
        best: tuple[tuple[int, float, int, str], Executor, list[Request]] | None = None
        weaker = [e for e in self._executors if e.weakest and self._policy.may_displace(request, e.weakest)]
        self._may_displace = bool(weaker)  # nor may those who come after it, whose claims are no stronger
        for executor in weaker:
            if closed and executor.capacity in closed:
                continue
            if not executor.takes(request, prefill_first=self._policy.prefill_first, by_displacing=True):
                continue
            found = executor.cache.find_prefix(request)
            if self._policy.sheds and now + executor.seconds_to_end(request, found) > request.deadline:
                continue
            victims = self._victims(executor, request, found)
            if victims:
                cost = len(victims), *executor.seconds_to_token(request, found), executor.executor_id
                if best is None or cost < best[0]:
                    best = cost, executor, victims
        if best is None:
            return False
        _, executor, victims = best
        for victim in victims:
            self.preempt(executor, victim, A_STRONGER_CLAIM)
        self._start(executor, request, executor.cache.find_prefix(request), now)
        return True

    def _victims(self, executor: Executor, request: Request, found: FoundPrefix | None) -> list[Request]:
        """The weakest claims, as many as have to go before the request has room; none when all do not do."""
        token_count = min(len(request.token_ids) + 1, request.cache_limit)
        needed = executor.cache.starting_blocks(token_count, found) + executor.promised_count
        needed += executor.decoding_count - executor.cache.pool.free_count
        slots_needed = 1 - executor.slots.free_count
        weaker = [other for other in executor.running if self._policy.may_displace(request, other)]
        victims: list[Request] = []
        for other in sorted(weaker, key=lambda other: other.rank, reverse=True):
            if needed <= 0 and len(victims) >= slots_needed:
                break
            victims.append(other)
            needed -= executor.cache.private_blocks(other) + other.promised_count
            needed -= other not in executor.catching_up  # the block that is kept for who decodes
        return victims if needed <= 0 and len(victims) >= slots_needed else []

    def preempt(self, executor: Executor, request: Request, gave_way_for: str = Obstacle.BLOCKS.value) -> None:
        """Take a request off its executor. It is queued again once the plans that know it are answered: the tokens
        that these still bring count.
        """
        executor.release(request)
        request.state = RequestState.WAITING
        request.gave_way_for = gave_way_for
        self.preempted.append(request)
        self.note_change(executor)
        if executor.in_flight:
            executor.unsettled.append((executor.step, request))
        else:
            self.push(request)

    def settle(self, executor: Executor, step: int) -> None:
        """The result of `step` is in: those who were preempted before it can be queued."""
        while executor.unsettled and executor.unsettled[0][0] <= step:
            _, request = executor.unsettled.popleft()
            self.note_change(executor)
            if request.state is RequestState.WAITING:
                self.push(request)

    def check_invariants(self) -> set[Request]:
        """Return the requests that wait here, after holding the queue against itself."""
        queued = self.queue.check_invariants()
        assert not self.stranded & queued, "a request is set aside and queued"
        assert self._stranded_token_count == sum(len(r.token_ids) for r in self.stranded), "stranded tokens differ"
        assert self._kinds == Counter(executor.capacity for executor in self._executors), "kinds of executors differ"
        return queued | self.stranded
