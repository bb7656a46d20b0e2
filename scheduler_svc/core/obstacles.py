"""What a waiting request waits for."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler_svc.core.executor import Executor
    from scheduler_svc.core.request import Request


class Obstacle(Enum):
    """Why a request is not placed, as people read it; of several executors, the nearest to having room counts."""

    STEP = "a step to end"  # there is room: the next plan takes it
    BLOCKS = "blocks of the cache"
    TOKENS = "the step's tokens"  # prompts of others take all that the next steps may compute
    SLOT = "a slot"  # as many requests run as may
    LARGER = "a larger executor"
    EXECUTOR = "an executor"  # none is here that takes requests


_NEAREST_FIRST = tuple(Obstacle)

A_STRONGER_CLAIM = "a stronger claim"
"""What a request gave way for where it was not blocks."""


def obstacle_to(request: Request, executors: Iterable[Executor], *, prefill_first: bool) -> Obstacle:
    """What the request waits for, by what these executors have now. Costs a few sums for each of them."""
    nearest = Obstacle.EXECUTOR
    for executor in executors:
        if executor.draining:
            continue
        obstacle = executor.obstacle_to(request, prefill_first=prefill_first)
        if _NEAREST_FIRST.index(obstacle) < _NEAREST_FIRST.index(nearest):
            nearest = obstacle
        if nearest is Obstacle.STEP:
            break
    return nearest
