"""The paged pool as memory."""

import psutil
import pytest
import torch

from executor_svc.kv_cache import LayerShape, PagedPool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_on_a_cpu_takes_memory_only_as_it_is_used(dtype):
    """Touching gigabytes at start takes many seconds, and takes them from everybody else on the machine."""
    process = psutil.Process()
    before = process.memory_info().rss
    pool = PagedPool({0: LayerShape(4, 64, 4, 64)}, 1 << 14, 16, dtype, torch.device("cpu"))
    taken = process.memory_info().rss - before

    assert pool.byte_count > 250 << 20
    assert taken < 50 << 20
    assert pool.keys(0).dtype is dtype
    assert not pool.keys(0)[-32:].any()
