"""What a decoder layer consists of, whatever its family calls it and however it joins its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Decoder layers that are: norm, attention, add, norm, gated product, add; what is added may have a norm of its own,
# beside the one before or instead of it. The self-test is the judge of the result.
LAYERS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Phi3DecoderLayer",
    "GemmaDecoderLayer",
    "Gemma2DecoderLayer",
    "Gemma3DecoderLayer",
    "Olmo2DecoderLayer",
    "Olmo3DecoderLayer",
    "MixtralDecoderLayer",
    "Qwen3MoeDecoderLayer",
    "OlmoeDecoderLayer",
)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # of gates
_FROM_ONE = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")  # norms whose weights count from 1


class UnknownPartsError(Exception):
    """A model cannot be taken apart; the message says why."""


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture: gated products of which a router chooses some for each token."""

    module: Any  # has what follows, except the router
    router: nn.Parameter  # [experts, hidden]
    gate_up: nn.Parameter  # [experts, 2 * inner, hidden] all gates of an expert, then their ups
    down: nn.Parameter  # [experts, hidden, inner]
    chosen: int  # for each token
    sums_to_one: bool  # the shares of those that are chosen


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The modules of one layer; lists have all outputs in order, in one matrix or several."""

    norm1: Any | None  # before attention
    query_norm: Any | None
    key_norm: Any | None
    projections: list[nn.Linear]  # queries, keys, values
    out: nn.Linear
    after_attention: Any | None  # norm of what attention gives
    norm2: Any | None  # before the gated product
    gate_up: list[nn.Linear]  # all gates, then their ups; none in a mixture
    down: list[nn.Linear]
    experts: Experts | None
    after_product: Any | None  # norm of what the gated product gives

    @property
    def linears(self) -> list[nn.Linear]:
        return [*self.projections, self.out, *self.gate_up, *self.down]

    @property
    def norms_heads_together(self) -> bool:
        return self.query_norm is not None and self.query_norm.weight.numel() == self.out.in_features

    @property
    def inner(self) -> int:
        """Numbers that the gated product, or that of each expert, has inside."""
        return self.experts.down.shape[-1] if self.experts else self.down[0].in_features


def parts_of(layer: Any) -> LayerParts:
    """The parts of a layer of one of `LAYERS`."""
    attention, mlp = layer.self_attn, layer.mlp
    experts, joined = _experts_of(mlp), hasattr(attention, "qkv_proj")
    has_later_norms = hasattr(layer, "post_feedforward_layernorm")
    return LayerParts(
        norm1=getattr(layer, "input_layernorm", None),
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        projections=[attention.qkv_proj] if joined else [attention.q_proj, attention.k_proj, attention.v_proj],
        out=attention.o_proj,
        after_attention=layer.post_attention_layernorm if has_later_norms else None,
        norm2=getattr(layer, "pre_feedforward_layernorm", None) if has_later_norms else layer.post_attention_layernorm,
        gate_up=[] if experts else [mlp.gate_up_proj] if joined else [mlp.gate_proj, mlp.up_proj],
        down=[] if experts else [mlp.down_proj],
        experts=experts,
        after_product=layer.post_feedforward_layernorm if has_later_norms else None,
    )


def _experts_of(mlp: Any) -> Experts | None:
    if not hasattr(mlp, "experts"):
        return None
    return Experts(
        module=mlp.experts,
        router=mlp.gate.weight,
        gate_up=mlp.experts.gate_up_proj,
        down=mlp.experts.down_proj,
        chosen=mlp.gate.top_k,
        sums_to_one=getattr(mlp.gate, "norm_topk_prob", True),
    )


def counts_from_one(norm: Any) -> bool:
    """Whether a norm multiplies with 1 more than its weights."""
    return type(norm).__name__ in _FROM_ONE


def activation_of(config: Any) -> str:
    """What a gate goes through."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


def embedding_scale(model: Any, dtype: torch.dtype) -> float:
    """What embeddings are multiplied with, rounded as the model rounds it."""
    embedding = model.get_input_embeddings()
    return float(torch.tensor(getattr(embedding, "scalar_embed_scale", 1.0), dtype=dtype))


def reason_against_parts(model: Any) -> str:
    """Why a model cannot be taken apart; empty where it can."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    kinds = {type(layer).__name__ for layer in layers or ()}
    if not layers or not kinds <= set(LAYERS):
        return f"its layers ({', '.join(sorted(kinds)) or 'none known'}) are of no family whose parts are known"
    if getattr(model.config, "quantization_config", None):
        return "its weights are quantised"
    parts = [parts_of(layer) for layer in layers]
    linears = [model.lm_head, *(linear for part in parts for linear in part.linears)]
    if any(type(linear) is not nn.Linear or linear.weight.dtype != model.dtype for linear in linears):
        return "its matrices are not all plain ones of its type"
    if getattr(model.config, "clip_qkv", None):
        return "it limits queries, keys and values (clip_qkv)"
    unbiased = [model.lm_head, *(linear for part in parts for linear in (*part.gate_up, *part.down))]
    if activation_of(model.config) not in ACTIVATIONS or any(linear.bias is not None for linear in unbiased):
        return f"its gated products have a bias, or another activation than {' or '.join(ACTIVATIONS)}"
    return ""
