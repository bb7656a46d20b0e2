"""`concurrency`: so many requests on each executor, on average; faster when they come suddenly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from autoscaler_svc.observations import Observation, Observations
from autoscaler_svc.policies.policy import Wish, whole
from autoscaler_svc.settings import Positive, Setting, Window

Rate = Annotated[float, Field(gt=1)]


class Concurrency(Setting):
    """Requests that wait or run, averaged over a stable window and a short panic window.

    Wanted is the average over `target * utilization`. When the short window wants `panic_threshold` times what there
    is, the pool panics: it follows the larger of both averages and never goes down, until a stable window after the
    last such moment. Rules and defaults: Knative serving, "KPA", `pkg/autoscaler/scaling`; the target as Ray Serve's
    `target_ongoing_requests`.
    """

    kind: Literal["concurrency"] = "concurrency"
    target: Positive
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.7
    stable_window_s: Window = 60.0
    panic_window_s: Window = 6.0
    panic_threshold: Rate = 2.0
    up_rate: Rate = 1000.0
    down_rate: Rate = 2.0

    @model_validator(mode="after")
    def _check(self) -> Concurrency:
        if self.panic_window_s > self.stable_window_s:
            raise ValueError(
                f"panic_window is {self.panic_window_s:g} s, stable_window {self.stable_window_s:g} s; make it shorter"
            )
        return self

    @property
    def name(self) -> str:
        """How it is called in logs."""
        return "concurrency"

    def wish(self, now: float, seen: Observations) -> Wish:
        """How many executors there should be now.

        Example: 2 executors and a target of 10 at 0.7. 30 requests on average over a minute want 5; if there were 60
        over the last 6 seconds, 9 are wanted, which is above twice 2, and the pool panics: 9.
        """
        window = seen.since(now - self.stable_window_s)
        if not window:
            return Wish(self.name, None, f"nothing seen for {self.stable_window_s:g} s")
        stable = self._wanted(window, seen.last.executor_count)
        panics = self._panics(seen.since(now - self.stable_window_s - self.panic_window_s), now)
        per_executor = self.target * self.utilization
        reason = f"{_mean(window):.4g} requests on average of {self.stable_window_s:g} s, {per_executor:.4g} for each"
        if not panics:
            return Wish(self.name, stable, reason)
        wanted = max([stable, seen.last.executor_count, *panics])
        return Wish(self.name, wanted, f"{reason}; panics, the short window wants {max(panics)}")

    def _wanted(self, window: Sequence[Observation], count: int) -> int:
        wanted = whole(_mean(window) / (self.target * self.utilization))
        assert wanted is not None
        if not count:
            return wanted
        return min(max(wanted, math.floor(count / self.down_rate)), math.ceil(count * self.up_rate))

    def _panics(self, window: Sequence[Observation], now: float) -> list[int]:
        """What the short window wanted at each moment since the pool began to panic; empty: it does not."""
        wishes: list[int] = []
        start, requests = 0, 0
        for index, one in enumerate(window):
            requests += one.load.unfinished_request_count
            while window[start].at < one.at - self.panic_window_s:
                requests -= window[start].load.unfinished_request_count
                start += 1
            count = max(1, one.executor_count)
            wanted = whole(requests / (index - start + 1) / (self.target * self.utilization)) or 0
            is_recent = one.at >= now - self.stable_window_s
            if wishes or (is_recent and wanted >= self.panic_threshold * count):
                wishes.append(min(wanted, math.ceil(count * self.up_rate)))
        return wishes


def _mean(window: Sequence[Observation]) -> float:
    return sum(one.load.unfinished_request_count for one in window) / len(window)
