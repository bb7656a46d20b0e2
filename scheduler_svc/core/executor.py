"""What the scheduler knows of one executor: its blocks, its slots, the plans it has not answered."""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.core.blocks import BlockPool, blocks_for
from scheduler_svc.core.plan import Capacity, Plan
from scheduler_svc.core.request import Request

PLANS_IN_FLIGHT = 2
"""Credit of the step stream: a second plan lies ready while the first runs, so that the executor never waits."""


class Slots:
    """The slots of one executor as the plans sent so far leave them, in arrays, because every decoding request is
    looked at in every step.
    """

    def __init__(self, slot_count: int) -> None:
        """Start with all slots free."""
        self.owners: NDArray[np.object_] = np.full(slot_count, None, dtype=object)  # Request | None
        self.decoding: NDArray[np.bool_] = np.zeros(slot_count, dtype=bool)  # computes a token in every step
        self.planned: NDArray[np.int64] = np.zeros(slot_count, dtype=np.int64)  # decoding: tokens in the cache then
        self.room: NDArray[np.int64] = np.zeros(slot_count, dtype=np.int64)  # tokens that its blocks hold
        self.limit: NDArray[np.int64] = np.zeros(slot_count, dtype=np.int64)  # planned tokens at which it is through
        self._free = list(range(slot_count))  # a heap: low numbers first keeps rows dense
        self._known_there: set[int] = set()  # slots whose owner the executor was told of
        self._dropped: set[int] = set()  # ... and has not been told to forget
        self._paused: set[int] = set()  # slots to be paused with the next plan

    @property
    def free_count(self) -> int:
        """Slots without an owner."""
        return len(self._free)

    def take(self, request: Request) -> int:
        """Give `request` the lowest free slot."""
        slot = heapq.heappop(self._free)
        self.owners[slot] = request
        self.planned[slot] = 0
        self.room[slot] = 0
        self.limit[slot] = request.cache_limit
        return slot

    def release(self, slot: int) -> None:
        """Take a slot from its owner; it may be taken again at once."""
        self.owners[slot] = None
        self.decoding[slot] = False
        heapq.heappush(self._free, slot)
        self._paused.discard(slot)
        if slot in self._known_there:
            self._known_there.remove(slot)
            self._dropped.add(slot)

    def pause_exhausted(self) -> None:
        """Stop decoding where every token that may be sampled is planned."""
        exhausted = np.flatnonzero(self.decoding & (self.planned >= self.limit))
        self.decoding[exhausted] = False
        self._paused.update(exhausted.tolist())

    def without_room(self) -> list[Request]:
        """Decoding requests whose next token needs another block, oldest first."""
        short = self.owners[self.decoding & (self.planned >= self.room)]
        return sorted(short, key=lambda request: request.arrival)

    def collect_changes(self, new_slots: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Take (dropped, paused) slots for the plan that also starts requests in `new_slots`."""
        changes = tuple(sorted(self._dropped)), tuple(sorted(self._paused))
        self._dropped.clear()
        self._paused.clear()
        self._known_there.update(new_slots)
        return changes


class Executor:
    """One attached executor, from the moment it can be planned for until it is lost."""

    def __init__(self, executor_id: str, capacity: Capacity) -> None:
        """Start empty, with everything in `capacity` free."""
        self.executor_id = executor_id
        self.capacity = capacity
        self.draining = False  # takes nothing new
        self.blocks = BlockPool(capacity.block_count, capacity.block_size)
        self.slots = Slots(capacity.slot_count)
        self.running: set[Request] = set()
        self.starting: set[Request] = set()  # placed; the executor has not been told
        self.catching_up: list[Request] = []  # running with known tokens that are not planned, oldest first
        self.backlog_count = 0  # known tokens of `catching_up` that are not planned
        self.promised_count = 0  # blocks that `catching_up` still needs for its known tokens
        self.step = 0  # of the plan sent last
        self.in_flight: deque[Plan] = deque()  # sent and not answered, oldest first; at most PLANS_IN_FLIGHT
        self.unsettled: deque[tuple[int, Request]] = deque()  # preempted, to be queued when this step is answered

    @property
    def has_credit(self) -> bool:
        """Whether another plan may be sent."""
        return len(self.in_flight) < PLANS_IN_FLIGHT

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs here and no result is awaited."""
        return not self.running and not self.in_flight

    def blocks_for(self, token_count: int) -> int:
        """Blocks that `token_count` tokens fill here."""
        return blocks_for(token_count, self.capacity.block_size)

    def could_ever_hold(self, request: Request) -> bool:
        """Whether the request fits at its longest when it is alone."""
        return self.blocks_for(request.cache_limit) <= self.capacity.block_count

    def has_room_for(self, request: Request) -> bool:
        """Whether the request can start now and reach its next token without taking blocks from anybody.

        Its tokens and the one after them need blocks beyond those promised to requests that are catching up. The
        next step must have a token to spare: what stays in the queue can still go elsewhere. And nobody who was
        preempted may be about to come back: the blocks that it gave were not given for a newcomer.
        """
        needed = self.blocks_for(min(len(request.token_ids) + 1, request.cache_limit)) + self.promised_count
        ahead = self.backlog_count + len(self.running) - len(self.catching_up)
        return (
            not self.draining
            and not self.unsettled
            and self.slots.free_count > 0
            and ahead < self.capacity.step_token_count
            and needed <= self.blocks.free_count
            and self.could_ever_hold(request)
        )

    def work_ahead(self) -> int:
        """Tokens that come before those of a request placed here now: one for each that decodes, and the backlog."""
        return self.backlog_count + len(self.running)

    def start(self, request: Request) -> None:
        """Place a request here."""
        request.executor = self
        request.slot = self.slots.take(request)
        request.computed_count = request.planned_count = 0
        self.running.add(request)
        self.starting.add(request)
        self.catching_up.append(request)
        self.catching_up.sort(key=lambda other: other.arrival)
        self.backlog_count += len(request.token_ids)
        self.promised_count += self.blocks_for(len(request.token_ids))

    def release(self, request: Request) -> None:
        """Take everything from a request that runs here: it ended, or gives way."""
        if request in self.catching_up:
            self.catching_up.remove(request)
            self._forget_backlog(request)
        self.starting.discard(request)
        self.running.remove(request)
        self.slots.release(request.slot)
        self.blocks.give_back(request.block_ids)
        request.block_ids = []
        request.executor = None
        request.slot = -1

    def append_blocks(self, request: Request, count: int) -> list[int]:
        """Give the request `count` of the free blocks; returns them."""
        taken = self.blocks.take(count)
        request.block_ids.extend(taken)
        self.slots.room[request.slot] += count * self.capacity.block_size
        if not self.slots.decoding[request.slot]:
            self.promised_count -= count
        return taken

    def take_blocks_for(self, request: Request, token_count: int) -> tuple[int, list[int]]:
        """Take blocks for up to `token_count` more planned tokens; returns (tokens that fit, blocks taken)."""
        missing = self.blocks_for(request.planned_count + token_count) - len(request.block_ids)
        taken = self.append_blocks(request, min(missing, self.blocks.free_count))
        room = len(request.block_ids) * self.capacity.block_size - request.planned_count
        return min(token_count, room), taken

    def advance(self, request: Request, token_count: int) -> None:
        """Note that `token_count` more known tokens of a request that is catching up are planned."""
        request.planned_count += token_count
        self.backlog_count -= token_count
        if request.planned_count == len(request.token_ids):
            self.catching_up.remove(request)
            self.slots.planned[request.slot] = request.planned_count
            self.slots.decoding[request.slot] = True

    def _forget_backlog(self, request: Request) -> None:
        known = len(request.token_ids)
        self.backlog_count -= known - request.planned_count
        self.promised_count -= self.blocks_for(known) - len(request.block_ids)

    def check_invariants(self) -> None:
        """Hold the sums that are kept against what they sum up."""
        assert all(request.executor is self for request in self.running), "a running request names another executor"
        owned = {request.slot: request for request in self.running}
        assert len(owned) == len(self.running), "two requests share a slot"
        for slot, owner in enumerate(self.slots.owners):
            assert owner is owned.get(slot), "a slot's owner is not the request that names it"
            if owner is not None:
                assert self.slots.room[slot] == len(owner.block_ids) * self.capacity.block_size, "room differs"
                planned = self.slots.planned[slot] if owner not in self.catching_up else owner.planned_count
                assert planned <= len(owner.block_ids) * self.capacity.block_size, "a planned token has no block"
                assert owner.computed_count <= planned, "more is computed than was planned"
        self.blocks.check_invariants([block for request in self.running for block in request.block_ids])
        assert set(self.catching_up) <= self.running, "a request catches up without running"
        assert self.starting <= set(self.catching_up), "a request started, unknown to the executor, and is planned"
        assert self.backlog_count == sum(len(r.token_ids) - r.planned_count for r in self.catching_up)
        assert self.promised_count == sum(
            self.blocks_for(len(r.token_ids)) - len(r.block_ids) for r in self.catching_up
        ), "promised blocks differ from what those that catch up still need"
        assert len(self.in_flight) <= PLANS_IN_FLIGHT, "credit exceeded"
