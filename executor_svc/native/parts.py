"""What a decoder layer consists of, whatever its family calls it and however it joins its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# Decoder layers that are: norm, attention, add, norm, gated product, add. The self-test is the judge of the result.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Phi3DecoderLayer")


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The modules of one layer; lists have all outputs in order, in one matrix or several."""

    norm1: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    projections: list[nn.Linear]  # queries, keys, values
    out: nn.Linear
    norm2: nn.Module
    gate_up: list[nn.Linear]  # all gates, then their ups
    down: nn.Linear

    @property
    def linears(self) -> list[nn.Linear]:
        return [*self.projections, self.out, *self.gate_up, self.down]


def parts_of(layer: Any) -> LayerParts:
    """The parts of a layer of one of `LAYERS`."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = hasattr(attention, "qkv_proj")
    return LayerParts(
        norm1=layer.input_layernorm,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        projections=[attention.qkv_proj] if joined else [attention.q_proj, attention.k_proj, attention.v_proj],
        out=attention.o_proj,
        norm2=layer.post_attention_layernorm,
        gate_up=[mlp.gate_up_proj] if joined else [mlp.gate_proj, mlp.up_proj],
        down=mlp.down_proj,
    )
