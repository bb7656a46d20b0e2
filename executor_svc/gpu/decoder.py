"""A transformers model whose layers run as a few kernels each: matrix products of torch, and our own between them.

What is taken apart is what `decoder_parts` knows; what comes of it is what `PackedModel` gives. A layer of Llama's kind
is ten launches instead of some forty (of torch's operations, counted), each of which reads and writes all it works on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from executor_svc.attention.backend import ScoreRule
from executor_svc.batch import IntArray
from executor_svc.decoder_parts import (
    LayerParts,
    UnknownPartsError,
    activation_of,
    embedding_scale,
    parts_of,
    reason_against_parts,
)
from executor_svc.gpu.inputs import StepInputs, StepRows, inputs_of
from executor_svc.gpu.layer_kernels import Norm, add_rms_norm, gated_product, rms_norm, rotate_and_store
from executor_svc.gpu.packed_step import PagedAttention, key_source
from executor_svc.kv_cache import PagedPool
from executor_svc.packed_model import PackedTraits
from executor_svc.rotations import Rotations

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Matrix:
    weight: torch.Tensor  # [outputs, inputs]
    bias: torch.Tensor | None

    @classmethod
    def joined(cls, linears: list[nn.Linear]) -> _Matrix:
        """The outputs of all of them, one after the other. The linears keep nothing."""
        biases = [linear.bias for linear in linears]
        assert len({bias is None for bias in biases}) == 1, "some of what is joined has a bias, some has none"
        if len(linears) == 1:
            return cls(linears[0].weight.detach(), None if biases[0] is None else biases[0].detach())
        matrix = cls(
            torch.cat([linear.weight.detach() for linear in linears]),
            None if biases[0] is None else torch.cat([bias.detach() for bias in biases]),
        )
        for linear in linears:
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        if matrix.weight.is_cuda:
            torch.cuda.empty_cache()  # or a smaller matrix comes to lie in what was let go, and keeps the rest of it
        return matrix

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    number: int
    norm1: Norm | None  # before attention
    head_norms: tuple[Norm, Norm] | None  # of each query and key head
    joint_norms: tuple[Norm, Norm] | None  # of all query heads together, and of all key heads
    qkv: _Matrix
    out: _Matrix
    after_attention: Norm | None
    norm2: Norm | None
    product: Callable[[torch.Tensor], torch.Tensor]
    after_product: Norm | None
    rotation: int  # index of its table
    rule: ScoreRule


class FusedDecoder:
    """Runs steps of one model on the device where its weights are."""

    mode = "fused"
    reads_inputs = True

    def __init__(self, model: Any, traits: PackedTraits, context_length: int, attention: PagedAttention) -> None:
        """Take `model` apart; it must not be used any more.

        Raises `UnknownPartsError` before it is taken apart.
        """
        check_fused(model, traits)
        self.traits = traits
        self.device: torch.device = model.device
        self.attention = attention
        self._dtype: torch.dtype = model.dtype
        with torch.inference_mode():
            rotations = Rotations(model, context_length, model.dtype)
            self._rotations = rotations.up_to(context_length)
            self._embedding = model.get_input_embeddings().weight.detach()
            self._embedding_scale = embedding_scale(model, model.dtype)
            self._layers = [
                _taken_apart(number, layer, model.config, traits, rotations.table_of(number))
                for number, layer in enumerate(model.model.layers)
            ]
        self._norm = Norm.of(model.model.norm)
        self._output = _Matrix.joined([model.lm_head])
        self._logit_cap = getattr(model.config, "final_logit_softcapping", None) or 0.0

    def compute(self, inputs: StepInputs, pool: PagedPool) -> torch.Tensor:
        """Queue a step; returns the logits of its sampled tokens, `[S, vocabulary]`."""
        residual = functional.embedding(inputs.token_ids, self._embedding)
        if self._embedding_scale != 1.0:
            residual = residual * self._embedding_scale
        first = self._layers[0].norm1
        x = residual if first is None else rms_norm(residual, first)
        for layer, following in zip(self._layers, (*self._layers[1:], None), strict=True):
            x = self._attend(layer, x, inputs, pool)
            x = layer.product(add_rms_norm(x, residual, layer.norm2, layer.after_attention))
            if following is not None:
                x = add_rms_norm(x, residual, following.norm1, layer.after_product)
        x, residual = (tensor.index_select(0, inputs.sampled) for tensor in (x, residual))
        last = add_rms_norm(x, residual, self._norm, self._layers[-1].after_product)
        logits = self._output(last)
        if self._logit_cap:
            logits = torch.tanh(logits / self._logit_cap) * self._logit_cap
        return logits

    def step(
        self,
        query_lengths: IntArray,
        context_lengths: IntArray,
        block_tables: Sequence[NDArray[np.int32]],
        token_ids: torch.Tensor,
        pool: PagedPool,
        row_index: torch.Tensor,
    ) -> torch.Tensor:
        """Compute a step and return the logits of the tokens in `row_index`, `[rows, vocabulary]`.

        The arguments are those of a `StepBatch`.
        """
        groups = pool.geometry.groups
        self.attention.prepare(StepRows(query_lengths, context_lengths, block_tables, groups))
        arrays = query_lengths, context_lengths, block_tables, token_ids, row_index
        return self.compute(inputs_of(*arrays, groups, self.device), pool)

    def _attend(self, layer: _Layer, x: torch.Tensor, inputs: StepInputs, pool: PagedPool) -> torch.Tensor:
        qkv = layer.qkv(x)
        keys, values = pool.keys(layer.number), pool.values(layer.number)
        if layer.joint_norms is not None:
            key_width = keys.shape[1] * keys.shape[2]
            query, key, _ = qkv.split([qkv.shape[1] - 2 * key_width, key_width, key_width], dim=1)
            for part, norm in zip((query, key), layer.joint_norms, strict=True):
                rms_norm(part, norm, out=part)
        where = key_source(pool, layer.number, self.traits.visibility[layer.number])
        rotation = self._rotations[layer.rotation]
        query = rotate_and_store(qkv, rotation, layer.head_norms, keys, values, inputs, where)
        attended = self.attention.attend(query.transpose(0, 1), keys, values, inputs, where, layer.rule)
        return layer.out(attended.flatten(1))


def check_fused(model: Any, traits: PackedTraits) -> None:
    """Raise `UnknownPartsError` unless the model's layers can run as fused kernels."""
    if reason := reason_against_parts(model):
        raise UnknownPartsError(reason)
    if model.dtype not in _TYPES:
        raise UnknownPartsError(f"its type is {model.dtype}")
    if traits.gathered or any(traits.sources[layer] != layer for layer in traits.shapes):
        raise UnknownPartsError("its layers share keys, or rework them")
    if any(shape.key_dim != shape.value_dim for shape in traits.shapes.values()):
        raise UnknownPartsError("its values have other sizes than its keys")


