"""What the next step of one executor computes: tokens, blocks and forks, once it is decided who runs there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.core.executor import Executor
from scheduler_svc.core.plan import Chunk, NewRequest, Plan
from scheduler_svc.core.request import Request

Preempt = Callable[[Executor, Request], None]


class StepPlanner:
    """Spends the tokens of one step. One instance plans one step."""

    def __init__(self, executor: Executor, place_more: Callable[[], None]) -> None:
        """Plan the next step of `executor`; `place_more` fills it up when some who are there have to wait."""
        self._executor = executor
        self._place_more = place_more
        self._started: list[Request] = []
        self._copies: list[tuple[int, int]] = []
        self._chunks: list[Chunk] = []
        self._suspect: Request | None = None  # the only one in this step that is catching up

    def plan(self, now: float, *, prefill_first: bool) -> Plan | None:
        """Decide what is computed; None when there is nothing.

        Requests that decode have a token each, and what is left of the step's tokens goes to those that catch up, in
        the order of their claims; or, with `prefill_first`, the other way round.
        """
        slots, token_count = self._executor.slots, self._executor.capacity.step_token_count
        if prefill_first:
            self._plan_chunks(token_count)
            chunked = [chunk.slot for chunk in self._chunks if chunk.samples]  # they decode from the next step on
            slots.decoding[chunked] = False
            decoding, skipped = slots.share_out(token_count - sum(chunk.count for chunk in self._chunks))
            slots.decoding[chunked] = True
        else:
            decoding, skipped = slots.share_out(token_count)
            self._plan_chunks(token_count - len(decoding))
        if not len(decoding) and not self._chunks:
            return None
        slots.planned[decoding] += 1
        return self._seal(decoding, skipped, now)

    def _plan_chunks(self, budget: int) -> None:
        """Let requests that catch up compute, strongest claim first.

        They take blocks from nobody: each was placed when its blocks were free, and waits for those that decoding
        requests took since. It cannot wait for ever: decoding requests end, and give back more than they took.
        """
        there = list(self._executor.catching_up)
        budget = self._serve(there, budget)
        while budget > 0 and self._executor.holding:
            self._place_more()
            known = set(there)
            newcomers = [request for request in self._executor.catching_up if request not in known]
            if not newcomers:
                return
            there += newcomers
            budget = self._serve(newcomers, budget)

    def _serve(self, requests: list[Request], budget: int) -> int:
        """Plan a chunk for each of the requests as far as the budget goes; returns what is left of it."""
        executor = self._executor
        for request in requests:
            if budget <= 0:
                return 0
            executor.adopt(request)
            missing = len(request.token_ids) - bool(request.unforked_count) - request.planned_count
            wanted = min(budget, missing)
            if wanted <= 0 or self._waits_for_another_suspect(request) or executor.holds_back(request):
                continue
            count = executor.cache.fitting_tokens(request, wanted, executor.spare_blocks(request))
            if count > 0:
                self._suspect = request if request.is_suspect else self._suspect
                count = count if count == missing else self._whole_units(request, count)
                self._compute(request, count)
                budget -= count
        return budget

    def _waits_for_another_suspect(self, request: Request) -> bool:
        """Whether the step has a suspect already: if the executor dies of one, it must be known of which."""
        return request.is_suspect and self._suspect is not None

    def _whole_units(self, request: Request, count: int) -> int:
        """Let a chunk that is not the last end where another request could go on from what it computes."""
        aligned_count = count - (request.planned_count + count) % self._executor.cache.match_size
        return aligned_count if aligned_count > 0 else count

    def _compute(self, request: Request, count: int) -> None:
        executor = self._executor
        start, end = request.planned_count, request.planned_count + count
        if request in executor.starting:
            self._copies += executor.cache.copy_tails(request)
            executor.append_blocks(request, end)
            executor.starting.remove(request)
            self._started.append(request)
        else:
            executor.append_blocks(request, end)
        executor.advance(request, count)
        samples = end == len(request.token_ids)
        units = tuple(executor.cache.units(request, start, end))
        executor.announce(units)
        self._chunks.append(Chunk(request.slot, request, start, count, samples, units))

    def _seal(self, decoding: NDArray[np.int64], skipped: NDArray[np.int64], now: float) -> Plan:
        """Make the plan a value, and count it as sent."""
        executor = self._executor
        slots = executor.slots
        sampling_slots = np.array([chunk.slot for chunk in self._chunks if chunk.samples], dtype=np.int64)
        row_slots = np.sort(np.concatenate((decoding, sampling_slots))) if len(sampling_slots) else decoding
        planned = slots.planned[row_slots]
        settles = planned % executor.cache.hashed_size == 0
        settles[np.searchsorted(row_slots, sampling_slots)] = True
        assert all(chunk.request.executor is executor for chunk in self._chunks), "who computes was taken off meanwhile"
        dropped, paused = slots.collect_changes([request.slot for request in self._started])
        executor.step += 1
        plan = Plan(
            step=executor.step,
            dropped_slots=dropped,
            copies=tuple(self._copies),
            new_requests=tuple(_describe(request) for request in self._started),
            appended=tuple(executor.untold_blocks),
            adopted=tuple(executor.untold_adoptions),
            paused_slots=paused,
            skipped_slots=skipped,
            chunks=tuple(self._chunks),
            row_slots=row_slots,
            rows=slots.owners[row_slots].tolist(),
            planned_at=now,
            announces=bool(executor.suspects),
            last_rows=np.flatnonzero(planned >= slots.limit[row_slots]).tolist(),
            settling=np.flatnonzero(settles).tolist(),
        )
        executor.untold_blocks, executor.untold_adoptions = [], []
        executor.send(plan)
        return plan


def grow_decoding(executor: Executor, preempt: Preempt) -> None:
    """Give every decoding request the blocks that its next token needs, strongest claim first.

    When they run out, the weakest claim on this executor gives its own back.
    """
    short = executor.slots.without_room()
    if sum(map(len, short)) <= executor.cache.pool.free_count:
        for group, slots in enumerate(short):
            if len(slots):
                executor.append_block_each(group, slots)
        return
    requests = {executor.slots.owners[slot] for slots in short for slot in slots.tolist()}
    for request in sorted(requests, key=lambda request: request.rank):
        if request.executor is not executor:
            continue  # it gave way to a stronger one
        token_count = int(executor.slots.planned[request.slot]) + 1
        while executor.cache.missing_blocks(request, token_count) > executor.cache.pool.free_count:
            weakest = max(executor.running, key=lambda other: other.rank)
            preempt(executor, weakest)
            if weakest is request:
                break
        else:
            executor.append_blocks(request, token_count)


def _describe(request: Request) -> NewRequest:
    return NewRequest(
        slot=request.slot,
        request_id=request.request_id,
        attempt=request.attempt,
        key=request.key,
        placement_count=request.placement_count,
        token_ids=request.token_ids[:],
        output_count=request.output_count,
        computed_count=request.computed_count,
        block_tables=tuple(table.entries() for table in request.tables),
        sampling=request.sampling,
        choice=request.choice,
        stop_token_ids=request.stop_token_ids,
        max_output_count=request.max_output_count,
        trace=request.trace,
    )
