"""`slo`: as many executors as keep the times that users see within their targets. Ours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field

from autoscaler_svc.load import ExecutorLoad, PoolLoad
from autoscaler_svc.observations import Observation, Observations
from autoscaler_svc.policies.policy import Wish, whole
from autoscaler_svc.settings import Positive, Seconds, Setting, Window

_REUSE_WINDOW_S = 300.0
_CACHE_SHARE = 0.9
"""Share of a cache that may be planned for: outputs get longer than they are on average."""

_BRIDGE = 0.7
"""Requests expected while an executor starts from which on one is kept for them: ln 2, an even chance of one."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one executor does while it keeps the time between tokens."""

    concurrency: float  # requests that run at once
    requests_per_s: float  # ended, in the long run
    cache_token_count: float

    @classmethod
    def of(cls, executor: ExecutorLoad, prompt: float, output: float, per_token_s: float) -> Capacity | None:
        """From the measured speed, for requests of `prompt` tokens to compute and `output` to generate; None while
        nothing is known.

        A request that decodes adds a token to each step and, of its prompt, `prompt / output` more.

        Example: steps of 10 ms + 0.1 ms a token, prompts of 300 and outputs of 100 tokens, 50 ms between tokens: a
        request costs a step 0.4 ms, so 100 run at once, or as many as there are slots; steps take 50 ms, and 100 tokens
        for each of 100 requests 5 s: 20 requests/s.
        """
        step_s, token_s = executor.step_us / 1e6, executor.token_us / 1e6
        if not step_s + token_s or not executor.slot_count:
            return None
        output = max(1.0, output)
        request_s = token_s * (1 + prompt / output)
        within_target = (per_token_s - step_s) / request_s if request_s else math.inf
        in_cache = executor.cache_token_count * _CACHE_SHARE / max(1.0, prompt + output / 2)
        if within_target < 1:  # out of reach, with however many executors: go by what fits
            within_target = math.inf
        concurrency = max(1.0, min(within_target, in_cache, executor.slot_count))
        seconds = output * (step_s + concurrency * request_s)
        return cls(concurrency, concurrency / seconds, executor.cache_token_count)


