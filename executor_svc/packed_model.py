"""A transformers model in packed mode: all requests' tokens end to end in one forward pass over the paged cache.

What the model's layers keep and see is not read from its configuration, which differs from family to family; a dry
forward pass of two tokens shows it.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from executor_svc.attention.backend import AttentionBackend, ScoreRule
from executor_svc.attention.hook import AttentionCall, attention_by
from executor_svc.attention.layout import KeySource, StepLayout
from executor_svc.batch import IntArray
from executor_svc.gpu.inputs import StepInputs, StepRows, inputs_of
from executor_svc.gpu.packed_step import PackedStep, PackedStepCache, PagedAttention
from executor_svc.kv_cache import PagedCache, PagedPool
from executor_svc.layer_groups import Visibility, group_layers, trace_keys
from executor_svc.pool_geometry import LayerShape, PoolGeometry, plan_pool

_SPARSE_SELECTION = ("indices", "block_indices")  # arguments by which a model names the keys it wants
_DECODE_SCRATCH_BYTES = 64 << 20  # keys and values that decode rows computed together may gather


class UnpackableError(Exception):
    """The model cannot run in packed mode; the message says why."""


@dataclass(frozen=True, slots=True)
class PackedTraits:
    """What the dry forward pass showed."""

    shapes: dict[int, LayerShape]  # by layer that writes to the cache
    visibility: dict[int, Visibility]  # by layer that calls attention
    score_caps: dict[int, float]  # by layer that calls attention: what its scores are softly limited to; 0: nothing
    sources: dict[int, int]  # by layer that calls attention: the layer whose keys it sees
    groups: dict[Visibility, tuple[int, ...]]  # layers that write, by what is seen of their keys
    cache_dtype: torch.dtype
    vocabulary_size: int
    gathered: bool  # attention needs what the cache returns: it does not get the keys that the cache was given

    @property
    def decode_token_limit(self) -> int:
        """Tokens whose keys and values fit the scratch memory of decode attention."""
        itemsize = 4 + (0 if self.cache_dtype == torch.float32 else self.cache_dtype.itemsize)
        widest = max(shape.element_count for shape in self.shapes.values())
        return _DECODE_SCRATCH_BYTES // (widest * itemsize)

    def geometry(self, block_size: int) -> PoolGeometry:
        """How the model's layers share blocks; `block_size` is the smallest number of tokens that a block holds."""
        return plan_pool(self.shapes, self.groups, block_size)


