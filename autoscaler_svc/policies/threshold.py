"""`threshold`: the rule of the Kubernetes HorizontalPodAutoscaler."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from autoscaler_svc.load import PoolLoad
from autoscaler_svc.observations import Observation, Observations
from autoscaler_svc.policies.policy import Wish, whole
from autoscaler_svc.settings import Count, Positive, Setting, Window

Signal = Literal[
    "requests", "running_requests", "waiting_requests", "tokens", "waiting_tokens", "block_share", "backlog_seconds"
]


def total(load: PoolLoad, signal: Signal) -> float:
    """The signal, summed over the pool; what one executor has of it on average is this over their number.

    `block_share` sums the shares, 0 to 1, of the caches that requests hold.
    """
    match signal:
        case "requests":
            return load.unfinished_request_count
        case "running_requests":
            return load.running_request_count
        case "waiting_requests":
            return load.waiting_request_count
        case "tokens":
            return load.waiting_token_count + load.running_token_count
        case "waiting_tokens":
            return load.waiting_token_count
        case "block_share":
            return sum(e.held_block_count / e.block_count for e in load.ready if e.block_count)
        case "backlog_seconds":
            known = load.backlog_s or not load.backlog_token_count
            return load.backlog_s * len(load.ready) if known else math.nan


class StepLimit(Setting):
    """How much the number of executors may change within a time: the larger of the two counts."""

    count: Count = 4
    percent: Count = 100
    period_s: Window = 15.0

    @model_validator(mode="after")
    def _check(self) -> StepLimit:
        if not self.count and not self.percent:
            raise ValueError("count and percent are both 0, and nothing could ever change; raise one of them")
        return self

    def room(self, start_count: int) -> int:
        """Executors that may come or go, where there were so many at the beginning of the period.

        Example: of 3, with 4 and 100 %: 4; of 10: 10.
        """
        return max(self.count, math.ceil(start_count * self.percent / 100))


class Threshold(Setting):
    """Keeps a signal at a target per executor.

    `wanted = ceil(total / target)`, unless what there is comes within `tolerance` of it. Going up takes the lowest that
    was wanted during `up_window`, going down the highest during `down_window`; both go no faster than their limits.
    Formula and defaults: Kubernetes, "Horizontal Pod Autoscaling", algorithm details and scaling behaviour.
    """

    kind: Literal["threshold"] = "threshold"
    signal: Signal = "requests"
    target: Positive
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.1
    up_window_s: Window = 0.0
    down_window_s: Window = 300.0
    up: StepLimit = StepLimit()
    down: StepLimit = StepLimit(count=0)

    @model_validator(mode="after")
    def _check(self) -> Threshold:
        if self.signal == "block_share" and self.target > 1:
            raise ValueError(f"target is {self.target:g} and block_share a share, 0 to 1; write {self.target / 100:g}?")
        return self

    @property
    def name(self) -> str:
        """How it is called in logs."""
        return f"threshold {self.signal}"

    def recommend(self, seen: Observation) -> int | None:
        """What the formula says of one moment; None where the signal is unknown.

        Example: 2 executors, 33 requests, 10 wanted on each: 4. 2 executors, 21 requests: 1.05 times what is wanted,
        which is tolerated, so 2.
        """
        count, value = seen.executor_count, total(seen.load, self.signal)
        if count and abs(value / (self.target * count) - 1) <= self.tolerance:
            return count
        return whole(value / self.target)

    def wish(self, now: float, seen: Observations) -> Wish:
        """How many executors there should be now."""
        last = seen.last
        wanted, current = self.recommend(last), last.executor_count
        value = total(last.load, self.signal)
        reason = f"{self.signal} {value:.4g} for {current}, target {self.target:g} each"
        if wanted is None:
            return Wish(self.name, None, f"{self.signal} unknown")
        lowest = min(self._recommended(now, seen, self.up_window_s))
        highest = max(self._recommended(now, seen, self.down_window_s))
        steady = min(max(current, lowest), highest)  # both windows have this moment in them: lowest <= highest
        if steady != wanted:
            reason += f"; {wanted} but for the window"
        limited = self._limited(now, seen, steady)
        if limited != steady:
            reason += f"; {steady} but for the step limit"
        return Wish(self.name, limited, reason)

    def _recommended(self, now: float, seen: Observations, window_s: float) -> list[int]:
        """What was recommended in the window. Where it began before anything was seen: what there was then, too."""
        known = [count for one in seen.since(now - window_s) if (count := self.recommend(one)) is not None]
        if not seen.covers(now, window_s):
            known.append(seen.first.executor_count)
        return known or [seen.last.executor_count]

    def _limited(self, now: float, seen: Observations, wanted: int) -> int:
        up_from = seen.before(now - self.up.period_s).executor_count
        down_from = seen.before(now - self.down.period_s).executor_count
        current = seen.last.executor_count
        if wanted > current:
            return max(current, min(wanted, up_from + self.up.room(up_from)))
        return min(current, max(wanted, down_from - self.down.room(down_from)))
