"""Where the queries of one step find their keys: index tensors, made once for all layers.

Everything here is arithmetic on the host with numpy; only its results go to the device. Token slots number the
pool's rows: slot = block * block_size + offset.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from executor_svc.batch import IntArray

WASTED_TOKEN_LIMIT = 2048  # reading this many padding tokens costs about as much as one more group does
SCORE_LIMIT = 1 << 20  # query x key pairs that a part of a prompt computes at once, for each head


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which earlier positions a query sees. Always causal; 0 means no further limit."""

    window: int = 0  # the last `window` positions, its own included
    chunk: int = 0  # only positions of its own chunk of this many

    def first_key(self, positions: IntArray) -> IntArray:
        """The first position that each query position sees."""
        first = np.zeros_like(positions)
        if self.window:
            first = np.maximum(first, positions - self.window + 1)
        if self.chunk:
            first = np.maximum(first, positions // self.chunk * self.chunk)
        return first


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one query each, with about as many keys, computed together."""

    query_index: torch.Tensor  # [B] into the step's tokens
    key_index: torch.Tensor  # [B * heads * L] rows of the keys seen as [slots * heads, dim]
    bias: torch.Tensor | None  # [B, 1, 1, L] -inf where padding; None: no padding
    key_count: int  # L


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Consecutive queries of one row, computed together."""

    start: int  # the queries are the step's tokens [start, stop)
    stop: int
    key_index: torch.Tensor  # [heads * K] rows of the keys seen as [slots * heads, dim]
    key_count: int  # K
    query_position: torch.Tensor  # [stop - start] counted from the first of the K keys, as `first_key` is
    first_key: torch.Tensor  # [stop - start]
    is_causal: bool  # query i sees exactly the keys [0, i]

    def mask(self) -> torch.Tensor:
        """True where a query sees a key, `[queries, keys]`. Made anew by each layer: kept, long prompts fill memory."""
        keys = torch.arange(self.key_count, device=self.first_key.device)
        return (keys <= self.query_position[:, None]) & (keys >= self.first_key[:, None])


@dataclass(frozen=True, slots=True)
class Parts:
    """All queries of a step, each in exactly one part."""

    decode: list[DecodeGroup]
    prompt: list[PromptPart]


class StepLayout:
    """The rows of one step: where their tokens are written and what each of them reads."""

    def __init__(
        self,
        query_lengths: IntArray,  # [R]
        context_lengths: IntArray,  # [R]
        block_tables: NDArray[np.int32],  # [R, W]
        *,
        block_size: int,
        padding_slot: int,
        group_token_limit: int,
        gathered: bool,
        device: torch.device,
    ) -> None:
        self._past = context_lengths - query_lengths
        self._query_lengths = query_lengths
        self._query_start = np.cumsum(query_lengths) - query_lengths
        self._tables = block_tables
        self._block_size = block_size
        self._group_token_limit = group_token_limit
        self._device = device
        self._parts: dict[tuple[Visibility, int], Parts] = {}

        row = np.repeat(np.arange(len(query_lengths)), query_lengths)
        position = np.arange(len(row)) - self._query_start[row] + self._past[row]
        self.position_ids = self._tensor(position).unsqueeze(0)  # [1, T]
        self.write_slots = self._tensor(self._pool_slots(row, position))  # [T]
        self.read_slots: torch.Tensor | None = None  # all keys of all rows, then padding; None: read from the pool
        self._gathered_start: IntArray | None = None
        self._padding_slot = padding_slot
        if gathered:
            start = np.cumsum(context_lengths) - context_lengths
            row = np.repeat(np.arange(len(context_lengths)), context_lengths)
            slots = self._pool_slots(row, np.arange(len(row)) - start[row])
            self.read_slots = self._tensor(np.append(slots, padding_slot))
            self._gathered_start = start
            self._padding_slot = len(slots)

    @property
    def gathered(self) -> bool:
        """Whether attention reads what the cache returned rather than the pool."""
        return self.read_slots is not None

    def parts(self, visibility: Visibility, head_count: int) -> Parts:
        """The step's queries and the keys they see, for layers with `head_count` key heads."""
        key = (visibility, head_count)
        if key not in self._parts:
            is_decode = self._query_lengths == 1
            self._parts[key] = Parts(
                decode=list(self._decode_groups(np.flatnonzero(is_decode), visibility, head_count)),
                prompt=[
                    part
                    for row in np.flatnonzero(~is_decode).tolist()
                    for part in self._prompt_parts(row, visibility, head_count)
                ],
            )
        return self._parts[key]

    def _decode_groups(self, rows: IntArray, visibility: Visibility, head_count: int) -> Iterator[DecodeGroup]:
        first = visibility.first_key(self._past)
        counts = self._past + 1 - first
        for members in group_by_length(counts[rows], self._group_token_limit):
            group = rows[members]
            count = int(counts[group].max())
            offset = np.arange(count)
            is_padding = offset >= counts[group, None]
            position = np.where(is_padding, 0, first[group, None] + offset)
            slots = np.where(is_padding, self._padding_slot, self._key_slots(group[:, None], position))
            bias = None
            if is_padding.any():
                bias = self._tensor(np.where(is_padding, np.float32(-np.inf), np.float32(0)))[:, None, None, :]
            yield DecodeGroup(self._tensor(self._query_start[group]), self._head_index(slots, head_count), bias, count)

    def _prompt_parts(self, row: int, visibility: Visibility, head_count: int) -> Iterator[PromptPart]:
        past, length, base = (int(a[row]) for a in (self._past, self._query_lengths, self._query_start))
        size = max(1, SCORE_LIMIT // (past + length))
        for begin in range(0, length, size):
            positions = np.arange(past + begin, past + min(begin + size, length))
            first = visibility.first_key(positions)
            keys = np.arange(first[0], positions[-1] + 1)
            yield PromptPart(
                start=base + begin,
                stop=base + begin + len(positions),
                key_index=self._head_index(self._key_slots(np.asarray(row), keys)[None], head_count),
                key_count=len(keys),
                query_position=self._tensor(positions - keys[0]),
                first_key=self._tensor(first - keys[0]),
                is_causal=bool(first[0] == positions[0] and first[-1] == first[0]),
            )

    def _pool_slots(self, row: IntArray, position: IntArray) -> IntArray:
        block = self._tables[row, position // self._block_size].astype(np.int64)
        return block * self._block_size + position % self._block_size

    def _key_slots(self, row: IntArray, position: IntArray) -> IntArray:
        if self._gathered_start is not None:
            return self._gathered_start[row] + position
        return self._pool_slots(row, position)

    def _head_index(self, slots: IntArray, head_count: int) -> torch.Tensor:
        """Rows `[B, heads, L]` for slots `[B, L]`: gathering by head at once spares a transposing copy per layer."""
        heads = torch.arange(head_count, device=self._device)
        return (self._tensor(slots)[:, None, :] * head_count + heads[None, :, None]).flatten()

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def group_by_length(lengths: IntArray, token_limit: int) -> Iterator[IntArray]:
    """Split rows into groups that are padded to their longest, longest first.

    A group ends when its padding costs more than another group would, or when it would hold more than `token_limit`
    tokens; a row longer than that is alone.

    Example: lengths 9000, 100, 90 give [0], [1, 2]: padding the short rows to 9000 tokens is the dearer choice.
    """
    order = np.argsort(-lengths, kind="stable")
    start, wasted = 0, 0
    for index in range(len(order)):
        longest = int(lengths[order[start]])
        wasted += longest - int(lengths[order[index]])
        if wasted > WASTED_TOKEN_LIMIT or (index > start and longest * (index + 1 - start) > token_limit):
            yield order[start:index]
            start, wasted = index, 0
    if len(order):
        yield order[start:]
