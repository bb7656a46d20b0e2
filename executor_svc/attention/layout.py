"""Where the queries of one step find their keys: index tensors, made once for all layers that share them.

Everything here is arithmetic on the host with numpy; only its results go to the device. Token slots number a layer's
keys in the pool: slot = block * stride + offset, where the stride is the layer's distance from block to block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from executor_svc.batch import IntArray, LayerGroup
from executor_svc.layer_groups import Visibility

WASTED_TOKEN_LIMIT = 2048  # reading this many padding tokens costs about as much as one more part does
SCORE_LIMIT = 1 << 20  # query x key pairs that a part of a prompt computes at once, for each head


@dataclass(frozen=True, slots=True)
class DecodePart:
    """Rows of one query each, with about as many keys, computed together."""

    query_index: torch.Tensor  # [B] into the step's tokens
    key_index: torch.Tensor  # [B * heads * L] rows of the keys seen as [slots * heads, dim]
    value_index: torch.Tensor  # the same for values; the same tensor where their strides are equal
    bias: torch.Tensor | None  # [B, 1, 1, L] -inf where padding; None: no padding
    key_count: int  # L


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Consecutive queries of one row, computed together."""

    start: int  # the queries are the step's tokens [start, stop)
    stop: int
    key_index: torch.Tensor  # [heads * K] rows of the keys seen as [slots * heads, dim]
    value_index: torch.Tensor  # the same for values
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

    decode: list[DecodePart]
    prompt: list[PromptPart]


@dataclass(frozen=True, slots=True)
class KeySource:
    """What decides where a layer's queries find their keys; layers for which it is equal share their parts."""

    group: int  # index of the layer group whose blocks hold the keys
    visibility: Visibility  # no wider than the group's
    head_count: int  # key heads
    key_stride: int = 1  # slots from one block to the next; gathered keys have no blocks
    value_stride: int = 1


