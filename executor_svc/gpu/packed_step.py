"""A step of a transformers model whose attention reads and writes the pool through block tables on the device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.hook import AttentionCall
from executor_svc.attention.layout import KeySource
from executor_svc.gpu.inputs import StepInputs, StepRows
from executor_svc.kv_cache import PagedPool
from executor_svc.layer_groups import Visibility


class PagedAttention(Protocol):
    """Attention that finds keys by the block tables of a step's inputs; nothing of it waits for the device."""

    records_prompts: bool
    """Whether steps with prompts in them can be recorded, as those that only decode can."""

    def prepare(self, rows: StepRows) -> None:
        """Plan on the host what `attend` needs in the step that is queued or replayed next, where that is queued."""
        ...

    def store(
        self,
        key: torch.Tensor,  # [key heads, T, dim]
        value: torch.Tensor,  # [value heads, T, value dim]
        keys: torch.Tensor,  # [slots, key heads, dim]
        values: torch.Tensor,  # [slots, value heads, value dim]
        inputs: StepInputs,
        source: KeySource,
    ) -> None:
        """Write the keys and values of the step's tokens to their slots; those of padding nowhere."""
        ...

    def attend(
        self,
        query: torch.Tensor,  # [query heads, T, dim]
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: StepInputs,
        source: KeySource,
        rule: ScoreRule,
    ) -> torch.Tensor:
        """Attend from every token of the step; `[T, query heads, value dim]`, contiguous."""
        ...


def key_source(pool: PagedPool, layer: int, visibility: Visibility) -> KeySource:
    """Where queries that see so much find the keys of `layer`."""
    place = pool.place(layer)
    return KeySource(place.group, visibility, place.shape.key_heads, place.keys.stride, place.values.stride)


class PackedStep:
    """Answers the attention calls of one step."""

    def __init__(
        self,
        attention: PagedAttention,
        pool: PagedPool,
        inputs: StepInputs,
        sources: dict[int, int],  # by layer that calls attention: the layer whose keys it sees
        visibility: dict[int, Visibility],
    ) -> None:
        self._attention, self._pool, self._inputs = attention, pool, inputs
        self._sources, self._visibility = sources, visibility

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Return `[1, tokens, query heads, value dim]`, contiguous."""
        layer = self._sources[call.layer]
        where = key_source(self._pool, layer, self._visibility[call.layer])
        rule = ScoreRule(call.scaling, call.softcap or 0.0, call.sinks)
        keys, values = self._pool.keys(layer), self._pool.values(layer)
        return self._attention.attend(call.query[0], keys, values, self._inputs, where, rule).unsqueeze(0)


class PackedStepCache(Cache):
    """What the model sees as its cache: it writes into the pool, and attention reads there by itself."""

    def __init__(self, attention: PagedAttention, pool: PagedPool, inputs: StepInputs) -> None:
        super().__init__(layers=[])
        self._attention, self._pool, self._inputs = attention, pool, inputs

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's new keys and values, `[1, heads, tokens, dim]`, to their slots."""
        where = key_source(self._pool, layer_idx, Visibility())
        keys, values = self._pool.keys(layer_idx), self._pool.values(layer_idx)
        self._attention.store(key_states[0], value_states[0], keys, values, self._inputs, where)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        """Always 0: rows have different lengths, and every model is told its positions."""
        return 0
