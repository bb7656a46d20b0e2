"""Figures of a run, from the moments at which the tokens of each request arrived. Needs only the standard library."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(slots=True)
class Answer:
    """When the tokens of one request came, in seconds on a clock that all requests of a run share."""

    prompt_count: int
    asked_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (when, how many tokens), in the order of coming

    def note(self, now_s: float, token_count: int) -> None:
        """Take down that tokens have come; a message without tokens is no arrival."""
        if token_count:
            self.arrivals.append((now_s, token_count))

    @property
    def output_count(self) -> int:
        """Tokens that have come."""
        return sum(count for _, count in self.arrivals)

    def gaps_s(self) -> list[float]:
        """What a reader waits between two arrivals."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Figures:
    """How one workload went."""

    request_count: int
    prompt_count: int  # tokens of all prompts
    output_count: int  # tokens that were generated
    seconds: float  # from the first request to the last token
    first_token_ms: dict[str, float | None]  # from a request to its first token: p50, p99
    between_tokens_ms: dict[str, float | None]  # between two arrivals of one request: p50, p99

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Figures:
        """The figures of these answers, each of which has at least one token."""
        began = min(answer.asked_s for answer in answers)
        ended = max(answer.arrivals[-1][0] for answer in answers)
        return cls(
            request_count=len(answers),
            prompt_count=sum(answer.prompt_count for answer in answers),
            output_count=sum(answer.output_count for answer in answers),
            seconds=ended - began,
            first_token_ms=_spread_ms([answer.arrivals[0][0] - answer.asked_s for answer in answers]),
            between_tokens_ms=_spread_ms([gap for answer in answers for gap in answer.gaps_s()]),
        )

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, of all requests together."""
        return self.output_count / self.seconds

    def as_json(self) -> dict[str, Any]:
        """The part of a run's JSON that these figures are."""
        return {
            "requests": self.request_count,
            "prompt_tokens": self.prompt_count,
            "output_tokens": self.output_count,
            "seconds": round(self.seconds, 4),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "first_token_ms": self.first_token_ms,
            "between_tokens_ms": self.between_tokens_ms,
        }


def run_json(
    figures: Figures,
    *,
    server: str,
    mode: str,
    workload: str,
    dtype: str | None,
    runner: str | None,
    threads: int | None,
    turn: int,
    peak_mib: dict[str, float | None],
    start_s: float | None,
) -> dict[str, Any]:
    """One run as other tools read it; None stands for what cannot be known of this server."""
    return {
        "server": server,
        "mode": mode,
        "workload": workload,
        "dtype": dtype,
        "runner": runner,
        "threads": threads,
        "turn": turn,
        **figures.as_json(),
        "peak_mib": peak_mib,
        "start_s": None if start_s is None else round(start_s, 3),
    }


def _spread_ms(values_s: Sequence[float]) -> dict[str, float | None]:
    """Median and 99th percentile in milliseconds; None where there is no value."""
    if not values_s:
        return {"p50": None, "p99": None}
    cuts = statistics.quantiles(values_s, n=100, method="inclusive") if len(values_s) > 1 else [values_s[0]] * 99
    return {"p50": round(1000 * cuts[49], 3), "p99": round(1000 * cuts[98], 3)}
