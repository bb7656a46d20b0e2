"""Taking a transformers model apart for the native step: which models it can run, and their weights, packed."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from executor_svc.decoder_parts import (
    Experts,
    LayerParts,
    activation_of,
    counts_from_one,
    embedding_scale,
    parts_of,
    reason_against_parts,
)
from executor_svc.memory import Arena, forget
from executor_svc.native.build import NativeUnavailableError
from executor_svc.native.library import BFLOAT16, FLOAT32, NativeLayer, NativeModel, library

BLOCK = 32  # outputs that are packed together
_ALIGNMENT = 64
_LARGEST_DIM = 256
_MOST_SHARED = 16  # query heads of one key head
_ROWS_AT_ONCE = 4096
_GATES = {"silu": (1.0, 0.0), "gelu_pytorch_tanh": (2 * (2 / math.pi) ** 0.5, 2 * (2 / math.pi) ** 0.5 * 0.044715)}
"""By activation: slope and cube of `gate` in `product.h`."""
_TYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def check_native(model: Any, dtype: torch.dtype) -> None:
    """Raise `NativeUnavailableError` unless the native step has everything that the model needs in this type."""
    reason = _reason_against(model, dtype)
    if reason:
        raise NativeUnavailableError(reason)
    if not _TYPES[dtype] & library().paceline_types():
        raise NativeUnavailableError(f"this processor does not compute in {str(dtype).removeprefix('torch.')}")


def _reason_against(model: Any, dtype: torch.dtype) -> str:
    if reason := reason_against_parts(model):
        return reason
    if dtype not in _TYPES:
        return f"its type is {dtype}"
    first, parts = model.model.layers[0], [parts_of(layer) for layer in model.model.layers]
    if len({(part.inner, part.experts is None) for part in parts}) > 1:
        return "its gated products are not alike in all layers: mixtures of experts beside plain ones, or other sizes"
    dim, shared = first.self_attn.head_dim, first.self_attn.num_key_value_groups
    unit = 32 if dtype == torch.bfloat16 else 16
    if dim % unit or parts[0].inner % unit or model.config.hidden_size % BLOCK:
        return f"its heads or gated products are not multiples of {unit}, or its hidden size not one of {BLOCK}"
    if dim > _LARGEST_DIM or shared > _MOST_SHARED:
        return (
            f"its heads have {dim} numbers and {shared} queries for a key; the most are {_LARGEST_DIM}, {_MOST_SHARED}"
        )
    return ""


def _matrices(model: Any) -> Iterator[torch.Tensor]:
    """All that is packed; of experts together, `[experts, outputs, inputs]`."""
    yield model.lm_head.weight
    for parts in map(parts_of, model.model.layers):
        yield from (linear.weight for linear in parts.linears)
        if parts.experts:
            yield from (parts.experts.router, parts.experts.gate_up, parts.experts.down)


def round_to_int8(model: Any, dtype: torch.dtype) -> None:
    """Give the model's matrices, in this type, the values that they have when they are packed as int8.

    Each output has a scale, of which its largest weight is 127; the others are rounded to whole numbers of it.
    """
    for weight in _matrices(model):
        stored, rounded = weight.data, torch.empty_like(weight, dtype=dtype)
        pairs = (matrix.flatten(0, -2).split(_ROWS_AT_ONCE) for matrix in (stored, rounded))
        for rows, to in zip(*pairs, strict=True):
            scales = (rows.abs().amax(dim=1, keepdim=True).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
            to.copy_((rows.float() / scales).round() * scales)
        weight.data = rounded
        forget(stored)


class PackedWeights:
    """A model's weights as the native step reads them; the model's own go as theirs are made.

    What stays of the model is its rotation, and its embedding where that is not the output layer's matrix as well. Of
    a model whose weights are a mapped file, only the matrix that is just being packed is in memory.
    """

    def __init__(self, model: Any, dtype: torch.dtype, rotated: int, as_int8: bool = False) -> None:
        """Pack `model` in `dtype`, or its matrices `as_int8`; positions rotate `rotated` numbers of a head.

        It is of no other use afterwards.
        """
        self._kept: list[torch.Tensor] = []
        self._arena = Arena()
        config, first = model.config, model.model.layers[0]
        parts = parts_of(first)
        self._dtype, self._as_int8 = dtype, as_int8
        embedding = model.get_input_embeddings()
        is_tied = model.lm_head.weight is embedding.weight
        output = self._pack(model.lm_head.weight)
        _let_go(model.lm_head)
        if is_tied:
            embedding.weight = model.lm_head.weight
        self.layers = [self._layer(layer) for layer in model.model.layers]
        self.model = NativeModel(
            is_bf16=dtype == torch.bfloat16,
            is_int8=as_int8,
            layer_count=len(self.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            dim=first.self_attn.head_dim,
            inner=parts.inner,
            vocabulary=model.lm_head.out_features,
            rotated=rotated,
            norms_heads_together=parts.norms_heads_together,
            experts=len(parts.experts.router) if parts.experts else 0,
            chosen=parts.experts.chosen if parts.experts else 0,
            sums_to_one=parts.experts is not None and parts.experts.sums_to_one,
            epsilon=config.rms_norm_eps,
            scaling=first.self_attn.scaling,
            gate_slope=_GATES[activation_of(config)][0],
            gate_cube=_GATES[activation_of(config)][1],
            logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
            norm=self._norm(model.model.norm),
            output=output,
            embedding_scale=embedding_scale(model, dtype),
            embedding=None if is_tied else self._rows(embedding.weight),
        )

    def _layer(self, layer: Any) -> NativeLayer:
        parts = parts_of(layer)
        packed = NativeLayer(
            norm1=self._norm(parts.norm1),
            norm2=self._norm(parts.norm2),
            after_attention=self._norm(parts.after_attention),
            after_product=self._norm(parts.after_product),
            query_norm=self._norm(parts.query_norm),
            key_norm=self._norm(parts.key_norm),
            qkv=self._pack(_joined(parts.projections)),
            qkv_bias=self._bias([linear.bias for linear in parts.projections]),
            out=self._pack(parts.out.weight),
            out_bias=self._bias([parts.out.bias]),
            router=self._pack(parts.experts.router) if parts.experts else None,
            gate_ups=self._addresses(map(self._pack, _gate_ups(parts))),
            downs=self._addresses(map(self._pack, _downs(parts))),
        )
        _let_go(*parts.linears)
        if parts.experts:
            _let_go_experts(parts.experts)
        return packed

    def _addresses(self, pointers: Iterable[int]) -> int:
        """Where the pointers stand, one after the other."""
        self._kept.append(torch.tensor(list(pointers)))
        return self._kept[-1].data_ptr()

    def _norm(self, norm: Any | None) -> int | None:
        if norm is None:
            return None
        pointer = self._plain(norm.weight)
        if counts_from_one(norm):
            self._kept[-1] += 1.0
        return pointer

    def _plain(self, vector: torch.Tensor) -> int:
        rounded = vector.detach().to(self._dtype)
        self._kept.append(rounded.to(torch.float32, copy=True).contiguous())
        return self._kept[-1].data_ptr()

    def _rows(self, matrix: torch.Tensor) -> int:
        self._kept.append(matrix.detach().to(self._dtype).contiguous())  # of a mapped file it is the file, where it can
        return self._kept[-1].data_ptr()

    def _bias(self, parts: list[torch.Tensor | None]) -> int | None:
        present = [part for part in parts if part is not None]
        if not present:
            return None
        bias = torch.cat(present)
        return self._plain(nn.functional.pad(bias, (0, -len(bias) % BLOCK)))

    def _pack(self, matrix: torch.Tensor) -> int:
        of_int8 = matrix.dtype if matrix.dtype in _TYPES else torch.float32  # rounded once, from what is in the files
        plain = matrix.detach().to(of_int8 if self._as_int8 else self._dtype).contiguous()
        outputs, inputs = plain.shape
        packed = self._arena.take(_padded(outputs) * (4 + inputs if self._as_int8 else inputs * plain.element_size()))
        shape = plain.data_ptr(), outputs, inputs, packed.data_ptr()
        is_bf16 = self._dtype == torch.bfloat16
        if self._as_int8:
            library().paceline_pack_int8(is_bf16, plain.dtype == torch.bfloat16, *shape)
        else:
            library().paceline_pack(is_bf16, *shape)
        self._kept.append(packed)
        return packed.data_ptr()

    def bind(self) -> ctypes.Array[NativeLayer]:
        """A copy of the layers, for one pool."""
        return (NativeLayer * len(self.layers))(*self.layers)


def _padded(output_count: int) -> int:
    return -(-output_count // BLOCK) * BLOCK


def _joined(linears: list[nn.Linear]) -> torch.Tensor:
    return torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight


def _gate_ups(parts: LayerParts) -> Iterator[torch.Tensor]:
    """Of each expert, or of the one gated product: 16 gates, their 16 ups, and so on."""
    joined = parts.experts.gate_up if parts.experts else [_joined(parts.gate_up)]
    for gate_up in joined:
        halves = [half.unflatten(0, (-1, BLOCK // 2)) for half in gate_up.chunk(2)]
        yield torch.cat(halves, dim=1).flatten(0, 1)


def _downs(parts: LayerParts) -> Iterable[torch.Tensor]:
    return parts.experts.down if parts.experts else [linear.weight for linear in parts.down]


def aligned(byte_count: int) -> torch.Tensor:
    """Memory that begins where a line of the processor's cache does."""
    memory = torch.empty(byte_count + _ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + byte_count]


def _let_go(*linears: nn.Linear) -> None:
    """Give back the memory of the matrices now: freed, it would stay with the allocator."""
    for linear in linears:
        forget(linear.weight)
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)


def _let_go_experts(experts: Experts) -> None:
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts.module, name)
        forget(weight)
        setattr(experts.module, name, nn.Parameter(weight.new_empty(0), requires_grad=False))
