"""How much there is to do, and to do it with, read off a scheduler: what an autoscaler goes by.

May be read from another thread: what is walked over is copied first, in one go.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler_svc.core.executor import Executor
from scheduler_svc.core.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Backlog:
    """What has to be computed before everybody has the next token."""

    token_count: int
    seconds: float  # for the executors that take requests; 0 with tokens: unknown


def backlog(scheduler: Scheduler) -> Backlog:
    """The backlog of everybody who waits or catches up, as if nothing of those who wait could be reused."""
    executors = list(scheduler.executors.values())
    token_count = scheduler.waiting_token_count + sum(executor.backlog_count for executor in executors)
    speed = sum(tokens_per_s(executor) for executor in executors if not executor.draining)
    return Backlog(token_count, token_count / speed if speed else 0.0)


def tokens_per_s(executor: Executor) -> float:
    """Tokens that an executor computes in full steps, by its measured speed; 0: it has computed nothing yet."""
    count = executor.capacity.step_token_count
    seconds = executor.step_times.seconds(1, count)
    return count / seconds if seconds else 0.0


def running_token_count(executor: Executor) -> int:
    """Tokens in the cache that requests hold, shared ones counted for each."""
    known = sum(len(request.token_ids) for request in list(executor.running))
    return max(0, known - executor.backlog_count)


def useful_token_count(executor: Executor) -> int:
    """Tokens in the cache that nobody holds, by the share of tokens that were reused here so far."""
    share = executor.reused_count / executor.known_count if executor.known_count else 0.0
    return round(share * _tokens(executor, executor.cache.pool.reusable_count))


def cache_token_count(executor: Executor) -> int:
    """Tokens that the whole cache holds, of requests so long that every kind of layer sees all of them."""
    return _tokens(executor, executor.capacity.block_count)


def _tokens(executor: Executor, block_count: int) -> int:
    """Tokens for which so many blocks are enough, each needing its part of a block in every layer group."""
    blocks_per_token = sum(1 / group.block_size for group in executor.capacity.layer_groups)
    return int(block_count / blocks_per_token)


def held_block_count(executor: Executor) -> int:
    """Blocks that requests hold."""
    return executor.capacity.block_count - executor.cache.pool.free_count
