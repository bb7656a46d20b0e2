"""A transformers model in packed mode: all requests' tokens end to end in one forward pass over the paged cache.

What the model's layers keep and see is not read from its configuration, which differs from family to family; a dry
forward pass of two tokens shows it.
"""

import inspect
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from executor_svc.attention.backend import AttentionBackend, ScoreRule
from executor_svc.attention.hook import AttentionCall, attention_by
from executor_svc.attention.layout import StepLayout, Visibility
from executor_svc.batch import IntArray
from executor_svc.kv_cache import LayerShape, PagedCache, PagedPool

_SPARSE_SELECTION = ("indices", "block_indices")  # arguments by which a model names the keys it wants
_GROUP_SCRATCH_BYTES = 64 << 20  # keys and values that decode rows computed together may gather


class UnpackableError(Exception):
    """The model cannot run in packed mode; the message says why."""


@dataclass(frozen=True, slots=True)
class PackedTraits:
    """What the dry forward pass showed."""

    shapes: dict[int, LayerShape]  # by layer that writes to the cache
    visibility: dict[int, Visibility]  # by layer that calls attention
    cache_dtype: torch.dtype
    vocabulary_size: int
    gathered: bool  # attention needs what the cache returns: it does not get the keys that the cache was given

    @property
    def group_token_limit(self) -> int:
        """Tokens whose keys and values fit the scratch memory of decode attention."""
        itemsize = 4 + (0 if self.cache_dtype == torch.float32 else self.cache_dtype.itemsize)
        widest = max(shape.element_count for shape in self.shapes.values())
        return _GROUP_SCRATCH_BYTES // (widest * itemsize)


class PackedModel:
    """Runs packed steps of one model."""

    def __init__(self, model: Any, backend: AttentionBackend) -> None:
        self._model = model
        self._backend = backend
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.device: torch.device = model.device
        self.traits = _probe(model, self._forward)

    def layout(self, batch_rows: tuple[IntArray, IntArray, Any], pool: PagedPool) -> StepLayout:
        """Where query lengths, context lengths and block tables put each token of a step."""
        query_lengths, context_lengths, block_tables = batch_rows
        return StepLayout(
            query_lengths,
            context_lengths,
            block_tables,
            block_size=pool.block_size,
            padding_slot=pool.padding_slot,
            group_token_limit=self.traits.group_token_limit,
            gathered=self.traits.gathered,
            device=self.device,
        )

    def logits(
        self, token_ids: torch.Tensor, layout: StepLayout, pool: PagedPool, row_index: torch.Tensor
    ) -> torch.Tensor:
        """Compute the step and return the logits of the tokens in `row_index`, `[rows, vocabulary]`."""
        step = _PackedStep(self.traits, self._backend, pool, layout)
        with attention_by(step):
            return self._forward(token_ids, layout.position_ids, PagedCache(pool, layout), row_index)

    def _forward(
        self, token_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache, row_index: torch.Tensor
    ) -> torch.Tensor:
        keep = {"logits_to_keep": row_index} if self._keeps_logits else {}
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **keep,
        )
        logits: torch.Tensor = output.logits[0]
        return logits if self._keeps_logits else logits.index_select(0, row_index)


@dataclass(slots=True)
class _PackedStep:
    """Answers the attention calls of one step."""

    traits: PackedTraits
    backend: AttentionBackend
    pool: PagedPool
    layout: StepLayout

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if self.layout.gathered:
            keys, values = (tensor[0].transpose(0, 1).contiguous() for tensor in (call.key, call.value))
        else:
            keys, values = self.pool.keys(call.layer), self.pool.values(call.layer)
        parts = self.layout.parts(self.traits.visibility[call.layer], keys.shape[1])
        rule = ScoreRule(call.scaling, call.softcap or 0.0, call.sinks)
        return self.backend.attend(call.query[0], keys, values, parts, rule).unsqueeze(0)


@dataclass(slots=True)
class _Probe:
    """Answers attention calls with zeros and remembers what was asked."""

    config: Any
    masks_a_window: bool  # the model's code limits what is seen by a mask, which packed mode does not build
    visibility: dict[int, Visibility] = field(default_factory=dict)
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.mask is not None:
            raise UnpackableError("it builds an attention mask of its own")
        if call.is_causal is False or getattr(call.module, "is_causal", True) is False:
            raise UnpackableError("its attention is not causal")
        if chosen := [name for name in _SPARSE_SELECTION if call.extras.get(name) is not None]:
            raise UnpackableError(f"its attention selects keys by {chosen[0]!r}")
        self.visibility[call.layer] = self._visibility(call)
        self.calls.append((call.layer, call.key, call.value))
        _, heads, token_count, _ = call.query.shape
        return call.value.new_zeros(1, token_count, heads, call.value.shape[-1])

    def _visibility(self, call: AttentionCall) -> Visibility:
        layer_types = getattr(self.config, "layer_types", None)
        layer_type = layer_types[call.layer] if layer_types else None
        if layer_type == "chunked_attention":
            return Visibility(chunk=self.config.attention_chunk_size)
        window = call.sliding_window
        if window is None and (layer_type == "sliding_attention" or (layer_types is None and self.masks_a_window)):
            window = getattr(self.config, "sliding_window", None)
        return Visibility(window=window or 0)


class _ProbeCache(Cache):
    """Returns what it is given and remembers it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.updates: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.updates.append((layer_idx, key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return 0


def _probe(model: Any, forward: Any) -> PackedTraits:
    """Run two tokens and see what the layers hand to the cache and to attention."""
    code = inspect.getsource(sys.modules[type(model).__module__])
    probe = _Probe(model.config.get_text_config(), masks_a_window="create_sliding_window_causal_mask" in code)
    cache = _ProbeCache()
    tokens = torch.arange(2, device=model.device)
    with torch.inference_mode(), attention_by(probe):
        logits = forward(tokens, tokens.unsqueeze(0), cache, tokens[-1:])
    if not probe.calls:
        raise UnpackableError("it did not call the registered attention function")
    writes = Counter(layer for layer, _, _ in cache.updates)
    if not writes or max(writes.values()) > 1:
        raise UnpackableError("it does not write each layer's keys and values once to the cache it is given")
    shapes = {
        layer: LayerShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3])
        for layer, key, value in cache.updates
    }
    # Reading the pool in place is right only where each layer attends once, to exactly what it wrote.
    written = {layer: (id(key), id(value)) for layer, key, value in cache.updates}
    in_place = len(probe.calls) == len(written) and all(
        written.get(layer) == (id(key), id(value)) for layer, key, value in probe.calls
    )
    return PackedTraits(shapes, probe.visibility, cache.updates[0][1].dtype, logits.shape[-1], gathered=not in_place)
