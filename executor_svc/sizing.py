"""How large the cache becomes: what is left of the memory when the weights are loaded and the largest step has run."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import torch

from executor_svc.batch import IntArray, LayerGroup
from executor_svc.config import ExecutorConfig
from executor_svc.kv_cache import PagedPool
from executor_svc.machine import resident_bytes
from executor_svc.model import LoadedModel, ModelError
from executor_svc.pool_geometry import PoolGeometry

_CPU_CACHE_LIMIT = 4 << 30
_CONTEXT_BYTES = 512 << 20  # what CUDA and its libraries take before anybody asks for memory
_TRIAL_DECODE_LENGTH = 1024  # longer rows take a CPU seconds, and no more memory: groups of rows have a limit


def taken_bytes(device: torch.device) -> int:
    """What is taken of a GPU's memory, by whomever; of a CPU's nothing is said."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def host_cache_budget(available: int, step_bytes: int) -> int:
    """Bytes for the cache of a CPU, whose memory others need too; `available` once the weights were loaded."""
    return min(_CPU_CACHE_LIMIT, max(0, available - step_bytes) // 4)


def device_cache_budget(device: torch.device, utilization: float, taken_at_start: int, step_bytes: int) -> int:
    """Bytes for the cache of a GPU beside all that is loaded now and a step of `step_bytes`.

    Everything of this process together takes at most the share `utilization` of the memory. What others take does not
    count, except that nobody can have more than what is free.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    own = max(_CONTEXT_BYTES + (total - free) - taken_at_start, 0)
    return max(0, min(int(utilization * total) - own, free) - step_bytes)


def bytes_kept_by(device: torch.device, work: Callable[[], object]) -> int:
    """What the result of `work` keeps on a GPU until it is let go, which is done here. 0 on a CPU."""
    if device.type == "cpu":
        return 0
    result = work()
    kept = _settled_bytes(device)
    del result
    return max(0, kept - _settled_bytes(device))


def _settled_bytes(device: torch.device) -> int:
    """What is taken once nothing runs and nothing is kept for later."""
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    return taken_bytes(device)


def run_largest_step(loaded: LoadedModel, config: ExecutorConfig) -> int:
    """Run the step that takes most memory: a full token budget of prompt, then every slot decoding.

    Returns the bytes that it took at its peak. One block stands in for the whole cache: what it holds does not matter,
    only how much is read.
    """
    model = loaded.steps
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left there would hide what the step takes
        torch.cuda.reset_peak_memory_stats(model.device)
    before, peak_before = _memory(model.device)
    pool = PagedPool(model.traits.geometry(config.block_size), 1, model.traits.cache_dtype, model.device)
    prompt_lengths = _split(config.max_num_batched_tokens, loaded.context_length)
    slot_count = config.max_num_seqs
    decode_length = max(
        1, min(loaded.context_length, model.traits.decode_token_limit // slot_count, _TRIAL_DECODE_LENGTH)
    )
    for query_lengths, context_lengths in (
        (prompt_lengths, prompt_lengths),
        (np.ones(slot_count, dtype=np.int64), np.full(slot_count, decode_length)),
    ):
        with torch.inference_mode():
            tables = [
                np.zeros((len(query_lengths), -(-loaded.context_length // group.block_size)), dtype=np.int32)
                for group in pool.geometry.groups
            ]
            token_ids = torch.zeros(int(query_lengths.sum()), dtype=torch.int64, device=model.device)
            rows = torch.arange(min(slot_count, len(token_ids)), device=model.device)
            model.step(query_lengths, context_lengths, tables, token_ids, pool, rows).float().argmax(-1).cpu()
    after, peak = _memory(model.device)
    return max(0, (peak if peak > peak_before else after) - before)


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that the model takes on its device now, and the most that it took."""
    if device.type == "cpu":
        return resident_bytes()
    return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)


def _split(total: int, limit: int) -> IntArray:
    """`total` as a sum of lengths of at most `limit`."""
    whole, rest = divmod(total, limit)
    return np.array([limit] * whole + [rest] * (rest > 0), dtype=np.int64)


def block_count(loaded: LoadedModel, geometry: PoolGeometry, config: ExecutorConfig, budget: int) -> int:
    """Blocks that fit into so many bytes, at most as many as all slots with full contexts could use.

    Raises `ModelError` where not even one of each layer group does.
    """
    block_bytes = geometry.block_elements * loaded.steps.traits.cache_dtype.itemsize
    usable = config.max_num_seqs * sum(
        _most_blocks(group, loaded.context_length, config.max_num_batched_tokens) for group in geometry.groups
    )
    count = min(budget // block_bytes - 1, usable)  # one more is the block of zeros
    group_count = len(geometry.groups)
    if count < group_count:
        sizes = " or ".join(str(size) for size in sorted({group.block_size for group in geometry.groups}))
        shares = f", each of the {group_count} layer groups needs one" if group_count > 1 else ""
        raise ModelError(
            f"the cache may use {budget} bytes but needs {(group_count + 1) * block_bytes}: a block of {sizes} tokens "
            f"takes {block_bytes} bytes{shares} and one block is kept for padding; "
            + (
                "raise cache_memory_bytes or lower block_size"
                if config.cache_memory_bytes
                else "free memory, lower max_num_batched_tokens or set cache_memory_bytes"
            )
        )
    return count


def _most_blocks(group: LayerGroup, context_length: int, step_token_count: int) -> int:
    """Blocks of a group that one request can use.

    Under a window that is what it sees and the tokens of two plans, for so many are on their way at once; one more
    because blocks begin anywhere, and one that is given back late.
    """
    limits = [limit for limit in (group.window, group.chunk) if limit]
    span = min(limits, default=context_length) + 2 * step_token_count
    return min(-(-context_length // group.block_size), -(-span // group.block_size) + 2)