class PackedModel:
    """Runs packed steps of one model."""

    mode = "packed"

    def __init__(
        self, model: Any, backend: AttentionBackend, context_length: int, paged: PagedAttention | None = None
    ) -> None:
        """Look at the model's layers. No request has more than `context_length` tokens.

        `paged` computes attention where the model hands it what it wrote to the cache, else `backend` does.
        """
        self._model = model
        self._backend = backend
        self.attention = paged
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.device: torch.device = model.device
        self.traits = _probe(model, self._forward, context_length)

    @property
    def reads_inputs(self) -> bool:
        """Whether steps can be computed from inputs on the device alone."""
        return self.attention is not None and not self.traits.gathered

    def compute(self, inputs: StepInputs, pool: PagedPool) -> torch.Tensor:
        """Queue a step; returns the logits of its sampled tokens, `[S, vocabulary]`."""
        assert self.attention is not None, "this model was not given attention that reads inputs"
        step = PackedStep(self.attention, pool, inputs, self.traits.sources, self.traits.visibility)
        cache = PackedStepCache(self.attention, pool, inputs)
        with attention_by(step):
            return self._forward(inputs.token_ids, inputs.positions.unsqueeze(0), cache, inputs.sampled)

    def layout(
        self,
        query_lengths: IntArray,
        context_lengths: IntArray,
        block_tables: Sequence[NDArray[np.int32]],
        pool: PagedPool,
    ) -> StepLayout:
        """Where each token of a step is and what it sees."""
        return StepLayout(
            query_lengths,
            context_lengths,
            block_tables,
            groups=pool.geometry.groups,
            padding_block=pool.padding_block,
            decode_token_limit=self.traits.decode_token_limit,
            gathered=self.traits.gathered,
            device=self.device,
        )

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

        The arguments are those of a `StepBatch`. What is returned may be overwritten by the next step.
        """
        if self.attention is not None and self.reads_inputs:
            groups, device = pool.geometry.groups, self.device
            self.attention.prepare(StepRows(query_lengths, context_lengths, block_tables, groups))
            arrays = query_lengths, context_lengths, block_tables, token_ids, row_index
            return self.compute(inputs_of(*arrays, groups, device), pool)
        layout = self.layout(query_lengths, context_lengths, block_tables, pool)
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
        source, visibility = self.traits.sources[call.layer], self.traits.visibility[call.layer]
        place = self.pool.place(source)
        if self.layout.gathered:
            keys, values = (tensor[0].transpose(0, 1).contiguous() for tensor in (call.key, call.value))
            where = KeySource(place.group, visibility, keys.shape[1])
        else:
            keys, values = self.pool.keys(source), self.pool.values(source)
            where = KeySource(place.group, visibility, keys.shape[1], place.keys.stride, place.values.stride)
        rule = ScoreRule(call.scaling, call.softcap or 0.0, call.sinks)
        return self.backend.attend(call.query[0], keys, values, self.layout.parts(where), rule).unsqueeze(0)


@dataclass(slots=True)
class _Probe:
    """Answers attention calls with zeros and remembers what was asked."""

    config: Any
    masks_a_window: bool  # the model's code limits what is seen by a mask, which packed mode does not build
    context_length: int
    visibility: dict[int, Visibility] = field(default_factory=dict)
    score_caps: dict[int, float] = field(default_factory=dict)
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.mask is not None:
            raise UnpackableError("it builds an attention mask of its own")
        if call.is_causal is False or getattr(call.module, "is_causal", True) is False:
            raise UnpackableError("its attention is not causal")
        if chosen := [name for name in _SPARSE_SELECTION if call.extras.get(name) is not None]:
            raise UnpackableError(f"its attention selects keys by {chosen[0]!r}")
        visibility = self._visibility(call).within(self.context_length)
        if self.visibility.setdefault(call.layer, visibility) != visibility:
            raise UnpackableError(f"layer {call.layer} attends more than once and sees other positions each time")
        self.score_caps[call.layer] = call.softcap or 0.0
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


def _probe(model: Any, forward: Any, context_length: int) -> PackedTraits:
    """Run two tokens and see what the layers hand to the cache and to attention."""
    code = inspect.getsource(sys.modules[type(model).__module__])
    masks_a_window = "create_sliding_window_causal_mask" in code
    probe = _Probe(model.config.get_text_config(), masks_a_window, context_length)
    cache = _ProbeCache()
    tokens = torch.arange(2, device=model.device)
    with torch.inference_mode(), attention_by(probe):
        logits = forward(tokens, tokens.unsqueeze(0), cache, tokens[-1:])
    if not probe.calls:
        raise UnpackableError("it did not call the registered attention function")
    _check_writes(cache.updates)
    shapes = {
        layer: LayerShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3])
        for layer, key, value in cache.updates
    }
    # Reading the pool in place is right only where attention gets exactly what some layer wrote.
    traced, in_place = trace_keys(
        {layer: (id(key), id(value)) for layer, key, value in cache.updates},
        [(layer, (id(key), id(value))) for layer, key, value in probe.calls],
    )
    calls = [(layer, source) for (layer, _, _), source in zip(probe.calls, traced, strict=True)]
    return PackedTraits(
        shapes=shapes,
        visibility=probe.visibility,
        score_caps=probe.score_caps,
        sources=_sources(calls, unknown=min(shapes)),
        groups=group_layers(shapes, [(source, probe.visibility[layer]) for layer, source in calls]),
        cache_dtype=cache.updates[0][1].dtype,
        vocabulary_size=logits.shape[-1],
        gathered=not in_place,
    )


def _sources(calls: list[tuple[int, int | None]], unknown: int) -> dict[int, int]:
    """The layer whose keys each layer sees.

    Keys of nobody known are gathered, from the one layer group that there is then: any layer stands for it, `unknown`.
    """
    sources: dict[int, int] = {}
    for layer, source in calls:
        known = unknown if source is None else source
        if sources.setdefault(layer, known) != known:
            raise UnpackableError(f"layer {layer} attends more than once and sees other layers' keys each time")
    return sources


def _check_writes(updates: list[tuple[int, torch.Tensor, torch.Tensor]]) -> None:
    writes = Counter(layer for layer, _, _ in updates)
    if not writes or max(writes.values()) > 1:
        raise UnpackableError("it does not write each layer's keys and values once to the cache it is given")
    dtypes = {tensor.dtype for _, *pair in updates for tensor in pair}
    if len(dtypes) > 1:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UnpackableError(f"its layers write {' and '.join(names)} to the cache, and blocks hold one type")
