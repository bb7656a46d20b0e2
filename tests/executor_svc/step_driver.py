"""A scheduler in miniature: feeds a runner chunks, late arrivals and scattered blocks until every request is done.

Blocks come from one free list for all layer groups, and those that no later token sees go back to it at once. What
is on the list holds NaN, so whoever reads a block that is not his has no finite logits.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from executor_svc.batch import NO_BLOCK, Runner, SamplingBatch, StepBatch


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
    choice: int = 0
    first_step: int = 0  # arrives at this step
    output_ids: list[int] = field(default_factory=list)
    computed_count: int = 0
    block_tables: list[list[int]] = field(default_factory=list)  # by layer group
    first_held: list[int] = field(default_factory=list)  # by layer group; entries before were given back
    most_held: list[int] = field(default_factory=list)  # by layer group: blocks at once

    @property
    def is_done(self) -> bool:
        return len(self.output_ids) == self.output_count

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.output_ids]


class Blocks:
    """The blocks of a runner: free ones in a random order, given away last in, first out."""

    def __init__(self, runner: Runner, seed: int) -> None:
        self._groups = runner.info.layer_groups
        self._planes: Iterable[torch.Tensor] = runner._pool.planes if hasattr(runner, "_pool") else ()
        self._leaves_stale_entries = bool(seed % 2)  # else NO_BLOCK
        self._free = list(range(runner.info.block_count))
        random.Random(seed).shuffle(self._free)
        self._poison(self._free)

    def extend(self, request: DrivenRequest, token_count: int) -> None:
        """Give the request blocks for its first `token_count` tokens."""
        if not request.block_tables:
            request.block_tables = [[] for _ in self._groups]
            request.first_held, request.most_held = [0] * len(self._groups), [0] * len(self._groups)
        for group, table in zip(self._groups, request.block_tables, strict=True):
            while len(table) * group.block_size < token_count:
                table.append(self._free.pop())
        held = [len(table) - first for table, first in zip(request.block_tables, request.first_held, strict=True)]
        request.most_held = [max(pair) for pair in zip(request.most_held, held, strict=True)]

    def take_back(self, request: DrivenRequest) -> None:
        """Take back the blocks that no later token of the request sees; all of them once it is done."""
        freed: list[int] = []
        for index, (group, table) in enumerate(zip(self._groups, request.block_tables, strict=True)):
            first_seen = int(group.first_seen(np.array([request.computed_count]))[0])
            first_held = len(table) if request.is_done else first_seen // group.block_size
            for entry in range(request.first_held[index], first_held):
                freed.append(table[entry])
                if not self._leaves_stale_entries:
                    table[entry] = NO_BLOCK
            request.first_held[index] = first_held
        self._poison(freed)
        self._free += freed

    def fork(self, parent: DrivenRequest, child: DrivenRequest) -> tuple[list[int], list[int]]:
        """Give `child` a block for each one that `parent` holds; returns the pairs to copy."""
        self.extend(child, 0)
        copies = []
        for index, (table, first_held) in enumerate(zip(parent.block_tables, parent.first_held, strict=True)):
            taken = [self._free.pop() for _ in table[first_held:]]
            copies += zip(table[first_held:], taken, strict=True)
            child.block_tables[index] = [*table[:first_held], *taken]
            child.first_held[index] = first_held
        sources, destinations = zip(*copies, strict=True)
        return list(sources), list(destinations)

    def _poison(self, block_ids: list[int]) -> None:
        ids = torch.tensor(block_ids, dtype=torch.int64)
        for plane in self._planes:
            plane.index_fill_(0, ids, torch.nan)


def drive(runner: Runner, requests: Sequence[DrivenRequest], *, chunk: int = 7, seed: int = 0) -> None:
    """Run all requests to their end: prompts in chunks of `chunk` tokens, beside whatever decodes."""
    blocks = Blocks(runner, seed)
    step = 0
    while not all(request.is_done for request in requests):
        active = [r for r in requests if not r.is_done and r.first_step <= step]
        if active:
            advance(runner, blocks, active, chunk)
        step += 1


def advance(runner: Runner, blocks: Blocks, active: Sequence[DrivenRequest], chunk: int) -> None:
    """One step: the next tokens of every request, at most `chunk` of each."""
    counts = [min(chunk, len(r.token_ids) - r.computed_count) for r in active]
    for request, count in zip(active, counts, strict=True):
        blocks.extend(request, request.computed_count + count)
    samples = [r.computed_count + n == len(r.token_ids) for r, n in zip(active, counts, strict=True)]
    output = runner.run(step_batch(active, counts, samples))
    for request, count in zip(active, counts, strict=True):
        request.computed_count += count
    sampled = [request for request, does in zip(active, samples, strict=True) if does]
    assert output.token_ids.shape == (len(sampled),)
    for request, token in zip(sampled, output.token_ids.tolist(), strict=True):
        request.output_ids.append(token)
    for request in active:
        blocks.take_back(request)


def step_batch(requests: Sequence[DrivenRequest], counts: Sequence[int], samples: Sequence[bool]) -> StepBatch:
    """The step that computes the next `counts[i]` tokens of `requests[i]`."""
    ids = [t for r, n in zip(requests, counts, strict=True) for t in r.token_ids[r.computed_count :][:n]]
    past = np.array([r.computed_count for r in requests])
    return StepBatch(
        slots=np.arange(len(requests)),
        token_ids=np.array(ids, dtype=np.int64),
        query_lengths=np.array(counts, dtype=np.int64),
        context_lengths=past + np.array(counts, dtype=np.int64),
        block_tables=tuple(
            block_table([r.block_tables[group] for r in requests]) for group in range(len(requests[0].block_tables))
        ),
        sampling=sampling_batch(
            [row for row, does in enumerate(samples) if does],
            [r for r, does in zip(requests, samples, strict=True) if does],
        ),
    )


def block_table(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The block tables of one layer group as an array, padded with block 0."""
    table = np.zeros((len(rows), max(map(len, rows)) + 1), dtype=np.int32)
    for row, block_ids in enumerate(rows):
        table[row, : len(block_ids)] = block_ids
    return table


def sampling_batch(rows: Sequence[int], requests: Sequence[DrivenRequest]) -> SamplingBatch:
    """How `requests`, which are the step's `rows`, sample."""
    return SamplingBatch(
        row_index=np.array(rows, dtype=np.int64),
        temperature=np.array([r.temperature for r in requests], dtype=np.float32),
        top_k=np.array([r.top_k for r in requests], dtype=np.int64),
        top_p=np.array([r.top_p for r in requests], dtype=np.float32),
        min_p=np.array([r.min_p for r in requests], dtype=np.float32),
        seed=np.array([r.seed for r in requests], dtype=np.uint64),
        choice=np.array([r.choice for r in requests], dtype=np.int64),
        output_index=np.array([len(r.output_ids) for r in requests], dtype=np.int64),
    )
