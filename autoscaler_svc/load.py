"""How much there is to do, and to do it with: what the scheduler says at one moment, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ExecutorState(Enum):
    """Where an executor is, as the scheduler sees it."""

    CONNECTING = "connecting"  # has joined; the scheduler is dialling it
    READY = "ready"  # takes requests
    DRAINING = "draining"  # finishes or hands over what it has and takes nothing new


@dataclass(frozen=True, slots=True)
class ExecutorLoad:
    """One executor that has joined."""

    executor_id: str
    state: ExecutorState = ExecutorState.READY
    running_request_count: int = 0
    running_token_count: int = 0  # in its cache, held by requests: what has to move with them
    useful_token_count: int = 0  # in its cache, held by nobody, that others will probably reuse
    block_count: int = 0
    held_block_count: int = 0
    slot_count: int = 0  # requests that may run at once
    step_token_count: int = 0  # tokens that a step may compute
    cache_token_count: int = 0  # tokens that the whole cache holds
    step_us: float = 0.0  # a step of n tokens takes about step_us + n * token_us; both 0: nothing is known yet
    token_us: float = 0.0
    startup_s: float = 0.0  # from the start of its process until its model was ready; 0: unknown


@dataclass(frozen=True, slots=True)
class Latency:
    """Times that requests have seen. The counters grow while the scheduler's epoch stays the same."""

    count: int = 0
    sum_s: float = 0.0
    within_target_count: int = 0
    p50_s: float = 0.0  # of the last 60 seconds; 0: there was none
    p95_s: float = 0.0
    p99_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """A pool of executors with one model, and what is asked of it, at one moment.

    Counters grow while `epoch` stays the same.
    """

    model: str = ""
    epoch: int = 0
    waiting_request_count: int = 0
    waiting_token_count: int = 0
    oldest_waiting_s: float = 0.0
    running_request_count: int = 0
    running_token_count: int = 0  # in the caches
    backlog_token_count: int = 0  # to be computed before everybody, waiting or running, has the next token
    backlog_s: float = 0.0  # for the executors that are there; 0 with a backlog: unknown
    block_count: int = 0
    held_block_count: int = 0
    arrived_request_count: int = 0
    arrived_prompt_token_count: int = 0
    refused_request_count: int = 0
    ended_request_count: int = 0
    generated_token_count: int = 0
    computed_token_count: int = 0
    reused_token_count: int = 0
    first_token: Latency = Latency()
    per_token: Latency = Latency()
    mean_prompt_token_count: float = 0.0  # of the requests that ended last; 0: none has
    mean_output_token_count: float = 0.0
    executors: tuple[ExecutorLoad, ...] = ()

    @property
    def ready(self) -> tuple[ExecutorLoad, ...]:
        """The executors that take requests."""
        return tuple(executor for executor in self.executors if executor.state is ExecutorState.READY)

    @property
    def unfinished_request_count(self) -> int:
        """Requests that wait or run."""
        return self.waiting_request_count + self.running_request_count
