"""Values that leave and enter the core: plans, results, outputs."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.request import Request, Sampling, TraceContext


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits on an executor, as it said when it joined."""

    layer_groups: tuple[LayerGroup, ...]  # at least one
    block_count: int  # any block serves any group
    slot_count: int  # requests at once
    step_token_count: int  # tokens one step may compute, at least slot_count


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that starts, or starts again, in a slot."""

    slot: int
    request_id: str
    attempt: int
    key: int  # the caller's number for it
    placement_count: int  # how often it was placed, this time included
    token_ids: array[int]  # a copy: prompt and outputs known when the plan was made
    output_count: int
    computed_count: int  # of these tokens, those whose keys and values are in its blocks already
    block_tables: tuple[tuple[int, ...], ...]  # by layer group
    sampling: Sampling
    choice: int
    stop_token_ids: frozenset[int]
    max_output_count: int
    trace: TraceContext | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of known tokens that a slot computes: [start, start + count)."""

    slot: int
    request: Request
    start: int
    count: int
    samples: bool  # whether it reaches the last known token
    units: tuple[bytes, ...] = ()  # contents on their way into the cache, see `Cache.units`


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one step computes, as changes to what the executor knows; takes effect in the order of the fields.

    `rows` are the owners of the result's tokens. They may finish, or be preempted, while the step is in flight; what
    the result says is read against them, never against the slots.
    """

    step: int
    dropped_slots: tuple[int, ...]
    copies: tuple[tuple[int, int], ...]  # (source, destination) blocks
    new_requests: tuple[NewRequest, ...]
    appended: tuple[tuple[int, int, int], ...]  # (slot, layer group, block), in the order of appending
    adopted: tuple[tuple[int, int], ...]  # (slot, tokens that are in the cache already)
    paused_slots: tuple[int, ...]
    skipped_slots: NDArray[np.int64]  # decoding slots that sit this step out
    chunks: tuple[Chunk, ...]
    row_slots: NDArray[np.int64]  # [S] slots that sample, ascending
    rows: list[Request]  # [S] who they are
    last_rows: list[int]  # of the rows, those whose token is the last that their request asked for
    planned_at: float
    announces: bool  # whether the executor says when it begins: a request in it is suspected of killing executors
    settling: list[int]  # of the rows, those whose blocks change hands with the result: one is full, or slid out

    @property
    def request_count(self) -> int:
        """Requests that the step computes something for."""
        return len(self.rows) + sum(not chunk.samples for chunk in self.chunks)

    @property
    def token_count(self) -> int:
        """Tokens that the step computes."""
        sampling_chunk_count = sum(chunk.samples for chunk in self.chunks)
        return len(self.rows) - sampling_chunk_count + sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Result:
    """What one step computed."""

    step: int
    token_ids: list[int]  # one for each row of the plan; -1 where the executor had stopped the row, or it failed
    errors: dict[int, str] = field(default_factory=dict)  # slot -> what went wrong there
    seconds: float = 0.0  # that the executor worked on it
    out_of_memory: frozenset[int] = frozenset()  # those of `errors` that only lacked memory, and may run elsewhere


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a result, or an executor that came back, means for requests: tokens first, then ends."""

    tokens: list[tuple[Request, int]]  # a result has at most one for each request, in the order of the plan's rows
    finished: list[Request]


class HeldState(Enum):
    """What an attempt that an executor holds would do next."""

    CATCHING_UP = "catching up"  # waits for a chunk
    DECODING = "decoding"  # computes the token sampled last in every step
    HALTED = "halted"  # computes nothing more


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """An attempt at a request that an executor still has when it is attached again."""

    request: Request | None  # None: it is not known here, or with other tokens
    slot: int | None  # None: it lost its slot, and is here for its output alone
    attempt: int
    output_ids: array[int]  # generated so far; begins with what is known here
    computed_count: int  # tokens whose keys and values are in its blocks
    state: HeldState
    block_tables: tuple[tuple[int, ...], ...]  # by layer group; entries that are not seen any more may be stale
    error: str = ""  # why it failed there, for good


@dataclass(frozen=True, slots=True)
class Inventory:
    """What an executor still has when it is attached again. Blocks that nothing with a slot names are free."""

    last_step: int
    held: tuple[HeldAttempt, ...]


class ProtocolError(Exception):
    """An executor said what no correct executor says; it must be given up."""


class NeverFitsError(ValueError):
    """No executor of the pool could ever hold the request."""
