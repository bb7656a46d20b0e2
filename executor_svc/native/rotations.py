"""How positions rotate queries and keys: cosines and sines, computed by the model's own code when first needed."""

from __future__ import annotations

from typing import Any

import torch

from executor_svc.native.build import NativeUnavailableError


class Rotations:
    """Cosines and sines by position; one table, or one for each type of layer where the types rotate differently.

    They depend on nothing but the position: rotations that change with the longest position of a step, which dynamic
    scaling and longrope have, do so beyond the context length only (`context_length_of`).
    """

    def __init__(self, model: Any, context_length: int) -> None:
        """Positions beyond `context_length` are not asked of the model unless a step has them.

        Raises `NativeUnavailableError`.
        """
        self._rotate = model.model.rotary_emb
        self._context_length = context_length
        self._types: list[str | None] = list(getattr(self._rotate, "layer_types", None) or [None])
        self._of_layers = model.config.layer_types if self._types != [None] else None
        self._known_count = 0
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        widths = {cosine.shape[-1] for cosine, _ in self.up_to(1)}
        if len(widths) > 1:
            raise NativeUnavailableError(f"its layers rotate {sorted(widths)} numbers of a head, by their type")
        self.width: int = widths.pop()
        """Numbers of a head that are rotated, the first ones."""

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
        cosine, sine = self._rotate(torch.zeros(1), torch.arange(self._known_count).unsqueeze(0), **kind)
        return cosine[0].contiguous(), sine[0].contiguous()
