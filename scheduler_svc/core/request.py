"""A request, from admission to its last token."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler_svc.core.executor import Executor
    from scheduler_svc.core.layer_groups import BlockTable

Rank = tuple[float, ...]
"""How strong a request's claim is under a policy; the smaller goes first. No two requests have the same."""


class RequestState(Enum):
    """Where a request is."""

    # Queued, kept for an executor that may come back, preempted with results still to come, or to be forked. Holds no
    # blocks and no slot.
    WAITING = "waiting"
    RUNNING = "running"  # placed; holds a slot, and a block for every computed and planned token that is still seen
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
    span_id: bytes  # of the request itself
    flags: int
    parent_id: bytes = b""  # span of the caller that it is a part of; b"" for none


@dataclass(slots=True, eq=False)
class Request:
    """One generation request, from admission to its last token.

    Scheduling a request means letting the cache catch up with `token_ids`. The step in which it catches up samples
    the next token. Prefill, decode and recomputation after preemption or loss are all this one case.

    A request for several choices is as many of these, with one id; see `with_choices`.
    """

    request_id: str
    token_ids: array[int]  # uint32: the prompt, then every sampled token that is known here
    prompt_count: int  # token_ids[:prompt_count] is the prompt
    max_output_count: int  # at least 1
    sampling: Sampling = Sampling()
    stop_token_ids: frozenset[int] = frozenset()
    deadline: float = math.inf  # on the clock of `now`
    length_is_bounded: bool = True  # whether the user named max_output_count
    priority: int = 0  # the larger goes first, where the policy looks at it
    tenant: str = ""
    cache_salt: str = ""  # requests with different salts never share blocks
    choice: int = 0  # which of the continuations of one prompt
    trace: TraceContext | None = None
    key: int = 0  # the caller's number for it; means nothing here

    # Kept by the scheduler:
    state: RequestState = RequestState.WAITING
    choices: tuple[Request, ...] = ()  # all continuations of the prompt, this one included, by `choice`; () is (self,)
    unforked_count: int = 0  # choices that wait for this one, choice 0, to have computed the prompt
    arrival: int = -1  # order of admission; the smaller, the older
    rank: Rank = ()  # its claim under the policy
    overtaken_count: int = 0  # weaker claims that were placed while it found no room
    hopeless_at: float | None = None  # from when on it cannot meet its deadline, as it was last worked out
    tried_at: int = -1  # no executor that has not changed since had room for it
    attempt: int = 0  # which placement this is, counted over all requests; 0 before the first
    placement_count: int = 0  # how often it was placed
    gave_way_for: str = ""  # what it was preempted for last
    executor: Executor | None = None  # where it runs; None unless RUNNING
    slot: int = -1  # its number there; -1 unless RUNNING
    # token_ids[:computed_count] have keys and values in the cache, by the results so far. 0 unless RUNNING; while the
    # request decodes it is brought up to date only when a block is full.
    computed_count: int = 0
    planned_count: int = 0  # the same once every chunk planned has run; not maintained while decoding, see `Slots`
    tables: tuple[BlockTable, ...] = ()  # by layer group, append-only while RUNNING; () otherwise
    shared_tails: tuple[int, ...] = ()  # layer groups whose last block it shares, and copies before it writes there
    promised_count: int = 0  # blocks kept for it on its executor while it catches up
    hashes: list[bytes] = field(default_factory=list)  # of its first runs of `hashed_size` tokens, as far as needed
    hashed_size: int = 0
    awaits: str = ""  # executor that may come back with it, or ""; only while WAITING, see `Absence`
    is_suspect: bool = False  # an executor died while it computed this request, which has had no token since
    kill_count: int = 0  # executors that, as far as can be told, it alone can have killed; 0 unless it is a suspect
    starved_at: int = -1  # its output count when a device lacked memory for it
    placed_at: float | None = None  # first placement
    reused_count: int = 0  # prompt tokens that were in the cache when it was first placed
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
    def family(self) -> tuple[Request, ...]:
        """All choices of what the user asked for."""
        return self.choices or (self,)

    @property
    def is_unforked(self) -> bool:
        """Whether this choice waits for choice 0 to have computed the prompt."""
        return self.choice > 0 and self.choices[0].unforked_count > 0

    @property
    def has_ended(self) -> bool:
        """Whether every choice has."""
        return all(choice.state is RequestState.FINISHED for choice in self.family)

    @property
    def final_length(self) -> int:
        """Tokens of prompt and output when it ends by length."""
        return self.prompt_count + self.max_output_count

    @property
    def cache_limit(self) -> int:
        """Tokens that it may ever have in the cache: the last one sampled is never computed."""
        return self.final_length - 1


def with_choices(request: Request, choice_count: int) -> Request:
    """Ask for `choice_count` continuations of the prompt; returns choice 0, which computes it for all of them.

    The others come into being as requests of their own, each with its own tokens and end, and are forked from choice
    0 once that has computed all prompt tokens but the last. Then each computes the last one and samples for itself.
    """
    others = [
        replace(request, choice=choice, hashes=[])  # the prompt is one and the same until the fork
        for choice in range(1, choice_count)
    ]
    if others:
        request.choices = (request, *others)
        request.unforked_count = len(others)
    for other in others:
        other.choices = request.choices
    return request
