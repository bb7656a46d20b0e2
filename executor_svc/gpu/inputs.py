"""What the kernels of one step read: everything about its rows, as tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from executor_svc.batch import IntArray, LayerGroup


@dataclass(frozen=True, slots=True)
class StepInputs:
    """R rows of one step and their T tokens, end to end; some rows and tokens at the end may be padding.

    A padding row has context 0. The tokens of padding are of row -1: they are written nowhere, and what attention gives
    for them means nothing.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    rows: torch.Tensor  # [T] int32, the row of each token; -1: padding
    row_starts: torch.Tensor  # [R + 1] int32, where the tokens of each row begin, and where the last ones end
    contexts: torch.Tensor  # [R] int32, tokens in the cache once the step has run
    tables: torch.Tensor  # int32, block tables of all rows in all layer groups, end to end
    table_starts: torch.Tensor  # [groups, R] int32, where in `tables` each begins
    sampled: torch.Tensor  # [S] int64, the tokens that give logits
    groups: tuple[LayerGroup, ...]
    is_decode: bool  # every row has exactly one token, that of a padding row is padding

    @property
    def row_count(self) -> int:
        """Rows, padding included."""
        return len(self.contexts)

    @property
    def token_count(self) -> int:
        """Tokens, padding included."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class RecordedRows:
    """Rows of a recorded step, to which others are padded."""

    row_count: int
    block_limit: int  # of one row's blocks in one layer group


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step as the host knows them before it is queued; the arrays are those of a `StepBatch`."""

    query_lengths: IntArray  # [R]
    context_lengths: IntArray  # [R]
    block_tables: Sequence[NDArray[np.int32]]  # by layer group [R, W]
    groups: tuple[LayerGroup, ...]
    recorded: RecordedRows | None = None  # None: the step is launched kernel by kernel, as long as it is

    @property
    def padded_count(self) -> int:
        """Rows, padding included."""
        return len(self.context_lengths) if self.recorded is None else self.recorded.row_count

    @property
    def is_decode(self) -> bool:
        """Whether every row has exactly one token."""
        return bool((self.query_lengths == 1).all())


def inputs_of(
    query_lengths: IntArray,  # [R]
    context_lengths: IntArray,  # [R]
    block_tables: Sequence[NDArray[np.int32]],  # by layer group [R, W]
    token_ids: torch.Tensor,  # [T]
    sampled: torch.Tensor,  # [S]
    groups: tuple[LayerGroup, ...],
    device: torch.device,
) -> StepInputs:
    """The inputs of a step that is run once, without padding; the arguments are those of a `StepBatch`."""

    def on_device(array: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

    row_starts = np.concatenate(([0], np.cumsum(query_lengths)))
    rows = np.repeat(np.arange(len(query_lengths)), query_lengths)
    positions = np.arange(len(rows)) + (context_lengths - query_lengths - row_starts[:-1])[rows]
    tables, table_starts = flat_tables(block_tables, context_lengths, groups)
    return StepInputs(
        token_ids=token_ids.to(device, torch.int64),
        positions=on_device(positions, torch.int64),
        rows=on_device(rows, torch.int32),
        row_starts=on_device(row_starts, torch.int32),
        contexts=on_device(context_lengths, torch.int32),
        tables=on_device(tables, torch.int32),
        table_starts=on_device(table_starts, torch.int32),
        sampled=sampled.to(device, torch.int64),
        groups=groups,
        is_decode=bool((query_lengths == 1).all()),
    )


def flat_tables(
    block_tables: Sequence[NDArray[np.int32]], context_lengths: IntArray, groups: Sequence[LayerGroup]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The entries of all rows in all groups end to end, and where each row's begin, `[groups, R]`."""
    entries, starts, end = [], [], 0
    for table, group in zip(block_tables, groups, strict=True):
        counts = -(-context_lengths // group.block_size)
        entries.append(table[np.arange(table.shape[1]) < counts[:, None]])
        starts.append(end + np.cumsum(counts) - counts)
        end += int(counts.sum())
    return np.concatenate(entries), np.array(starts, dtype=np.int32)
