"""What a decoder layer does between its matrix products, one launch each: norms, rotations, gated products.

Numbers are rounded to the model's type exactly where transformers' layers round them; all else is float32, and no
multiplication is fused with an addition, which would round less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from executor_svc.attention.layout import KeySource
from executor_svc.decoder_parts import counts_from_one
from executor_svc.gpu.inputs import StepInputs

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_ROUNDS_LAST = ("Olmo2RMSNorm", "Olmo3RMSNorm")  # as those whose weights count from 1 do
_TILE = 1024  # numbers that one program takes of a token: one fits all, since tokens are many or time is latency


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Divides by the root of the mean square and multiplies with weights."""

    weight: torch.Tensor  # [width]
    epsilon: float
    from_one: bool = False  # the weights count from 1
    rounds_first: bool = True  # to the model's type before weights are multiplied, which may then have another

    @classmethod
    def of(cls, module: Any) -> Norm:
        """The norm that a module of transformers computes."""
        epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        from_one = counts_from_one(module)
        return cls(module.weight, epsilon, from_one, not (from_one or type(module).__name__ in _ROUNDS_LAST))

    @property
    def style(self) -> tuple[bool, bool]:
        return self.from_one, self.rounds_first


def rms_norm(x: torch.Tensor, norm: Norm, out: torch.Tensor | None = None) -> torch.Tensor:
    """The norm of each row of `x`, `[T, width]`, contiguous rows at any distance; `out` may be `x` itself."""
    out = x.new_empty(x.shape) if out is None else out
    _launch_add_norm(x, None, out, None, norm)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm | None, before: Norm | None = None
) -> torch.Tensor:
    """Add `x`, or what the norm `before` makes of it, to `residual` in place; returns the norm of the sum.

    Without a norm the sum itself is returned, which is `residual`.
    """
    out = residual if norm is None else x.new_empty(x.shape)
    _launch_add_norm(x, residual, out, before, norm)
    return out


