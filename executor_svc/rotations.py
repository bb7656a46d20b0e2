"""How positions rotate queries and keys: cosines and sines, computed by the model's own code when first needed."""

from __future__ import annotations

from typing import Any

import torch


class Rotations:
    """Cosines and sines by position; one table, or one for each type of layer where the types rotate differently.

    They depend on nothing but the position: rotations that change with the longest position of a step, which dynamic
    scaling and longrope have, do so beyond the context length only (`context_length_of`).
    """

    def __init__(self, model: Any, context_length: int, dtype: torch.dtype = torch.float32) -> None:
        """Positions beyond `context_length` are not asked of the model unless a step has them.

        The tables are of type `dtype`, as the model rounds to it, and where the model is.
        """
        self._rotate = model.model.rotary_emb
        self._like = torch.zeros(1, dtype=dtype, device=model.device)
        self._context_length = context_length
        self._types: list[str | None] = list(getattr(self._rotate, "layer_types", None) or [None])
        self._of_layers = model.config.layer_types if self._types != [None] else None
        self._known_count = 0
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.widths = {cosine.shape[-1] for cosine, _ in self.up_to(1)}
        """Numbers of a head that are rotated, the first ones; more than one where types of layers differ in it."""

    def table_of(self, layer: int) -> int:
        """Which table rotates in that layer."""
        return self._types.index(self._of_layers[layer]) if self._of_layers else 0

    def up_to(self, position_count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The tables, cosines and sines of at least so many positions, `[positions, width]` each."""
        if self._known_count < position_count:
            self._known_count = max(position_count, min(2 * self._known_count, self._context_length))
            self._tables = [self._table(kind) for kind in self._types]
        return self._tables

    def _table(self, layer_type: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        kind = {"layer_type": layer_type} if layer_type else {}
        positions = torch.arange(self._known_count, device=self._like.device).unsqueeze(0)
        cosine, sine = self._rotate(self._like, positions, **kind)
        return cosine[0].contiguous(), sine[0].contiguous()
