"""The work that all servers are measured with: the same requests in every run and for every server.

Needs nothing but the standard library, so that a server in an environment of its own can take it from here.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

_VOCABULARY = 40_000  # ids below it are ordinary tokens of every model that this is for


@dataclass(frozen=True)
class Job:
    """One request: greedy, and it generates all it may, whatever tokens those are."""

    prompt: list[int]
    output_count: int
    arrival_s: float = 0.0  # after the first


@dataclass(frozen=True)
class Workload:
    """Requests that are measured together."""

    name: str
    about: str
    jobs: list[Job]

    @property
    def output_count(self) -> int:
        """Tokens that all requests generate."""
        return sum(job.output_count for job in self.jobs)

    def within(self, vocabulary_size: int) -> "Workload":
        """The same with token ids below this, for models with a small vocabulary."""
        jobs = [Job([token % vocabulary_size for token in j.prompt], j.output_count, j.arrival_s) for j in self.jobs]
        return Workload(self.name, self.about, jobs)


def w1(draw: random.Random) -> list[Job]:
    """64 requests at once, prompts log-uniform 16..512, outputs uniform 16..128."""
    lengths = [round(math.exp(draw.uniform(math.log(16), math.log(512)))) for _ in range(64)]
    return [Job(_tokens(draw, length), draw.randint(16, 128)) for length in lengths]


def w2(draw: random.Random) -> list[Job]:
    """64 requests at once that share 512 tokens and have 32 of their own, 32 out."""
    shared = _tokens(draw, 512)
    return [Job(shared + _tokens(draw, 32), 32) for _ in range(64)]


def w4(draw: random.Random) -> list[Job]:
    """One stream, 128 in, 128 out."""
    return [Job(_tokens(draw, 128), 128)]


_AT_ONCE: dict[str, Callable[[random.Random], list[Job]]] = {"W1": w1, "W2": w2, "W4": w4}
NAMES = ("W1", "W2", "W3", "W4")


def workload(name: str, seed: int = 0) -> Workload:
    """The workload of that name where all requests come at once: W1, W2 or W4."""
    make = _AT_ONCE[name]
    return Workload(name, (make.__doc__ or "").strip().rstrip("."), make(random.Random(f"{name} {seed}")))


def poisson(requests_per_s: float, seed: int = 0) -> Workload:
    """W3: requests as long as those of W1, coming at random at this rate; usually 70 % of what W1 goes at.

    They have prompts of their own: those of W1 may be in a cache.
    """
    draw = random.Random(f"W3 {seed}")
    arrival_s, jobs = 0.0, []
    for job in workload("W1", seed).jobs:
        jobs.append(Job(_tokens(draw, len(job.prompt)), job.output_count, arrival_s))
        arrival_s += draw.expovariate(requests_per_s)
    return Workload("W3", f"as long as W1, {requests_per_s:.1f} a second (Poisson)", jobs)


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(_VOCABULARY) for _ in range(count)]