def rotate_and_store(
    qkv: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[Norm, Norm] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    inputs: StepInputs,
    source: KeySource,
) -> torch.Tensor:
    """Rotate queries and keys to their positions, write keys and values to the pool; returns the queries.

    `qkv` is `[T, (query heads + 2 * key heads) * dim]`; `rotation` has cosines and sines, `[positions, rotated]` each:
    the first so many numbers of a head are rotated. `norms` are those of each query and key head, before rotation.
    `keys` and `values` are `[slots, key heads, dim]`, contiguous. The result is `[T, query heads, dim]`, contiguous.
    Tokens of padding are written nowhere.
    """
    _, key_heads, dim = keys.shape
    head_count = qkv.shape[1] // dim
    query_heads = head_count - 2 * key_heads
    cosine, sine = rotation
    query = qkv.new_empty(len(qkv), query_heads, dim)
    padded_dim = triton.next_power_of_2(dim)
    tile = min(max(1, _TILE // padded_dim), triton.next_power_of_2(head_count))
    assert norms is None or (norms[0].style == norms[1].style and norms[0].epsilon == norms[1].epsilon)
    _rotate_and_store_kernel[(len(qkv), triton.cdiv(head_count, tile))](
        qkv,
        query,
        keys,
        values,
        cosine,
        sine,
        norms[0].weight if norms else None,
        norms[1].weight if norms else None,
        norms[0].epsilon if norms else 0.0,
        inputs.positions,
        inputs.rows,
        inputs.tables,
        inputs.table_starts,
        source.group * inputs.table_starts.stride(0),
        inputs.groups[source.group].block_size,
        source.key_stride,
        source.value_stride,
        qkv.stride(0),
        query_heads=query_heads,
        key_heads=key_heads,
        dim=dim,
        rotated=cosine.shape[-1],
        from_one=norms is not None and norms[0].from_one,
        rounds_first=norms is not None and norms[0].rounds_first,
        tile=tile,
        padded_dim=padded_dim,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return query


def gated_product(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Activated gates times ups, `[T, inner]`, of `[T, 2 * inner]` with all gates first."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} has no kernel; those that have one are {', '.join(ACTIVATIONS)}")
    inner = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), inner)
    grid = (len(gate_up), triton.cdiv(inner, _TILE))
    _gated_product_kernel[grid](
        gate_up,
        out,
        gate_up.stride(0),
        inner,
        is_silu=activation == "silu",
        block=_TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def _launch_add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor, before: Norm | None, norm: Norm | None
) -> None:
    known = before or norm
    assert known is not None, "neither norm is given: that is a plain addition"
    assert before is None or norm is None or before.style == norm.style
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(len(x),)](
        x,
        residual,
        out,
        before.weight if before else None,
        norm.weight if norm else None,
        before.epsilon if before else 0.0,
        norm.epsilon if norm else 0.0,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        width,
        from_one=known.from_one,
        rounds_first=known.rounds_first,
        block=block,
        enable_fp_fusion=False,
        num_warps=min(32, max(1, block // 512)),  # 16 numbers in each thread, which registers hold
    )


@triton.jit
def _weighted(x, weight, from_one: tl.constexpr, rounds_first: tl.constexpr, dtype: tl.constexpr):
    """A norm's last part: `x`, already divided, times the weights."""
    if rounds_first:
        x = x.to(dtype).to(tl.float32)
    if from_one:
        weight += 1.0
    return (x * weight).to(dtype).to(tl.float32)


@triton.jit
def _normed(
    x,
    weight,
    epsilon,
    column,
    width,
    from_one: tl.constexpr,
    rounds_first: tl.constexpr,
    dtype: tl.constexpr,
):
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + epsilon)
    return _weighted(x * scale, weights, from_one, rounds_first, dtype)


@triton.jit
def _add_norm_kernel(
    x,
    residual,
    out,
    weight_before,
    weight,
    epsilon_before,
    epsilon,
    x_stride,
    residual_stride,
    out_stride,
    width,
    from_one: tl.constexpr,
    rounds_first: tl.constexpr,
    block: tl.constexpr,
):
    """One row in each program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    is_in = column < width
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + row * x_stride + column, mask=is_in, other=0.0).to(tl.float32)
    if weight_before is not None:
        value = _normed(value, weight_before, epsilon_before, column, width, from_one, rounds_first, dtype)
    if residual is not None:
        place = residual + row * residual_stride + column
        total = (value + tl.load(place, mask=is_in, other=0.0).to(tl.float32)).to(dtype)
        tl.store(place, total, mask=is_in)
        value = total.to(tl.float32)
    if weight is not None:
        value = _normed(value, weight, epsilon, column, width, from_one, rounds_first, dtype)
        tl.store(out + row * out_stride + column, value.to(dtype), mask=is_in)


@triton.jit(do_not_specialize=["positions", "rows", "tables", "table_starts", "table_offset"])
def _rotate_and_store_kernel(
    qkv,
    query,
    keys,
    values,
    cosine,
    sine,
    query_weight,
    key_weight,
    epsilon,
    positions,
    rows,
    tables,
    table_starts,
    table_offset,  # of the layer group in `table_starts`
    block_size,
    key_stride,
    value_stride,
    qkv_stride,
    query_heads: tl.constexpr,
    key_heads: tl.constexpr,
    dim: tl.constexpr,
    rotated: tl.constexpr,
    from_one: tl.constexpr,
    rounds_first: tl.constexpr,
    tile: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """Some heads of one token in each program: those of queries, then those of keys, then those of values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * tile + tl.arange(0, tile)
    column = tl.arange(0, padded_dim)
    is_query = head < query_heads
    is_value = head >= query_heads + key_heads
    is_in = (head < query_heads + 2 * key_heads)[:, None] & (column < dim)[None, :]
    dtype: tl.constexpr = qkv.dtype.element_ty

    row = tl.load(rows + token)
    is_kept = row >= 0
    position = tl.where(is_kept, tl.load(positions + token), 0)

    half: tl.constexpr = rotated // 2
    is_rotated = column < rotated
    other_column = tl.where(column < half, column + half, tl.where(is_rotated, column - half, 0))
    source = qkv + token * qkv_stride + head[:, None] * dim
    given = tl.load(source + column[None, :], mask=is_in, other=0.0).to(tl.float32)
    other = tl.load(source + other_column[None, :], mask=is_in & is_rotated[None, :], other=0.0).to(tl.float32)
    own = given
    if query_weight is not None:
        scale = tl.rsqrt(tl.sum(own * own, axis=1) / dim + epsilon)[:, None]
        weights = _head_weights(query_weight, key_weight, is_query, column, column < dim)
        other_weights = _head_weights(query_weight, key_weight, is_query, other_column, is_rotated)
        own = _weighted(own * scale, weights, from_one, rounds_first, dtype)
        other = _weighted(other * scale, other_weights, from_one, rounds_first, dtype)

    angle = position * rotated + column
    cosines = tl.load(cosine + angle, mask=is_rotated, other=1.0)
    sines = tl.load(sine + angle, mask=is_rotated, other=0.0).to(tl.float32)
    one = own * cosines.to(tl.float32)[None, :]
    two = other * tl.where(column < half, -sines, sines)[None, :]
    if cosines.dtype == dtype:  # the model's own code rounds no products with cosines of float32
        one, two = one.to(dtype).to(tl.float32), two.to(dtype).to(tl.float32)
    result = tl.where(is_value[:, None], given, one + two).to(dtype)

    place = (token * query_heads + head)[:, None] * dim + column[None, :]
    tl.store(query + place, result, mask=is_in & is_query[:, None])
    start = tl.load(table_starts + table_offset + row, mask=is_kept, other=0)
    block = tl.load(tables + start + position // block_size, mask=is_kept, other=0).to(tl.int64)
    offset = position % block_size
    kept_heads = tl.where(is_kept, key_heads, 0)
    key_head = head - query_heads
    place = ((block * key_stride + offset) * key_heads + key_head)[:, None] * dim + column[None, :]
    is_kept_key = (key_head >= 0) & (key_head < kept_heads)
    tl.store(keys + place, result, mask=is_in & is_kept_key[:, None])
    value_head = key_head - key_heads
    place = ((block * value_stride + offset) * key_heads + value_head)[:, None] * dim + column[None, :]
    is_kept_value = (value_head >= 0) & (value_head < kept_heads)
    tl.store(values + place, result, mask=is_in & is_kept_value[:, None])


@triton.jit
def _head_weights(query_weight, key_weight, is_query, column, is_in):
    """The weights of each head's norm, `[heads, columns]`; those that values get are not used."""
    for_queries = tl.load(query_weight + column, mask=is_in, other=0.0).to(tl.float32)
    for_keys = tl.load(key_weight + column, mask=is_in, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], for_queries[None, :], for_keys[None, :])


@triton.jit
def _gated_product_kernel(gate_up, out, stride, inner, is_silu: tl.constexpr, block: tl.constexpr):
    """Some numbers of one token in each program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_in = column < inner
    dtype: tl.constexpr = gate_up.dtype.element_ty
    gate = tl.load(gate_up + token * stride + column, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * stride + inner + column, mask=is_in, other=0.0).to(tl.float32)
    slope = gate
    if not is_silu:  # tanh(a) = 2 * sigmoid(2 * a) - 1, so that gelu is gate * sigmoid(2 * a)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    small = tl.exp(-tl.abs(slope))  # at most 1: nothing overflows
    active = (gate * (tl.where(slope >= 0, 1.0, small) / (1.0 + small))).to(dtype).to(tl.float32)
    tl.store(out + token * inner + column, (active * up).to(dtype), mask=is_in)
