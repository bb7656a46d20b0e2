"""A scheduler in miniature: feeds a runner chunks, late arrivals and scattered blocks until every request is done."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from executor_svc.batch import Runner, SamplingBatch, StepBatch


@dataclass(slots=True)
class DrivenRequest:
    """One request and what became of it."""

    prompt_ids: Sequence[int]
    output_count: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    first_step: int = 0  # arrives at this step
    output_ids: list[int] = field(default_factory=list)
    computed_count: int = 0
    block_ids: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.output_ids) == self.output_count

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.output_ids]


def drive(runner: Runner, requests: Sequence[DrivenRequest], *, chunk: int = 7, seed: int = 0) -> None:
    """Run all requests to their end: prompts in chunks of `chunk` tokens, beside whatever decodes."""
    free = list(range(runner.info.block_count))
    random.Random(seed).shuffle(free)
    step = 0
    while not all(request.is_done for request in requests):
        active = [r for r in requests if not r.is_done and r.first_step <= step]
        counts = [min(chunk, len(r.token_ids) - r.computed_count) for r in active]
        for request, count in zip(active, counts, strict=True):
            while len(request.block_ids) * runner.info.block_size < request.computed_count + count:
                request.block_ids.append(free.pop())
        if active:
            _run(runner, active, counts)
        for request in requests:
            if request.is_done:
                free += request.block_ids
                request.block_ids = []
        step += 1


def _run(runner: Runner, active: list[DrivenRequest], counts: list[int]) -> None:
    samples = [r.computed_count + n == len(r.token_ids) for r, n in zip(active, counts, strict=True)]
    output = runner.run(step_batch(active, counts, samples))
    for request, count in zip(active, counts, strict=True):
        request.computed_count += count
    sampled = [request for request, does in zip(active, samples, strict=True) if does]
    assert output.token_ids.shape == (len(sampled),)
    for request, token in zip(sampled, output.token_ids.tolist(), strict=True):
        request.output_ids.append(token)


def step_batch(requests: Sequence[DrivenRequest], counts: Sequence[int], samples: Sequence[bool]) -> StepBatch:
    """The step that computes the next `counts[i]` tokens of `requests[i]`."""
    tables = np.zeros((len(requests), max(len(r.block_ids) for r in requests) + 1), dtype=np.int32)
    for row, request in enumerate(requests):
        tables[row, : len(request.block_ids)] = request.block_ids
    ids = [t for r, n in zip(requests, counts, strict=True) for t in r.token_ids[r.computed_count :][:n]]
    past = np.array([r.computed_count for r in requests])
    return StepBatch(
        slots=np.arange(len(requests)),
        token_ids=np.array(ids, dtype=np.int64),
        query_lengths=np.array(counts, dtype=np.int64),
        context_lengths=past + np.array(counts, dtype=np.int64),
        block_tables=tables,
        sampling=sampling_batch(
            [row for row, does in enumerate(samples) if does],
            [r for r, does in zip(requests, samples, strict=True) if does],
        ),
    )


def sampling_batch(rows: Sequence[int], requests: Sequence[DrivenRequest]) -> SamplingBatch:
    """How `requests`, which are the step's `rows`, sample."""
    return SamplingBatch(
        row_index=np.array(rows, dtype=np.int64),
        temperature=np.array([r.temperature for r in requests], dtype=np.float32),
        top_k=np.array([r.top_k for r in requests], dtype=np.int64),
        top_p=np.array([r.top_p for r in requests], dtype=np.float32),
        min_p=np.array([r.min_p for r in requests], dtype=np.float32),
        seed=np.array([r.seed for r in requests], dtype=np.uint64),
        output_index=np.array([len(r.output_ids) for r in requests], dtype=np.int64),
    )
