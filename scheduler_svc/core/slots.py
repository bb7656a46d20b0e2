"""The slots of one executor as the plans sent so far leave them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.core.request import Rank, Request


class Slots:
    """Who has which slot, in arrays, because every decoding request is looked at in every step."""

    def __init__(self, slot_count: int, block_sizes: Sequence[int]) -> None:
        """Start with all slots free; `block_sizes` are the tokens of a block in each layer group."""
        self.owners: NDArray[np.object_] = np.full(slot_count, None, dtype=object)  # Request | None
        self.decoding: NDArray[np.bool_] = np.zeros(slot_count, dtype=bool)  # computes a token in every step
        # Tokens in the cache then; of a request that is catching up, once it has.
        self.planned: NDArray[np.int64] = np.zeros(slot_count, dtype=np.int64)
        # Tokens that its blocks have room for, by layer group.
        self.room: NDArray[np.int64] = np.zeros((len(block_sizes), slot_count), dtype=np.int64)
        self.limit: NDArray[np.int64] = np.zeros(slot_count, dtype=np.int64)  # planned tokens at which it is through
        self._block_sizes = tuple(block_sizes)
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
        self.planned[slot] = len(request.token_ids)
        self.room[:, slot] = 0
        self.limit[slot] = request.cache_limit
        return slot

    def take_over(self, slot: int, request: Request, planned_count: int, *, decoding: bool) -> None:
        """Give `request` the slot that it has on the executor already."""
        self._free.remove(slot)
        heapq.heapify(self._free)
        self.owners[slot] = request
        self.planned[slot] = planned_count
        self.limit[slot] = request.cache_limit
        self.decoding[slot] = decoding
        self._known_there.add(slot)

    def empty(self, slot: int) -> None:
        """Have the executor forget whom it has in a slot that is free here."""
        self._dropped.add(slot)

    def release(self, slot: int) -> None:
        """Take a slot from its owner; it may be taken again at once."""
        self.owners[slot] = None
        self.planned[slot] = self.limit[slot] = 0
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

    def note_room(self, request: Request) -> None:
        """The request's block tables have changed."""
        for group, (table, size) in enumerate(zip(request.tables, self._block_sizes, strict=True)):
            self.room[group, request.slot] = table.end * size

    def without_room(self) -> list[NDArray[np.int64]]:
        """The decoding slots whose next token needs another block, by layer group."""
        return [np.flatnonzero(self.decoding & (self.planned >= room)) for room in self.room]

    def share_out(self, token_count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The decoding slots that compute in a step with this many tokens left, and those that sit it out.

        Where not all can, the strongest claims go on.
        """
        decoding = np.flatnonzero(self.decoding)
        if len(decoding) <= token_count:
            return decoding, decoding[:0]
        by_claim = sorted(decoding.tolist(), key=lambda slot: self._rank(slot))
        on, out = by_claim[:token_count], by_claim[token_count:]
        return np.array(sorted(on), dtype=np.int64), np.array(sorted(out), dtype=np.int64)

    def _rank(self, slot: int) -> Rank:
        owner: Request = self.owners[slot]
        return owner.rank

    def collect_changes(self, new_slots: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Take (dropped, paused) slots for the plan that also starts requests in `new_slots`."""
        changes = tuple(sorted(self._dropped)), tuple(sorted(self._paused))
        self._dropped.clear()
        self._paused.clear()
        self._known_there.update(new_slots)
        return changes
