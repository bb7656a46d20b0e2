"""What the scheduler knows of one executor: its cache, its slots, the plans it has not answered."""

from __future__ import annotations

import bisect
import math
from collections import Counter, deque

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.core.cache import Cache, FoundPrefix
from scheduler_svc.core.layer_groups import BlockTable
from scheduler_svc.core.obstacles import Obstacle
from scheduler_svc.core.outlook import steps_until_full
from scheduler_svc.core.plan import Capacity, Chunk, HeldAttempt, HeldState, Plan
from scheduler_svc.core.request import Request, RequestState
from scheduler_svc.core.slots import Slots
from scheduler_svc.core.step_times import StepTimes

PLANS_IN_FLIGHT = 2
"""Credit of the step stream: a second plan lies ready while the first runs, so that the executor never waits."""

_LAG = PLANS_IN_FLIGHT - 1  # tokens that a decoding request is planned ahead of what is known, the next one aside


def most_blocks(capacity: Capacity, request: Request) -> int:
    """Blocks that the request holds at most on an executor of that capacity."""
    lag = _LAG + math.gcd(*(group.block_size for group in capacity.layer_groups))
    return sum(group.most_blocks(request.cache_limit, lag) for group in capacity.layer_groups)


def fits(capacity: Capacity, request: Request) -> bool:
    """Whether the request fits on an executor of that capacity at its longest, when it is alone."""
    return most_blocks(capacity, request) <= capacity.block_count


