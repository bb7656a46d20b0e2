"""The paged pool as memory."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import psutil
import pytest
import torch

from executor_svc.kv_cache import PagedPool
from executor_svc.layer_groups import FULL, Visibility
from executor_svc.pool_geometry import LayerShape, plan_pool

WIDE, NARROW = LayerShape(4, 16, 4, 8), LayerShape(1, 16, 1, 8)
SLIDING = Visibility(window=16)
CPU = torch.device("cpu")


def mixed_pool(block_count: int = 6) -> PagedPool:
    """Two full layers, one of them narrow, beside five sliding ones."""
    shapes = {0: WIDE, 1: NARROW} | dict.fromkeys(range(2, 7), WIDE)
    geometry = plan_pool(shapes, {FULL: [0, 1], SLIDING: range(2, 7)}, 4)
    return PagedPool(geometry, block_count, torch.float32, CPU)


def tokens_of(pool: PagedPool, tensor: torch.Tensor, layer: int, stride: int, block: int) -> torch.Tensor:
    """The part of a layer's keys or values that one block holds."""
    block_size = pool.geometry.groups[pool.place(layer).group].block_size
    return tensor[block * stride : block * stride + block_size]


def contents(pool: PagedPool, group: int, block: int) -> list[torch.Tensor]:
    """Keys and values of every layer of a group in one block; views, to read or to write."""
    found = []
    for layer, place in pool.geometry.places.items():
        if place.group == group:
            found.append(tokens_of(pool, pool.keys(layer), layer, place.keys.stride, block))
            found.append(tokens_of(pool, pool.values(layer), layer, place.values.stride, block))
    return found


SMALL = plan_pool({0: LayerShape(4, 64, 4, 64)}, {FULL: [0]}, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_on_a_cpu_takes_memory_only_as_it_is_used(dtype):
    """Touching gigabytes at start takes many seconds, and takes them from everybody else on the machine."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:  # other tests' threads take memory too
        byte_count, taken = alone.submit(memory_of_a_cache, dtype).result()
    pool = PagedPool(SMALL, 4, dtype, CPU)

    assert byte_count > 250 << 20
    assert taken < 50 << 20
    assert pool.keys(0).dtype is dtype
    assert not pool.keys(0).any()


def memory_of_a_cache(dtype):
    """Bytes of a cache, and bytes that this process has more once it is there."""
    process = psutil.Process()
    before = process.memory_info().rss
    pool = PagedPool(SMALL, 1 << 14, dtype, CPU)
    return pool.byte_count, process.memory_info().rss - before


def test_a_plain_model_has_its_tokens_one_after_the_other():
    """Block by block, as kernels know it: layers of one kind pay nothing for there being others."""
    pool = PagedPool(plan_pool({0: WIDE, 1: WIDE}, {FULL: [0, 1]}, 4), 6, torch.float32, CPU)

    assert pool.keys(0).shape == (7 * 4, 4, 16)
    assert pool.values(1).shape == (7 * 4, 4, 8)
    assert pool.byte_count == 7 * 4 * 2 * (4 * 16 + 4 * 8) * 4
    assert pool.byte_count == sum(plane.nbytes for plane in pool.planes)


def test_layers_are_views_of_the_pool():
    """A copy would cost the memory of the cache once more, and writes to it would be lost."""
    pool = mixed_pool()
    ranges = [(plane.data_ptr(), plane.data_ptr() + plane.nbytes) for plane in pool.planes]

    for layer in pool.geometry.places:
        for tensor in (pool.keys(layer), pool.values(layer), pool.keys(layer).flatten(0, 1)):
            assert tensor.is_contiguous()
            assert any(start <= tensor.data_ptr() < tensor.data_ptr() + tensor.nbytes <= end for start, end in ranges)


@pytest.mark.parametrize("groups", [(0,) * 6, (1,) * 6, (0, 1, 0, 1, 1, 0), (1, 0, 0, 1, 0, 1)], ids=str)
def test_any_block_serves_any_group(groups):
    """The scheduler has one list of free blocks: a block must keep what its own group wrote, beside any neighbours."""
    pool = mixed_pool()
    written = {}
    for block, group in enumerate(groups):
        for index, part in enumerate(contents(pool, group, block)):
            written[block, index] = part.normal_().clone()

    for block, group in enumerate(groups):
        for index, part in enumerate(contents(pool, group, block)):
            assert torch.equal(part, written[block, index])
    assert all(not plane[pool.padding_block].any() for plane in pool.planes)


@pytest.mark.parametrize("group", [0, 1])
def test_copying_a_block_takes_every_layer_along(group):
    """A fork starts with a copy of its parent's last block; one layer left out would give it another past."""
    pool = mixed_pool()
    expected = [part.normal_().clone() for part in contents(pool, group, 4)]
    pool.copy_blocks(np.array([4, 4]), np.array([0, 2]))

    for block in (0, 2, 4):
        assert all(torch.equal(*pair) for pair in zip(contents(pool, group, block), expected, strict=True))
    assert all(not plane[[1, 3, 5, pool.padding_block]].any() for plane in pool.planes)


def test_copies_read_everything_before_they_write_anything():
    """A block that is freed in a plan may be given away in it: as a source it still has what it had."""
    pool = mixed_pool()
    for plane in pool.planes:
        plane.normal_()
    before = [plane.clone() for plane in pool.planes]
    pool.copy_blocks(np.array([1, 0, 2]), np.array([0, 1, 3]))
    pool.copy_blocks(np.array([], dtype=np.int64), np.array([], dtype=np.int64))

    for plane, old in zip(pool.planes, before, strict=True):
        assert torch.equal(plane, old[[1, 0, 2, 2, 4, 5, 6]])
