"""The attention function that transformers calls for every layer, and the step it belongs to.

One function is registered for the whole process; which step it works for is a context variable, because not every
model passes keyword arguments down to its attention (StableLM does not). Runners in several threads, or taking
turns in one, therefore do not meet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

ATTENTION_NAME = "paceline_paged"  # must not contain the name of an implementation that transformers checks for


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call: tensors are `[1, heads, tokens, dim]`."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    is_causal: bool | None
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None  # [query heads]
    extras: dict[str, Any]  # keyword arguments of the model's own

    @property
    def layer(self) -> int:
        """Number of the layer, as its cache entries have it."""
        return self.module.layer_idx  # type: ignore[return-value]


class AttentionStep(Protocol):
    """Whoever answers the attention calls of one forward pass."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Return `[1, tokens, query heads, value dim]`, contiguous."""
        ...


_current: ContextVar[AttentionStep] = ContextVar("paceline_attention_step")


@contextmanager
def attention_by(step: AttentionStep) -> Iterator[None]:
    """Answer this thread's attention calls with `step`."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    call = AttentionCall(
        module=module,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=is_causal,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        extras=extras,
    )
    return _current.get().attend(call), None


AttentionInterface.register(ATTENTION_NAME, _attention)
