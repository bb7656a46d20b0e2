"""Where the inputs of steps stand on the device, always at the same places, and how they get there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from executor_svc.batch import LayerGroup, StepBatch
from executor_svc.gpu.inputs import StepInputs, flat_tables
from executor_svc.gpu.queue import Moment, Queue
from executor_svc.gpu.sampling import SamplingParameters
from executor_svc.sampler import row_keys

_ALIGNMENT = 4  # words: what is read as 8 bytes begins at a multiple of them


@dataclass(frozen=True, slots=True)
class StepShape:
    """How large a step is, padding included."""

    row_count: int
    token_count: int
    sampled_count: int
    is_decode: bool  # every row has one token


class InputBuffer:
    """Inputs of one step at a time: arrays of 4-byte words, one behind the other, which cross in one copy.

    They are put together in host memory, copied into memory of their own on the device while the step before still
    runs, and moved to their place when it has ended. Two of each take turns.
    """

    def __init__(
        self, row_limit: int, token_limit: int, entry_limit: int, groups: tuple[LayerGroup, ...], queue: Queue
    ):
        """Room for steps of so many rows and tokens, whose block tables have `entry_limit` entries together."""
        self._groups, self._queue = groups, queue
        widths = {
            "row_starts": row_limit + 1,
            "contexts": row_limit,
            "sampled": row_limit,
            "temperature": row_limit,
            "top_k": row_limit,
            "top_p": row_limit,
            "min_p": row_limit,
            "key": 2 * row_limit,
            "table_starts": len(groups) * row_limit,
            "token_ids": token_limit,
            "rows": token_limit,
            "positions": token_limit,
            "tables": entry_limit,
        }
        self._places: dict[str, slice] = {}
        end = 0
        for name, width in widths.items():
            self._places[name] = slice(end, end + width)
            end += -(-width // _ALIGNMENT) * _ALIGNMENT
        self._words = torch.zeros(end, dtype=torch.int32, device=queue.device)
        self._turns = [_Turn(queue.host_words(end), torch.zeros_like(self._words)) for _ in range(2)]

    def fill(self, batch: StepBatch, shape: StepShape) -> None:
        """Have the inputs at their places for the steps that are queued from now on."""
        turn = self._turns[0]
        self._turns.reverse()
        turn.await_host()
        used = self._write(turn.host.numpy(), batch, shape)
        with self._queue.copies():
            turn.staged[:used].copy_(turn.host[:used], non_blocking=True)
            turn.copied = self._queue.mark()
        with self._queue.steps():
            turn.copied.await_on_device()
            self._words[:used].copy_(turn.staged[:used])
            turn.moved = self._queue.mark()

    def inputs(self, shape: StepShape, chosen: torch.Tensor) -> StepInputs:
        """What kernels of a step of this shape read; `chosen` are the tokens of the step before, `[S]`.

        Resolving tokens and widening numbers are work of the step: call it where that is queued, or recorded.
        """
        given = self._part("token_ids", shape.token_count)
        late = chosen[(-1 - given).clamp_min_(0)]
        row_starts = self._part("row_starts", shape.row_count + 1)
        table_starts = self._part("table_starts", len(self._groups) * shape.row_count)
        return StepInputs(
            token_ids=torch.where(given < 0, late, given.long()),
            positions=self._part("positions", shape.token_count).long(),
            rows=self._part("rows", shape.token_count),
            row_starts=row_starts,
            contexts=self._part("contexts", shape.row_count),
            tables=self._words[self._places["tables"]],
            table_starts=table_starts.view(len(self._groups), shape.row_count),
            sampled=self._part("sampled", shape.sampled_count).long(),
            groups=self._groups,
            is_decode=shape.is_decode,
        )

    def sampling(self, count: int) -> SamplingParameters:
        """How the first `count` sampling rows choose their tokens."""
        return SamplingParameters(
            temperature=self._part("temperature", count).view(torch.float32),
            top_k=self._part("top_k", count),
            top_p=self._part("top_p", count).view(torch.float32),
            min_p=self._part("min_p", count).view(torch.float32),
            key=self._part("key", 2 * count).view(torch.int64),
        )

    def _part(self, name: str, count: int) -> torch.Tensor:
        return self._words[self._places[name]][:count]

    def _write(self, words: NDArray[np.int32], batch: StepBatch, shape: StepShape) -> int:
        """Put the inputs together; returns how many words they take."""
        tables, table_starts = flat_tables(batch.block_tables, batch.context_lengths, self._groups)
        end = self._places["tables"].start + len(tables)
        assert end <= len(words), "the block tables of a step have more entries than all slots could have"
        words[self._places["tables"].start : end] = tables
        starts = np.zeros((len(self._groups), shape.row_count), dtype=np.int32)
        starts[:, : table_starts.shape[1]] = table_starts
        fields = _row_fields(batch, shape) | _sampling_fields(batch, shape.sampled_count)
        fields["table_starts"] = starts.reshape(-1), 0, starts.size
        for name, (array, padding, padded_count) in fields.items():
            place = words[self._places[name]]
            place[: len(array)] = array
            place[len(array) : padded_count] = padding
        return end


@dataclass(slots=True)
class _Turn:
    """Inputs on their way: in host memory, then on the device."""

    host: torch.Tensor
    staged: torch.Tensor
    copied: Moment | None = None
    moved: Moment | None = None

    def await_host(self) -> None:
        """Wait until both memories may be written again."""
        if self.moved is not None:
            self.moved.await_on_host()


_Fields = dict[str, tuple[NDArray[np.generic], int, int]]
"""Arrays by name, what stands in their padding, and their length with it."""


def _row_fields(batch: StepBatch, shape: StepShape) -> _Fields:
    lengths = batch.query_lengths
    row_starts = np.concatenate(([0], np.cumsum(lengths)))
    all_starts = np.arange(shape.row_count + 1) if shape.is_decode else row_starts
    rows = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(rows)) + (batch.context_lengths - lengths - row_starts[:-1])[rows]
    return {
        "row_starts": (all_starts, len(rows), shape.row_count + 1),
        "contexts": (batch.context_lengths, 0, shape.row_count),
        "token_ids": (batch.token_ids, 0, shape.token_count),
        "rows": (rows, -1, shape.token_count),
        "positions": (positions, 0, shape.token_count),
        "sampled": (batch.sampled_tokens, 0, shape.sampled_count),
    }


def _sampling_fields(batch: StepBatch, count: int) -> _Fields:
    sampling = batch.sampling
    keys = row_keys(sampling.seed, sampling.choice, sampling.output_index)
    return {
        "temperature": (sampling.temperature.view(np.int32), 0, count),
        "top_k": (sampling.top_k, 0, count),
        "top_p": (sampling.top_p.view(np.int32), 0, count),
        "min_p": (sampling.min_p.view(np.int32), 0, count),
        "key": (keys.view(np.int32), 0, 2 * count),
    }
