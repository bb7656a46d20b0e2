"""The paged cache: keys and values of every layer, in blocks that block tables put in order."""

import math
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from executor_svc.attention.layout import StepLayout
from executor_svc.batch import IntArray
from executor_svc.pool_geometry import LayerPlace, PoolGeometry, Region

_ALIGNMENT = 64  # a line of the processor's cache: a head's numbers should lie in as few as can be


class PagedPool:
    """Keys and values of all layers in blocks, any of which serves any layer group.

    One block more than `block_count` is allocated and stays zero: padding reads it, so what another request left in
    a block (a NaN, say) never meets the arithmetic of this one.
    """

    def __init__(self, geometry: PoolGeometry, block_count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.geometry = geometry
        self.block_count = block_count
        self.padding_block = block_count
        self.byte_count = geometry.block_elements * dtype.itemsize * (block_count + 1)
        key_planes = [_zeros((block_count + 1, plane.key_elements), dtype, device) for plane in geometry.planes]
        value_planes = [_zeros((block_count + 1, plane.value_elements), dtype, device) for plane in geometry.planes]
        self.planes = (*key_planes, *value_planes)  # all there is, each [blocks, numbers]
        self._keys = {
            layer: _slots(key_planes[place.plane], place.keys, place.shape.key_heads, place.shape.key_dim)
            for layer, place in geometry.places.items()
        }
        self._values = {
            layer: _slots(value_planes[place.plane], place.values, place.shape.value_heads, place.shape.value_dim)
            for layer, place in geometry.places.items()
        }

    def keys(self, layer: int) -> torch.Tensor:
        """The layer's keys, `[slots, heads, dim]`: a token's slot is its block * the region's stride + its offset."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """The layer's values, `[slots, heads, dim]`, numbered as the keys are."""
        return self._values[layer]

    def place(self, layer: int) -> LayerPlace:
        """Where the layer's keys and values are."""
        return self.geometry.places[layer]

    def copy_blocks(self, sources: IntArray, destinations: IntArray) -> None:
        """Copy whole blocks, all layers of them: every source is read before any destination is written."""
        if not len(sources):
            return
        device = self.planes[0].device
        read, written = (torch.from_numpy(np.ascontiguousarray(ids)).to(device) for ids in (sources, destinations))
        for plane in self.planes:
            plane.index_copy_(0, written, plane.index_select(0, read))


def _slots(plane: torch.Tensor, region: Region, heads: int, dim: int) -> torch.Tensor:
    """One layer's part of a plane, `[slots, heads, dim]`, beginning with the layer's first token in block 0."""
    return plane.view(-1, heads, dim)[region.first :]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU the system hands out their pages when they are first written, so that neither the start nor
    the machine pays for blocks that are never used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    byte_count = math.prod(shape) * dtype.itemsize
    untouched = np.zeros(byte_count + _ALIGNMENT, dtype=np.uint8)
    start = -untouched.ctypes.data % _ALIGNMENT
    return torch.from_numpy(untouched[start : start + byte_count]).view(dtype).view(shape)


class PagedCache(Cache):
    """What a transformers model sees as its cache during one step: it writes into the pool.

    Where the model hands the attention function what `update` returned, untouched, the function reads the pool by
    itself. Where it does not (keys expanded from a latent), the layout is a gathered one and `update` returns every
    key and value that the step's rows see, end to end.
    """

    def __init__(self, pool: PagedPool, layout: StepLayout) -> None:
        super().__init__(layers=[])
        self._pool = pool
        self._layout = layout

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's new keys and values, `[1, heads, tokens, dim]`, to their slots."""
        place, layout = self._pool.place(layer_idx), self._layout
        keys, values = self._pool.keys(layer_idx), self._pool.values(layer_idx)
        keys.index_copy_(0, layout.write_slots(place.group, place.keys.stride), key_states[0].transpose(0, 1))
        values.index_copy_(0, layout.write_slots(place.group, place.values.stride), value_states[0].transpose(0, 1))
        if not layout.gathered:
            return key_states, value_states
        return (
            keys.index_select(0, layout.read_slots(place.group, place.keys.stride)).transpose(0, 1).unsqueeze(0),
            values.index_select(0, layout.read_slots(place.group, place.values.stride)).transpose(0, 1).unsqueeze(0),
        )

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        """Always 0: rows have different lengths, and every model is told its positions."""
        return 0
