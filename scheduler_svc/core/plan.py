"""Values that leave and enter the core: plans, results, outputs."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scheduler_svc.core.request import Request, Sampling, TraceContext


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits on an executor, as it said when it joined."""

    block_size: int  # tokens
    block_count: int
    slot_count: int  # requests at once
    step_token_count: int  # tokens one step may compute, at least slot_count

    @property
    def token_count(self) -> int:
        """Tokens that the cache holds."""
        return self.block_size * self.block_count


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that starts, or starts again, in a slot."""

    slot: int
    request_id: str
    attempt: int
    token_ids: array[int]  # a copy: prompt and outputs known when the plan was made
    output_count: int
    block_ids: tuple[int, ...]
    sampling: Sampling
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


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one step computes, as changes to what the executor knows; takes effect in the order of the fields.

    `rows` are the owners of the result's tokens. They may finish, or be preempted, while the step is in flight; what
    the result says is read against them, never against the slots.
    """

    step: int
    dropped_slots: tuple[int, ...]
    new_requests: tuple[NewRequest, ...]
    appended: tuple[tuple[int, int], ...]  # (slot, block), in the order of appending
    paused_slots: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    row_slots: NDArray[np.int64]  # [S] slots that sample, ascending
    rows: list[Request]  # [S] who they are

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


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a result means for requests: tokens first, then ends."""

    tokens: list[tuple[Request, int]]  # in the order of the plan's rows; at most one for each request
    finished: list[Request]


class ProtocolError(Exception):
    """An executor said what no correct executor says; it must be given up."""


class NeverFitsError(ValueError):
    """No executor of the pool could ever hold the request."""