def _taken_apart(number: int, layer: Any, config: Any, traits: PackedTraits, rotation: int) -> _Layer:
    parts = parts_of(layer)
    norms = None if parts.query_norm is None else (Norm.of(parts.query_norm), Norm.of(parts.key_norm))
    return _Layer(
        number=number,
        norm1=_norm(parts.norm1),
        head_norms=None if parts.norms_heads_together else norms,
        joint_norms=norms if parts.norms_heads_together else None,
        qkv=_Matrix.joined(parts.projections),
        out=_Matrix.joined([parts.out]),
        after_attention=_norm(parts.after_attention),
        norm2=_norm(parts.norm2),
        product=_product(parts, layer, activation_of(config)),
        after_product=_norm(parts.after_product),
        rotation=rotation,
        rule=ScoreRule(layer.self_attn.scaling, traits.score_caps[number]),
    )


def _norm(module: Any | None) -> Norm | None:
    return None if module is None else Norm.of(module)


def _product(parts: LayerParts, layer: Any, activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The gated product; that of a mixture runs as transformers has it."""
    if parts.experts is not None:
        mixture = layer.mlp
        return lambda x: mixture(x.unsqueeze(0))[0]
    gate_up, down = _Matrix.joined(parts.gate_up), _Matrix.joined(parts.down)
    return lambda x: down(gated_product(gate_up(x), activation))
