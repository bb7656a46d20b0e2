"""The paged cache: keys and values of every layer, in blocks that a block table puts in order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from executor_svc.attention.layout import StepLayout


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of one token, as its first forward pass showed it; keys and values may differ."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def element_count(self) -> int:
        """Numbers that one token takes in this layer."""
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim


def token_bytes(shapes: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Bytes of cache that one token takes in all layers together."""
    return sum(shape.element_count for shape in shapes.values()) * dtype.itemsize


class PagedPool:
    """Keys and values by layer, `[blocks, block_size, heads, dim]`.

    One block more than `block_count` is allocated and stays zero: padding reads it, so what another request left in
    a block (a NaN, say) never meets the arithmetic of this one.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        block_count: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_count = block_count
        self.block_size = block_size
        self.padding_slot = block_count * block_size
        self.byte_count = token_bytes(shapes, dtype) * block_size * (block_count + 1)
        blocks = (block_count + 1, block_size)
        self._keys = {
            layer: _zeros((*blocks, shape.key_heads, shape.key_dim), dtype, device) for layer, shape in shapes.items()
        }
        self._values = {
            layer: _zeros((*blocks, shape.value_heads, shape.value_dim), dtype, device)
            for layer, shape in shapes.items()
        }

    def keys(self, layer: int) -> torch.Tensor:
        """The layer's keys, one row for each token slot: `[slots, heads, dim]`."""
        return self._keys[layer].flatten(0, 1)

    def values(self, layer: int) -> torch.Tensor:
        """The layer's values, one row for each token slot: `[slots, heads, dim]`."""
        return self._values[layer].flatten(0, 1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU the system hands out their pages when they are first written, so that neither the start nor
    the machine pays for blocks that are never used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    untouched = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(shape)


class PagedCache(Cache):
    """What a transformers model sees as its cache during one step: it writes into the pool.

    Where the model hands the attention function what `update` returned, untouched, the function reads the pool by
    itself. Where it does not (keys expanded from a latent, layers that share keys), `layout.read_slots` is set and
    `update` returns every key and value that the step's rows see, end to end.
    """

    def __init__(self, pool: PagedPool, layout: StepLayout) -> None:
        super().__init__(layers=[])
        self._pool = pool
        self._layout = layout

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's new keys and values, `[1, heads, tokens, dim]`, to their slots."""
        keys, values = self._pool.keys(layer_idx), self._pool.values(layer_idx)
        keys.index_copy_(0, self._layout.write_slots, key_states[0].transpose(0, 1))
        values.index_copy_(0, self._layout.write_slots, value_states[0].transpose(0, 1))
        read_slots = self._layout.read_slots
        if read_slots is None:
            return key_states, value_states
        read = (tensor.index_select(0, read_slots).transpose(0, 1).unsqueeze(0) for tensor in (keys, values))
        return next(read), next(read)

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        """Always 0: rows have different lengths, and every model is told its positions."""
        return 0
