"""Attention over the paged cache on a GPU: what is launched, and with how large tiles.

Nothing here waits for the device or depends on what it holds, so a step that was recorded as a CUDA graph may be
replayed with other rows. Kernels are compiled once for a model: nothing that they are specialised for changes with the
rows of a step.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import KeySource
from executor_svc.gpu.attention_kernels import combine_kernel, decode_kernel, prompt_kernel, store_kernel, tile_of
from executor_svc.gpu.inputs import StepInputs

STORED_AT_ONCE = 2048  # numbers that one program of the store kernel writes
SPLIT_LIMIT = 64  # splits of one row: what they attended has to be put together
PROGRAMS_PER_CORE = 16  # that decodes should come to: rows of unequal length then even out
CROWDED = 64  # programs per core without any split from which on rows are not split
LEAST_KEYS = 128  # that are worth a split of their own: two tiles of most models' keys


class Tiles(NamedTuple):
    """How a kernel cuts its work."""

    queries: int  # rows of a tile: tokens * query heads of one key head
    keys: int
    warps: int
    stages: int  # tiles of keys that are loaded or computed at one time, about


# By the width of heads. Anything wider or longer spills registers, or does not fit the 99 KB that the smallest devices
# of compute capability 8 have; tests compile all of it. Where there is more (9.0: 227 KB), tiles are as large as go.
PROMPT_TILES = {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2), 512: Tiles(32, 16, 8, 2)}
LARGE_PROMPT_TILES = PROMPT_TILES | {128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 3), 512: Tiles(32, 32, 8, 2)}
LARGE_SHARED_BYTES = 200 << 10
FLOAT32_PROMPT_TILES = dict.fromkeys((64, 128, 256), Tiles(32, 16, 8, 2)) | {512: Tiles(16, 16, 4, 2)}
WIDEST_HEAD = max(PROMPT_TILES)


class Splits(NamedTuple):
    """How decoding rows are cut."""

    limit: int
    least_keys: int  # a row has one split for every so many keys, rounded up


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    inputs: StepInputs,
    source: KeySource,
) -> None:
    """Write keys `[key heads, T, dim]` and values `[value heads, T, value dim]` of a step into their slots.

    `keys` and `values` are `[slots, heads, dim]`, contiguous. Padding is written nowhere.
    """
    (key_heads, token_count, key_dim), (value_heads, _, value_dim) = key.shape, value.shape
    most_heads = max(key_heads, value_heads)
    head_tile = min(triton.next_power_of_2(most_heads), max(1, STORED_AT_ONCE // tile_of(max(key_dim, value_dim))))
    store_kernel[token_count, triton.cdiv(most_heads, head_tile)](
        key,
        value,
        keys,
        values,
        inputs.positions,
        inputs.rows,
        inputs.tables,
        inputs.table_starts,
        source.group * inputs.table_starts.stride(0),
        *_strides(key),
        *_strides(value),
        source.key_stride,
        source.value_stride,
        block_size=inputs.groups[source.group].block_size,
        key_heads=key_heads,
        key_dim=key_dim,
        value_heads=value_heads,
        value_dim=value_dim,
        head_tile=head_tile,
        enable_fp_fusion=True,
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    inputs: StepInputs,
    source: KeySource,
    rule: ScoreRule,
    *,
    core_count: int,
) -> torch.Tensor:
    """Attend from every token of a step; the device has `core_count` multiprocessors.

    `query` is `[query heads, T, dim]`, `keys` and `values` are `[slots, key heads, dim]`, contiguous, and may differ in
    dim and in slots. The result is `[T, query heads, value dim]`, contiguous, and 0 for padding.
    """
    shape = (inputs.token_count, len(query), values.shape[-1])
    if inputs.is_decode:
        output = query.new_empty(shape)
    else:
        output = query.new_zeros(shape)
        _attend_prompts(query, keys, values, output, inputs, source, rule)
    _attend_decodes(query, keys, values, output, inputs, source, rule, core_count)
    return output


def decode_tiles(group_size: int, key_dim: int, value_dim: int, itemsize: int) -> Tiles:
    """Tiles of rows with one token: small enough that several programs share a multiprocessor, each with keys and
    values of two tiles, 64 KB together, on their way.
    """
    key_bytes = _width_of(key_dim, value_dim) * itemsize
    keys = max(16, (16384 if itemsize < 4 else 8192) // key_bytes)
    queries = tile_of(group_size)
    return Tiles(queries, keys, warps=4 if queries <= 32 else 8, stages=3 if keys * key_bytes <= 16384 else 2)


def prompt_tiles(group_size: int, key_dim: int, value_dim: int, itemsize: int, shared_bytes: int) -> Tiles:
    """Tiles of rows with several tokens: the more queries, the less often keys are read."""
    table = LARGE_PROMPT_TILES if shared_bytes >= LARGE_SHARED_BYTES else PROMPT_TILES
    tiles = (FLOAT32_PROMPT_TILES if itemsize == 4 else table)[_width_of(key_dim, value_dim)]
    return tiles._replace(queries=max(tiles.queries, tile_of(group_size)))


def _width_of(key_dim: int, value_dim: int) -> int:
    widest = max(key_dim, value_dim)
    if widest > WIDEST_HEAD:
        raise ValueError(
            f"attention heads have {widest} numbers, and Triton's tiles {WIDEST_HEAD}; use attention 'torch'"
        )
    return max(64, int(tile_of(widest)))


def decode_splits(row_count: int, key_heads: int, core_count: int) -> Splits:
    """How the rows of a step are split, whatever their lengths: that is for the kernel to see."""
    programs = row_count * key_heads
    if programs >= CROWDED * core_count:
        return Splits(1, 1)
    limit = min(SPLIT_LIMIT, max(4, triton.cdiv(PROGRAMS_PER_CORE * core_count, programs)))
    return Splits(limit, LEAST_KEYS * triton.cdiv(programs, 2 * core_count))


def _attend_decodes(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    inputs: StepInputs,
    source: KeySource,
    rule: ScoreRule,
    core_count: int,
) -> None:
    (_, key_heads, key_dim), value_dim = keys.shape, values.shape[-1]
    query_heads, row_count = len(query), inputs.row_count
    splits = decode_splits(row_count, key_heads, core_count)
    tiles = decode_tiles(query_heads // key_heads, key_dim, value_dim, keys.element_size())
    parts = (row_count, query_heads, splits.limit) if splits.limit > 1 else (1, 1, 1)
    split_values = torch.empty((*parts, value_dim), dtype=torch.float32, device=query.device)
    split_weights = torch.empty((*parts, 2), dtype=torch.float32, device=query.device)
    decode_kernel[key_heads, splits.limit, row_count](
        query,
        keys,
        values,
        output,
        split_values,
        split_weights,
        output if rule.sinks is None else rule.sinks,
        *_row_arguments(inputs, source),
        *_strides(query),
        source.key_stride,
        source.value_stride,
        *_scales(rule),
        splits.least_keys,
        **_constants(query_heads, keys, values, inputs, source, rule, tiles),
    )
    if splits.limit > 1:
        combine_kernel[query_heads, row_count](
            output,
            split_values,
            split_weights,
            inputs.row_starts,
            inputs.contexts,
            splits.limit,
            splits.least_keys,
            window=source.visibility.window,
            chunk=source.visibility.chunk,
            value_dim=value_dim,
            key_tile=tiles.keys,
            enable_fp_fusion=True,
        )


def _attend_prompts(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    inputs: StepInputs,
    source: KeySource,
    rule: ScoreRule,
) -> None:
    (_, key_heads, key_dim), value_dim = keys.shape, values.shape[-1]
    group_size = len(query) // key_heads
    tiles = prompt_tiles(group_size, key_dim, value_dim, keys.element_size(), shared_memory(query.device))
    tile_count = inputs.token_count // (tiles.queries // group_size) + inputs.row_count
    prompt_kernel[tile_count, key_heads](
        query,
        keys,
        values,
        output,
        output if rule.sinks is None else rule.sinks,
        *_row_arguments(inputs, source),
        inputs.row_count,
        *_strides(query),
        source.key_stride,
        source.value_stride,
        *_scales(rule),
        **_constants(len(query), keys, values, inputs, source, rule, tiles),
    )


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return LARGE_SHARED_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _strides(heads: torch.Tensor) -> tuple[int, int]:
    """From head to head and from token to token, of a tensor `[heads, T, dim]`."""
    head_stride, token_stride, number_stride = heads.stride()
    assert number_stride == 1, "the numbers of a head are not contiguous"
    return head_stride, token_stride


def _scales(rule: ScoreRule) -> tuple[float, float]:
    """What products are multiplied with, and then, where there is a softcap, their tangents: scores are to base 2."""
    if rule.softcap:
        return rule.scaling / rule.softcap, rule.softcap * math.log2(math.e)
    return rule.scaling * math.log2(math.e), 0.0


def _row_arguments(inputs: StepInputs, source: KeySource) -> tuple[torch.Tensor | int, ...]:
    return (
        inputs.row_starts,
        inputs.contexts,
        inputs.tables,
        inputs.table_starts,
        source.group * inputs.table_starts.stride(0),
    )


def _constants(
    query_heads: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    inputs: StepInputs,
    source: KeySource,
    rule: ScoreRule,
    tiles: Tiles,
) -> dict[str, Any]:
    """What the kernels are compiled for."""
    _, key_heads, key_dim = keys.shape
    return {
        "group_size": query_heads // key_heads,
        "block_size": inputs.groups[source.group].block_size,
        "window": source.visibility.window,
        "chunk": source.visibility.chunk,
        "has_cap": bool(rule.softcap),
        "has_sinks": rule.sinks is not None,
        "key_heads": key_heads,
        "key_dim": key_dim,
        "value_dim": values.shape[-1],
        "query_tile": tiles.queries,
        "key_tile": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }
