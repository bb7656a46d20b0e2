"""What the device can do at most: bytes and matrix products a second, as torch gets them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.given import Given, Tell

_WARM_UP, _TURNS = 3, 10


def run(given: Given, tell: Tell) -> None:
    """Copy some gigabytes, read some, and multiply large matrices."""
    byte_count = 1 << 20 if given.rehearse else 8 << 30
    size = f"{byte_count >> 20:,} MiB"
    source = torch.randn(byte_count // 4, device=given.device)
    target = torch.empty_like(source)
    copying = median_s(partial(target.copy_, source), given.device)
    tell({"what": "copy", "GB/s": round(2 * byte_count / copying / 1e9, 1), "size": size})
    reading = median_s(source.sum, given.device)
    tell({"what": "read (sum)", "GB/s": round(byte_count / reading / 1e9, 1), "size": size})
    del source, target

    width = 128 if given.rehearse else 8192
    one, other = (torch.randn(width, width, device=given.device).bfloat16() for _ in range(2))
    multiplying = median_s(partial(torch.mm, one, other), given.device)
    tell({"what": "bf16 product", "TFLOP/s": round(2 * width**3 / multiplying / 1e12, 1), "size": f"{width}³"})


def median_s(run_once: Callable[[], object], device: str, turns: int = _TURNS) -> float:
    """Seconds that it takes on the device, the median of some turns after others that do not count."""
    for _ in range(_WARM_UP):
        run_once()
    if device == "cpu":
        return statistics.median(_seconds(run_once) for _ in range(turns))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(turns)]
    for began, ended in events:
        began.record()
        run_once()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in events) / 1000


def _seconds(run_once: Callable[[], object]) -> float:
    began = time.perf_counter()
    run_once()
    return time.perf_counter() - began
