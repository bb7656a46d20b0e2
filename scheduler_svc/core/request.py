"""A request, from admission to its last token."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler_svc.core.executor import Executor


class RequestState(Enum):
    """Where a request is."""

    WAITING = "waiting"  # queued, or preempted with results still to come; holds no blocks and no slot
    RUNNING = "running"  # placed; holds a slot, and a block for every computed and planned token
    FINISHED = "finished"  # has a finish reason; holds no blocks and no slot


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # end of sequence, a stop token, or a stop string
    LENGTH = "length"  # as many tokens as it asked for
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"  # it made a step fail; `Request.error` says how
    CUT_OFF = "cut off"  # the scheduler ends before it


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request chooses tokens; every default resolved."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # uint64


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A W3C trace context: `trace_id` 16 bytes, `span_id` 8 bytes, `flags` 1 is sampled."""

    trace_id: bytes
    span_id: bytes
    flags: int


@dataclass(slots=True, eq=False)
class Request:
    """One generation request, from admission to its last token.

    Scheduling a request means letting the cache catch up with `token_ids`. The step in which it catches up samples
    the next token. Prefill, decode and recomputation after preemption or loss are all this one case.
    """

    request_id: str
    token_ids: array[int]  # uint32: the prompt, then every sampled token that is known here
    prompt_count: int  # token_ids[:prompt_count] is the prompt
    max_output_count: int  # at least 1
    sampling: Sampling = Sampling()
    stop_token_ids: frozenset[int] = frozenset()
    deadline: float = math.inf  # on the clock of `now`
    trace: TraceContext | None = None

    # Kept by the scheduler:
    state: RequestState = RequestState.WAITING
    arrival: int = -1  # order of admission; the smaller, the older
    attempt: int = 0  # which placement this is, counted over all requests; 0 before the first
    placement_count: int = 0  # how often it was placed
    executor: Executor | None = None  # where it runs; None unless RUNNING
    slot: int = -1  # its number there; -1 unless RUNNING
    computed_count: int = 0  # token_ids[:computed_count] have keys and values in the cache, by the results so far
    planned_count: int = 0  # the same once every chunk planned has run; not maintained while decoding, see `Slots`
    block_ids: list[int] = field(default_factory=list)  # append-only while RUNNING
    placed_at: float | None = None  # first placement
    finish_reason: FinishReason | None = None  # set exactly when FINISHED
    error: str = ""

    @property
    def output_count(self) -> int:
        """Tokens generated and known."""
        return len(self.token_ids) - self.prompt_count

    @property
    def output_ids(self) -> array[int]:
        """The tokens generated and known."""
        return self.token_ids[self.prompt_count :]

    @property
    def final_length(self) -> int:
        """Tokens of prompt and output when it ends by length."""
        return self.prompt_count + self.max_output_count

    @property
    def cache_limit(self) -> int:
        """Tokens that it may ever have in the cache: the last one sampled is never computed."""
        return self.final_length - 1