class Slo(Setting):
    """How many executors keep time to first token and time per token within target, given what is queued, what runs,
    and what is forecast to arrive while a new executor starts.

    Three needs, of which the largest counts:

    * the rate: forecast arrivals over what an executor ends per second, at `utilization`;
    * the backlog: who waits is to be started within a part of `first_token`, in slots that are free or become free;
    * the memory: tokens in the caches, with what those who run will still add.
    """

    kind: Literal["slo"] = "slo"
    first_token_s: Annotated[Seconds, Field(gt=0)] = 2.0
    per_token_s: Annotated[Seconds, Field(gt=0)] = 0.1
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    down_margin: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Part of that utilization that those who stay may have after going down: what keeps it from going up again."""
    down_window_s: Window = 60.0
    wait_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Part of `first_token` that is planned to be spent waiting for a place: the prompt takes time too, and so does bad
    luck."""
    assumed_requests: Annotated[int, Field(ge=1)] = 16
    """That one executor is taken to run at once before any was there."""
    quantile: Annotated[Positive, Field(lt=1)] = 0.9
    """Of the arrivals that are planned for."""

    @property
    def name(self) -> str:
        """How it is called in logs."""
        return "slo"

    def wish(self, now: float, seen: Observations) -> Wish:
        """How many executors there should be now: what is needed, or the most that was needed in the last window."""
        last = seen.last
        capacity, reason = self._capacity(seen)
        if capacity is None:
            return self._without_speed(last)
        needed, why = self._needed(last, capacity, self.utilization)
        if needed >= last.executor_count:
            return Wish(self.name, needed, f"{why}; {reason}")
        window = seen.since(now - self.down_window_s)
        with_margin = self.utilization * self.down_margin
        kept = max(self._needed(one, capacity, with_margin)[0] for one in window or [last])
        if not seen.covers(now, self.down_window_s):
            kept = max(kept, seen.first.executor_count)
        count = max(needed, min(kept, last.executor_count))
        held = f"; {needed} but for the margin or the window" if count > needed else ""
        return Wish(self.name, count, f"{why}; {reason}{held}")

    def _without_speed(self, last: Observation) -> Wish:
        """Nothing was computed yet: as many as the slots, or what is assumed, say; then there is a speed."""
        slots = [executor.slot_count for executor in last.load.ready if executor.slot_count]
        work = last.load.unfinished_request_count
        each = fmean(slots) if slots else self.assumed_requests
        count = math.ceil(work / each)
        return Wish(self.name, count, f"unfinished {work}, {each:.4g} for each executor, nothing measured yet")

    def _capacity(self, seen: Observations) -> tuple[Capacity | None, str]:
        """What one executor does, by the last moment at which it was known."""
        one = seen.with_speed
        if one is None:
            return None, ""
        prompt = one.load.mean_prompt_token_count * (1 - self._reused_share(seen))
        known = [
            capacity
            for executor in one.load.ready
            if (capacity := Capacity.of(executor, prompt, one.load.mean_output_token_count, self.per_token_s))
        ]
        if not known:
            return None, ""
        each = one.mean_capacity
        mean = Capacity(
            fmean(capacity.concurrency for capacity in known) / each,
            fmean(capacity.requests_per_s for capacity in known) / each,
            fmean(capacity.cache_token_count for capacity in known) / each,
        )
        return mean, f"an executor runs {mean.concurrency:.4g} at once, {mean.requests_per_s:.3g}/s"

    @staticmethod
    def _reused_share(seen: Observations) -> float:
        """Share of prompt tokens that were in a cache, lately; never all of them."""
        last = seen.last
        earlier = seen.before(last.at - _REUSE_WINDOW_S).load
        arrived = last.load.arrived_prompt_token_count - earlier.arrived_prompt_token_count
        reused = last.load.reused_token_count - earlier.reused_token_count
        return min(0.95, max(0.0, reused / arrived)) if arrived > 0 and earlier.epoch == last.load.epoch else 0.0

    def _needed(self, one: Observation, capacity: Capacity, utilization: float) -> tuple[int, str]:
        """Executors needed at one moment, and for what."""
        high = one.arrivals.high_requests
        by_rate = high / (capacity.requests_per_s * utilization)
        if by_rate < 1 and one.arrivals.mean_requests * one.startup_s < _BRIDGE:
            by_rate = 0.0  # gaps are longer than a start: who comes waits for one
        needs = {
            f"{high:.3g} requests/s expected": by_rate,
            f"{one.load.waiting_request_count} wait, {one.load.running_request_count} run": self._by_backlog(
                one, capacity, high
            ),
            f"{self._tokens(one.load):.4g} tokens in caches": self._by_memory(one.load, capacity),
        }
        why, most = max(needs.items(), key=lambda need: need[1])
        return whole(most) or 0, why

    def _by_backlog(self, one: Observation, capacity: Capacity, arriving: float) -> float:
        """Executors that start everybody within the target. What is worked off before a new one is ready needs none.

        Example: an executor runs 10 at once and ends 2/s, and 2 s may be waited: it takes 14. Of 40 requests one such
        executor leaves 26; in 5 s it ends 10 of them, 16 are left, and want 2 more.
        """
        takes = capacity.concurrency + capacity.requests_per_s * self.first_token_s * self.wait_share
        work, there = one.load.unfinished_request_count, one.executor_count
        too_many = work - there * takes
        if not there or too_many <= 0:
            return work / takes
        left = too_many - max(0.0, there * capacity.requests_per_s - arriving) * one.startup_s
        is_late = one.load.oldest_waiting_s > self.first_token_s and not one.starting_count
        return there + max(left / takes, 1.0 if is_late else 0.0)

    @staticmethod
    def _tokens(load: PoolLoad) -> float:
        return load.running_token_count + load.running_request_count * load.mean_output_token_count / 2

    def _by_memory(self, load: PoolLoad, capacity: Capacity) -> float:
        return self._tokens(load) / (capacity.cache_token_count * _CACHE_SHARE) if capacity.cache_token_count else 0.0