class Executor:
    """One attached executor, from the moment it can be planned for until it is lost."""

    def __init__(self, executor_id: str, capacity: Capacity, *, reuse: bool) -> None:
        """Start empty, with everything in `capacity` free; `reuse` keeps what was computed for others to use."""
        self.executor_id = executor_id
        self.capacity = capacity
        self.draining = False  # takes nothing new
        self.outgrown_by: Request | None = (
            None  # who waits because the pool would be outgrown, until somebody has ended
        )
        self.cache = Cache(capacity.layer_groups, capacity.block_count, lag=_LAG, reuse=reuse)
        self.slots = Slots(capacity.slot_count, [group.block_size for group in capacity.layer_groups])
        self.step_times = StepTimes(capacity.step_token_count)
        self.running: set[Request] = set()
        self._weakest: Request | None = None  # of those; None: to be looked for
        self.starting: set[Request] = set()  # placed; the executor has not been told
        self.forking: set[Request] = set()  # running, with choices that wait to be forked from them
        self.catching_up: list[Request] = []  # running with known tokens that are not planned, strongest claim first
        self.backlog_count = 0  # known tokens of `catching_up` that are not planned
        self.holding: dict[Request, int] = {}  # of these, who waits for what is in flight, and how many are theirs
        self.held_count = 0  # the sum of them
        self.promised_count = 0  # blocks that `catching_up` still needs for its known tokens
        self.untold_blocks: list[tuple[int, int, int]] = []  # (slot, layer group, block) that no plan has named yet
        self.untold_adoptions: list[tuple[int, int]] = []  # (slot, tokens), the same
        self.on_their_way: Counter[bytes] = Counter()  # contents that plans in flight compute, see `Cache.units`
        self.step = 0  # of the plan sent last
        self.in_flight: deque[Plan] = deque()  # sent and not answered, oldest first; at most PLANS_IN_FLIGHT
        self.unsettled: deque[tuple[int, Request]] = deque()  # preempted, to be queued when this step is answered
        self.suspects: set[Request] = set()  # running; one of them may have killed an executor, see `computing`
        self.started_step = 0  # the last step of which the executor said that it begins
        self.changed_at = 0  # count of changes, over all executors, at which it last may have got room
        self.known_count = 0  # prompt tokens of the requests whose first place is here
        self.reused_count = 0  # ... and that were there already

    @property
    def has_credit(self) -> bool:
        """Whether another plan may be sent."""
        return len(self.in_flight) < PLANS_IN_FLIGHT

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs here and no result is awaited."""
        return not self.running and not self.in_flight

    @property
    def is_stuck(self) -> bool:
        """Whether several run here and no result is awaited: when nothing can be planned then, nothing ever could."""
        return len(self.running) > 1 and not self.in_flight

    @property
    def decoding_count(self) -> int:
        """Running requests whose known tokens are all planned."""
        return len(self.running) - len(self.catching_up)

    def could_ever_hold(self, request: Request) -> bool:
        """Whether the request fits at its longest when it is alone."""
        return self.cache.most_blocks(request.cache_limit) <= self.capacity.block_count

    def coming_back(self) -> list[Request]:
        """Preempted requests that will be queued once their results are in."""
        return [request for _, request in self.unsettled if request.state is RequestState.WAITING]

    # --- placement ----------------------------------------------------------------------------------------------

    @property
    def weakest(self) -> Request | None:
        """Who runs here with the weakest claim, if anybody does."""
        if self._weakest is None and self.running:
            self._weakest = max(self.running, key=lambda request: request.rank)
        return self._weakest

    def takes(self, request: Request, *, prefill_first: bool, by_displacing: bool = False) -> bool:
        """Whether only blocks, or what `by_displacing` others would go away, may stand in the way of placing it here.

        The next step must have a token to spare: what stays in the queue can still go elsewhere. And nobody with a
        stronger claim who was preempted may be about to come back: the blocks that it gave were not given for this one.
        """
        return (
            not self.draining
            and (by_displacing or (self.slots.free_count > 0 and not self._is_outgrown_by(request)))
            and self._has_tokens_to_spare(prefill_first)
            and not self._is_owed_to_another(request)
            and self.could_ever_hold(request)
        )

    def obstacle_to(self, request: Request, *, prefill_first: bool) -> Obstacle:
        """What stands in the way of placing it here, as far as that is known without a look into the cache."""
        if not self.could_ever_hold(request):
            return Obstacle.LARGER
        if not self.slots.free_count:
            return Obstacle.SLOT
        if not self._has_tokens_to_spare(prefill_first):
            return Obstacle.TOKENS
        lacks_blocks = self._is_outgrown_by(request) or self._is_owed_to_another(request)
        return Obstacle.BLOCKS if lacks_blocks or not self.has_room_for(request, None) else Obstacle.STEP

    def _has_tokens_to_spare(self, prefill_first: bool) -> bool:
        ahead = self.backlog_count - self.held_count + (0 if prefill_first else self.decoding_count)
        return ahead < self.capacity.step_token_count

    def _is_owed_to_another(self, request: Request) -> bool:
        return any(other.rank < request.rank for other in self.coming_back())

    def _is_outgrown_by(self, request: Request) -> bool:
        """Whether somebody waits who is no larger than the request, and would outgrow the pool."""
        other = self.outgrown_by
        return (
            other is not None
            and other.state is RequestState.WAITING
            and request.cache_limit >= other.cache_limit
            and len(request.token_ids) >= len(other.token_ids)
        )

    def has_room_for(self, request: Request, found: FoundPrefix | None) -> bool:
        """Whether the request can reach its next token without taking blocks from anybody, and others go on meanwhile.

        Its tokens and the one after them need blocks beyond those promised to requests that are catching up, and a
        block is left for each of those that decode: to take the last ones would preempt somebody soon.
        """
        token_count = min(len(request.token_ids) + 1, request.cache_limit)
        needed = self.cache.starting_blocks(token_count, found)
        return needed + self.promised_count + self.decoding_count <= self.cache.pool.free_count

    def has_room_to_fork(self) -> bool:
        """Whether a choice can start on what its prompt has left here: it takes a block in each layer group, a copy of
        the last one or a new one.
        """
        free_count = self.cache.pool.free_count - self.promised_count - self.decoding_count
        return self.slots.free_count > 0 and free_count >= len(self.cache.groups)

    def will_have_room_for(self, request: Request, found: FoundPrefix | None, share: float) -> bool:
        """Whether it is worth while to start the request, when everybody here generates `share` of what it still may.

        Where blocks would run out, the request must have doubled before. So what is computed again after preemptions is
        at most twice what a request has in the end, however long it takes.
        """
        slots = self.slots
        token_counts = np.append(slots.planned, len(request.token_ids)).astype(np.float64)
        remaining = np.append(slots.limit, request.cache_limit) - token_counts
        remaining = np.floor(np.maximum(remaining, 0.0) * share)
        per_token = self.cache.blocks_per_token
        held = self.capacity.block_count - self.cache.pool.free_count + self.promised_count
        held += self.cache.starting_blocks(len(request.token_ids), found)
        if held + remaining.sum() * per_token <= self.capacity.block_count:
            return True
        steps = steps_until_full(self.capacity.block_count, held, token_counts, remaining, per_token)
        return steps >= len(request.token_ids)

    def seconds_to_token(self, request: Request, found: FoundPrefix | None) -> tuple[float, int]:
        """(seconds, tokens of work) until the next token of a request that is placed here now, as far as is known."""
        computed = found.token_count if found else 0
        work = self.backlog_count + len(request.token_ids) - computed
        spare = max(1, self.capacity.step_token_count - self.decoding_count)
        step_count = -(-work // spare) + len(self.in_flight)
        return (
            self.step_times.seconds(step_count, work + step_count * self.decoding_count),
            work + self.decoding_count,
        )

    def seconds_to_end(self, request: Request, found: FoundPrefix | None) -> float:
        """Seconds until a request that is placed here now has all its tokens, or its next where it names no length."""
        seconds, _ = self.seconds_to_token(request, found)
        if request.length_is_bounded:
            left = request.max_output_count - request.output_count - 1
            seconds += self.step_times.seconds(left, left * (len(self.running) + 1))
        return seconds

    def least_seconds_to_token(self, request: Request, found: FoundPrefix | None, now: float) -> float:
        """Seconds that its next token takes at the very least, if everything else stood back."""
        work = len(request.token_ids) - (found.token_count if found else 0)
        return self.step_times.least_seconds(-(-work // self.capacity.step_token_count), work, now)

    def start(self, request: Request, found: FoundPrefix | None) -> None:
        """Place a request here, on the blocks that were found for it."""
        self.cache.open_tables(request)
        if found is not None:
            self.cache.adopt(request, found)
        if request.placement_count == 1:  # what is found again after a preemption was never saved
            self.known_count += request.prompt_count
            request.reused_count = min(request.planned_count, request.prompt_count)
            self.reused_count += request.reused_count
        self._settle_in(request)
        if request.unforked_count:
            self.forking.add(request)

    def take_over(self, attempts: list[HeldAttempt]) -> None:
        """Go on with what the executor still has of requests, in their slots and on their blocks."""
        tables = [self.cache.seen_tables(held.block_tables, held.computed_count) for held in attempts]
        self.cache.pool.claim(block for own in tables for table in own for block in table.block_ids)
        for held, own in zip(attempts, tables, strict=True):
            self._take_over(held, own)

    def _take_over(self, held: HeldAttempt, tables: tuple[BlockTable, ...]) -> None:
        request = held.request
        assert request is not None
        assert held.slot is not None
        decoding = held.state is HeldState.DECODING
        self.cache.take_over(request, tables, held.computed_count)
        self.slots.take_over(held.slot, request, held.computed_count, decoding=decoding)
        self._note_running(request, held.slot)
        if not decoding:
            self._note_catching_up(request)
        if request.unforked_count:
            self.forking.add(request)

    def fork(self, parent: Request, child: Request) -> None:
        """Place a choice here, on the blocks of what `parent` has computed of their prompt."""
        self.cache.fork(parent, child, parent.computed_count)
        self._settle_in(child)

    def _settle_in(self, request: Request) -> None:
        self._note_running(request, self.slots.take(request))
        self.starting.add(request)
        self._note_catching_up(request)

    def _note_running(self, request: Request, slot: int) -> None:
        request.executor = self
        request.slot = slot
        self.slots.note_room(request)
        self.running.add(request)
        self._weakest = None
        if request.is_suspect:
            self.suspects.add(request)

    def _note_catching_up(self, request: Request) -> None:
        bisect.insort(self.catching_up, request, key=lambda other: other.rank)
        self.backlog_count += len(request.token_ids) - request.planned_count
        self._promise(request)

    def release(self, request: Request) -> None:
        """Take everything from a request that runs here: it ended, or gives way."""
        if request in self.catching_up:
            self._leave_catching_up(request)
            self.backlog_count -= len(request.token_ids) - request.planned_count
        self.starting.discard(request)
        self.forking.discard(request)
        self.suspects.discard(request)
        self.running.remove(request)
        self._weakest = None
        self.outgrown_by = None
        self._forget_untold(request.slot)
        self.slots.release(request.slot)
        self.cache.release(request)
        request.computed_count = request.planned_count = 0
        request.executor = None
        request.slot = -1

    def _forget_untold(self, slot: int) -> None:
        if self.untold_blocks:
            self.untold_blocks = [entry for entry in self.untold_blocks if entry[0] != slot]
        if self.untold_adoptions:
            self.untold_adoptions = [entry for entry in self.untold_adoptions if entry[0] != slot]

    # --- blocks and tokens of those that run --------------------------------------------------------------------

    def append_blocks(self, request: Request, token_count: int) -> None:
        """Take the blocks that its first `token_count` tokens need."""
        self._note_appended(request, self.cache.append(request, token_count))

    def append_block_each(self, group: int, slots: NDArray[np.int64]) -> None:
        """Give each of these slots, which the executor knows, one more block in a layer group."""
        block_ids = self.cache.pool.take(len(slots))
        self.slots.room[group, slots] += self.cache.groups[group].block_size
        for slot, owner, block in zip(slots.tolist(), self.slots.owners[slots], block_ids, strict=True):
            owner.tables[group].block_ids.append(block)
            self.untold_blocks.append((slot, group, block))

    def _note_appended(self, request: Request, appended: list[tuple[int, int]]) -> None:
        self.slots.note_room(request)
        if request not in self.starting:  # else the plan in which it starts has its whole tables
            self.untold_blocks += [(request.slot, group, block) for group, block in appended]

    def spare_blocks(self, request: Request) -> int:
        """Free blocks that a request which is catching up may take: its own promise, and what is promised to nobody."""
        return self.cache.pool.free_count - self.promised_count + request.promised_count

    def holds_back(self, request: Request) -> bool:
        """Whether a request that is catching up waits for what is in flight, so that others go first: another one
        computes the same, or its own last chunk has to be there before it can adopt what follows.
        """
        self._stop_holding(request)
        if not self._should_hold(request):
            return False
        self.holding[request] = len(request.token_ids) - request.planned_count
        self.held_count += self.holding[request]
        return True

    def _stop_holding(self, request: Request) -> None:
        self.held_count -= self.holding.pop(request, 0)

    def _should_hold(self, request: Request) -> bool:
        unit = self.cache.next_unit(request)
        if unit is None:
            return False
        if request.planned_count != request.computed_count:
            return self.cache.find_prefix(request) is not None
        return unit in self.on_their_way

    def adopt(self, request: Request) -> None:
        """Spare a request that is catching up the tokens that are in the cache by now."""
        if request.planned_count != request.computed_count or (found := self.cache.find_prefix(request)) is None:
            return
        self._stop_holding(request)
        token_count = found.token_count - request.planned_count
        self._note_appended(request, self.cache.adopt(request, found))
        if request not in self.starting:
            self.untold_adoptions.append((request.slot, token_count))
        self.backlog_count -= token_count
        self.reused_count += token_count
        if request.placement_count == 1 and not request.output_count:
            request.reused_count += token_count
        self._promise(request)

    def advance(self, request: Request, token_count: int) -> None:
        """Note that `token_count` more known tokens of a request that is catching up are planned."""
        request.planned_count += token_count
        self.backlog_count -= token_count
        if request.planned_count == len(request.token_ids):
            self._leave_catching_up(request)
            self.slots.planned[request.slot] = request.planned_count
            self.slots.decoding[request.slot] = True
        else:
            self._promise(request)

    def settle(self, request: Request) -> None:
        """Its `computed_count` went up by a result: blocks may be full, or have slid out of what is seen."""
        self.cache.settle(request)
        if not self.slots.decoding[request.slot] and request in self.catching_up:
            self._promise(request)

    def _promise(self, request: Request) -> None:
        """Keep as many free blocks for a request that is catching up as it will take until it has."""
        outstanding = self.cache.outstanding_blocks(request, len(request.token_ids))
        self.promised_count += outstanding - request.promised_count
        request.promised_count = outstanding

    def _leave_catching_up(self, request: Request) -> None:
        self.catching_up.remove(request)
        self._stop_holding(request)
        self.promised_count -= request.promised_count
        request.promised_count = 0

    # --- steps --------------------------------------------------------------------------------------------------

    def send(self, plan: Plan) -> None:
        """Count a plan as sent."""
        self.in_flight.append(plan)

    def announce(self, units: tuple[bytes, ...]) -> None:
        """A chunk of the plan that is being made computes these; see `Cache.units`."""
        self.on_their_way.update(units)

    def computing(self) -> tuple[set[Request], Request | None]:
        """Who the executor may be computing now; and who of them must be to blame if one is: the only suspect, else the
        only one who was not decoding before, else the only one.
        """
        plans = self._running_plans()
        chunked = {chunk.request for plan in plans for chunk in plan.chunks}
        computing = {r for r in (*chunked, *(row for plan in plans for row in plan.rows)) if r.executor is self}
        suspects = {request for request in computing if request.is_suspect}
        prime = suspects or chunked & computing or computing
        return computing, next(iter(prime)) if len(prime) == 1 else None

    def _running_plans(self) -> list[Plan]:
        """The plans of which the executor may be running one: a result may be in the process still when the next plan
        runs. Where it is to say that it begins, that is known.
        """
        running: list[Plan] = []
        for plan in self.in_flight:
            if not plan.announces:
                running.append(plan)
            elif self.started_step >= plan.step:
                running = [plan]
            else:
                break
        return running

    def clear_suspects(self, tokens: list[tuple[Request, int]]) -> None:
        """Who got a token did not kill this executor with it."""
        for request, _ in tokens:
            self.suspects.discard(request)
            request.is_suspect = False
            request.kill_count = 0

    def take_answered(self) -> Plan:
        """The oldest plan in flight, which is answered now."""
        plan = self.in_flight.popleft()
        for chunk in plan.chunks:
            self._no_longer_on_their_way(chunk)
        return plan

    def _no_longer_on_their_way(self, chunk: Chunk) -> None:
        for unit in chunk.units:
            self.on_their_way[unit] -= 1
            if not self.on_their_way[unit]:
                del self.on_their_way[unit]

    # --- checks -------------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Hold the sums that are kept against what they sum up."""
        assert all(request.executor is self for request in self.running), "a running request names another executor"
        owned = {request.slot: request for request in self.running}
        assert len(owned) == len(self.running), "two requests share a slot"
        for slot, owner in enumerate(self.slots.owners):
            assert owner is owned.get(slot), "a slot's owner is not the request that names it"
        for request in self.running:
            self._check_tables(request)
        self._check_blocks()
        assert set(self.catching_up) <= self.running, "a request catches up without running"
        assert self.catching_up == sorted(self.catching_up, key=lambda r: r.rank), "the stronger claim is not first"
        assert self.starting <= set(self.catching_up), "a request started, unknown to the executor, and is planned"
        assert self.suspects == {r for r in self.running if r.is_suspect}, "the suspects are not those who run"
        assert self.forking == {r for r in self.running if r.unforked_count}, "choices wait for who is not here"
        assert self.backlog_count == sum(len(r.token_ids) - r.planned_count for r in self.catching_up)
        assert self.held_count == sum(self.holding.values()), "held tokens do not add up"
        assert all(count == len(r.token_ids) - r.planned_count for r, count in self.holding.items()), "who holds moved"
        assert self.holding.keys() <= set(self.catching_up), "somebody holds who does not catch up"
        assert self.promised_count == sum(r.promised_count for r in self.catching_up), "promises do not add up"
        assert len(self.in_flight) <= PLANS_IN_FLIGHT, "credit exceeded"
        on_their_way = Counter(unit for plan in self.in_flight for chunk in plan.chunks for unit in chunk.units)
        assert on_their_way == self.on_their_way, "what is said to be in flight differs from the plans"

    def _check_tables(self, request: Request) -> None:
        catches_up = request in self.catching_up
        planned = request.planned_count if catches_up else int(self.slots.planned[request.slot])
        assert request.computed_count <= planned, "more is computed than was planned"
        assert len(request.tables) == len(self.cache.groups), "a layer group has no block table"
        for number, (group, table) in enumerate(zip(self.cache.groups, request.tables, strict=True)):
            room = table.end * group.block_size
            assert planned <= room, "a planned token has no block"
            assert self.slots.room[number, request.slot] == room, "room differs"
            assert table.first <= group.first_block(request.computed_count), "a block that is still seen was given back"
            most = group.most_blocks(planned, self.cache.lag)
            in_flight = planned - request.computed_count
            assert len(table.block_ids) <= most + group.blocks_for(in_flight) + 1, "blocks that nobody sees are held"
        if catches_up:
            outstanding = self.cache.outstanding_blocks(request, len(request.token_ids))
            assert request.promised_count == outstanding, "promised blocks differ from what is still needed"

    def _check_blocks(self) -> None:
        held = Counter(b for request in self.running for table in request.tables for b in table.block_ids)
        self.cache.pool.check_invariants(held)
        for group_number, group in enumerate(self.cache.groups):
            for request in self.running:
                table = request.tables[group_number]
                shared = [b for b in table.block_ids if held[b] > 1]
                written = request.computed_count // group.block_size
                own = set(table.block_ids[max(0, written - table.first) :])
                tail = {table.block_ids[-1]} if group_number in request.shared_tails else set()
                source = _tails_shared_from(self.running, group_number)
                assert not (own - tail - source) & set(shared), "a block that is written is shared"


def _tails_shared_from(running: set[Request], group: int) -> set[int]:
    """Blocks that choices share until they copy them; who computed them goes on writing behind what is shared."""
    return {r.tables[group].block_ids[-1] for r in running if group in r.shared_tails}
