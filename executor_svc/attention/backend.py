"""What an attention backend is."""

from dataclasses import dataclass
from typing import Protocol

import torch

from executor_svc.attention.layout import Parts


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """How a layer turns products of queries and keys into scores."""

    scaling: float
    softcap: float = 0.0  # scores become tanh(score / softcap) * softcap; 0: they stay
    sinks: torch.Tensor | None = None  # [query heads] one more score per head that takes weight and has no value


class AttentionBackend(Protocol):
    """Computes attention of one layer over the paged cache."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: Parts, rule: ScoreRule
    ) -> torch.Tensor:
        """Attend from every token of the step.

        `query` is `[query heads, T, dim]`, `keys` and `values` are `[slots, key heads, dim]`, contiguous, and may
        differ in dim and in slots; `parts` number their rows. The result is `[T, query heads, value dim]`, contiguous.
        """
        ...