class _PooledTokens:
    """Where the tokens of one layer group are in the pool."""

    def __init__(self, group: LayerGroup, tables: NDArray[np.int32], padding_block: int) -> None:
        self.padding = padding_block
        self._block_size = group.block_size
        self._tables = tables

    def locate(self, row: IntArray, position: IntArray) -> tuple[IntArray, IntArray]:
        """Block and offset of positions that their rows have a block for."""
        block = self._tables[row, position // self._block_size].astype(np.int64)
        assert block.min(initial=0) >= 0, "a position without a block is written or read"
        return block, position % self._block_size


class _GatheredTokens:
    """Where the tokens of one layer group are in what the cache returns: each row's, from the first that it sees."""

    def __init__(self, group: LayerGroup, past: IntArray, context_lengths: IntArray) -> None:
        self._first = group.first_seen(past)
        counts = context_lengths - self._first
        self._start = np.cumsum(counts) - counts
        self.row = np.repeat(np.arange(len(counts)), counts)
        self.position = np.arange(len(self.row)) + (self._first - self._start)[self.row]
        self.padding = len(self.row)

    def locate(self, row: IntArray, position: IntArray) -> tuple[IntArray, IntArray]:
        """Each token is a block of its own here."""
        return self._start[row] + position - self._first[row], np.zeros_like(position)


class StepLayout:
    """The rows of one step: where their tokens are written and what each of them reads."""

    def __init__(
        self,
        query_lengths: IntArray,  # [R]
        context_lengths: IntArray,  # [R]
        block_tables: Sequence[NDArray[np.int32]],  # by layer group [R, W]
        *,
        groups: Sequence[LayerGroup],
        padding_block: int,
        decode_token_limit: int,  # keys, padding included, that decoding rows computed together may have
        gathered: bool,  # attention reads what the cache returned rather than the pool
        device: torch.device,
    ) -> None:
        self.gathered = gathered
        self._past = context_lengths - query_lengths
        self._query_lengths = query_lengths
        self._query_start = np.cumsum(query_lengths) - query_lengths
        self._decode_token_limit = decode_token_limit
        self._device = device
        self._pooled = [_PooledTokens(*pair, padding_block) for pair in zip(groups, block_tables, strict=True)]
        self._gathered = [_GatheredTokens(group, self._past, context_lengths) for group in groups] if gathered else []
        self._write_slots: dict[tuple[int, int], torch.Tensor] = {}
        self._read_slots: dict[tuple[int, int], torch.Tensor] = {}
        self._parts: dict[KeySource, Parts] = {}
        self._row = np.repeat(np.arange(len(query_lengths)), query_lengths)  # [T]
        self._position = np.arange(len(self._row)) + (self._past - self._query_start)[self._row]  # [T]
        self.position_ids = self._tensor(self._position).unsqueeze(0)  # [1, T]

    def write_slots(self, group: int, stride: int) -> torch.Tensor:
        """Where the step's tokens go, `[T]`, in layers of `group` whose blocks are `stride` tokens apart."""
        slots = self._write_slots.get((group, stride))
        if slots is None:
            block, offset = self._pooled[group].locate(self._row, self._position)
            slots = self._write_slots[group, stride] = self._tensor(block * stride + offset)
        return slots

    def read_slots(self, group: int, stride: int) -> torch.Tensor:
        """The slots of all keys that the cache of a gathered layout returns, and last one of the padding block's."""
        slots = self._read_slots.get((group, stride))
        if slots is None:
            pooled, gathered = self._pooled[group], self._gathered[group]
            block, offset = pooled.locate(gathered.row, gathered.position)
            slots = self._tensor(np.append(block * stride + offset, pooled.padding * stride))
            self._read_slots[group, stride] = slots
        return slots

    def parts(self, source: KeySource) -> Parts:
        """The step's queries and the keys they see."""
        parts = self._parts.get(source)
        if parts is None:
            is_decode = self._query_lengths == 1
            parts = self._parts[source] = Parts(
                decode=list(self._decode_parts(np.flatnonzero(is_decode), source)),
                prompt=[
                    part for row in np.flatnonzero(~is_decode).tolist() for part in self._prompt_parts(row, source)
                ],
            )
        return parts

    def _decode_parts(self, rows: IntArray, source: KeySource) -> Iterator[DecodePart]:
        tokens = self._tokens(source)
        first = source.visibility.first_key(self._past)
        counts = self._past + 1 - first
        for members in split_by_length(counts[rows], self._decode_token_limit):
            part = rows[members]
            count = int(counts[part].max())
            offset = np.arange(count)
            is_padding = offset >= counts[part, None]
            block, offset = tokens.locate(part[:, None], first[part, None] + np.where(is_padding, 0, offset))
            bias = None
            if is_padding.any():
                block, offset = np.where(is_padding, tokens.padding, block), np.where(is_padding, 0, offset)
                bias = self._tensor(np.where(is_padding, np.float32(-np.inf), np.float32(0)))[:, None, None, :]
            yield DecodePart(
                self._tensor(self._query_start[part]), *self._head_indices(block, offset, source), bias, count
            )

    def _prompt_parts(self, row: int, source: KeySource) -> Iterator[PromptPart]:
        past, length, base = (int(a[row]) for a in (self._past, self._query_lengths, self._query_start))
        size = max(1, SCORE_LIMIT // (past + length))
        for begin in range(0, length, size):
            positions = np.arange(past + begin, past + min(begin + size, length))
            first = source.visibility.first_key(positions)
            keys = np.arange(first[0], positions[-1] + 1)
            block, offset = self._tokens(source).locate(np.asarray(row), keys)
            key_index, value_index = self._head_indices(block[None], offset[None], source)
            yield PromptPart(
                start=base + begin,
                stop=base + begin + len(positions),
                key_index=key_index,
                value_index=value_index,
                key_count=len(keys),
                query_position=self._tensor(positions - keys[0]),
                first_key=self._tensor(first - keys[0]),
                is_causal=bool(first[0] == positions[0] and first[-1] == first[0]),
            )

    def _tokens(self, source: KeySource) -> _PooledTokens | _GatheredTokens:
        return self._gathered[source.group] if self.gathered else self._pooled[source.group]

    def _head_indices(self, block: IntArray, offset: IntArray, source: KeySource) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of keys and of values for tokens `[B, L]`."""
        key_index = self._head_index(block * source.key_stride + offset, source.head_count)
        if source.value_stride == source.key_stride:
            return key_index, key_index
        return key_index, self._head_index(block * source.value_stride + offset, source.head_count)

    def _head_index(self, slots: IntArray, head_count: int) -> torch.Tensor:
        """Rows `[B, heads, L]` for slots `[B, L]`: gathering by head at once spares a transposing copy per layer."""
        heads = torch.arange(head_count, device=self._device)
        return (self._tensor(slots)[:, None, :] * head_count + heads[None, :, None]).flatten()

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def split_by_length(lengths: IntArray, token_limit: int) -> Iterator[IntArray]:
    """Split rows into parts that are padded to their longest, longest first.

    A part ends when its padding costs more than another part would, or when it would hold more than `token_limit`
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
