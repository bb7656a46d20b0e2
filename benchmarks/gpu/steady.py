"""Decoding at its steady state: between the last request's first token and the first request's last one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import BenchmarkError
from benchmarks.figures import Answer
from benchmarks.workloads import Job


@dataclass(frozen=True, slots=True)
class Steady:
    """What came while every request decoded: no prompt is computed then, and nobody has finished."""

    began_s: float
    ended_s: float
    token_count: int
    mean_context: float  # tokens that the step of a token reads in the cache, on average

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.token_count / (self.ended_s - self.began_s)

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Steady:
        """The steady part of requests that were made at once."""
        began = max(answer.arrivals[0][0] for answer in answers)
        ended = min(answer.arrivals[-1][0] for answer in answers)
        if ended <= began:
            raise BenchmarkError(
                f"one of {len(answers)} requests ended before another one had its first token, so they never decoded "
                "together; ask for more output tokens or let a step compute more prompt tokens"
            )
        count, context_sum = 0, 0
        for answer in answers:
            context = answer.prompt_count
            for when, token_count in answer.arrivals:
                if began < when <= ended:
                    count += token_count
                    context_sum += token_count * context + token_count * (token_count - 1) // 2
                context += token_count
        return cls(began, ended, count, context_sum / count)

    def share_of(self, answers: Sequence[Answer]) -> float:
        """Which share of the whole time of these answers it is; the rest is prompts, and the last tokens."""
        whole = max(answer.arrivals[-1][0] for answer in answers) - min(answer.asked_s for answer in answers)
        return (self.ended_s - self.began_s) / whole


def jobs_of(count: int, prompt_count: int, output_count: int, vocabulary_size: int, seed: str) -> list[Job]:
    """Requests of one length with random prompts, the same for the same arguments."""
    draw = random.Random(f"{seed} {count}")
    return [Job([draw.randrange(vocabulary_size) for _ in range(prompt_count)], output_count) for _ in range(count)]
