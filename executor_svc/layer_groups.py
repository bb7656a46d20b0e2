"""Which layers may share a block table: those whose keys are seen from equally far away."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from executor_svc.batch import IntArray, LayerGroup


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which earlier positions a query sees. Always causal; 0 means no further limit."""

    window: int = 0  # the last `window` positions, its own included
    chunk: int = 0  # only positions of its own chunk of this many

    def first_key(self, positions: IntArray) -> IntArray:
        """The first position that each query position sees."""
        return LayerGroup(block_size=1, window=self.window, chunk=self.chunk).first_seen(positions)

    def within(self, context_length: int) -> "Visibility":
        """The same for positions below `context_length`: a limit that none of them meets is none."""
        return Visibility(
            self.window if self.window < context_length else 0, self.chunk if self.chunk < context_length else 0
        )

    def or_more(self, other: "Visibility") -> "Visibility":
        """The narrowest visibility that shows everything which either of the two shows."""
        if self == other:
            return self
        if self.window and other.window and not self.chunk and not other.chunk:
            return Visibility(window=max(self.window, other.window))
        return Visibility()


FULL = Visibility()


def group_layers(
    written: Iterable[int], seen: Iterable[tuple[int | None, Visibility]]
) -> dict[Visibility, tuple[int, ...]]:
    """The layers that write to the cache by what is seen of their keys: full visibility first, then by first layer.

    `seen` has one entry for each attention call: the layer whose keys it reads, and what it sees of them. Where it is
    not known whose keys a call reads (None), every layer must keep everything.
    """
    layers = sorted(written)
    widest: dict[int, Visibility] = {}
    for layer, visibility in seen:
        if layer is None:
            return {FULL: tuple(layers)}
        widest[layer] = widest.get(layer, visibility).or_more(visibility)
    groups: dict[Visibility, list[int]] = {}
    for layer in layers:
        groups.setdefault(widest.get(layer, FULL), []).append(layer)
    order = sorted(groups, key=lambda visibility: (visibility != FULL, groups[visibility][0]))
    return {visibility: tuple(groups[visibility]) for visibility in order}


def trace_keys(
    written: Mapping[int, tuple[int, int]], calls: Iterable[tuple[int, tuple[int, int]]]
) -> tuple[list[int | None], bool]:
    """Whose keys each attention call reads, and whether all of them read exactly what some layer wrote.

    Keys and values are given by the identity of their tensors, `written` by layer, `calls` with the layer that
    attends. A layer that reworks what it wrote (expands a latent, halves its values) is known by its number; one that
    reworks what another wrote cannot be traced.

    Example: layers 0 and 1 write, layer 2 attends to the keys of layer 0: [0, 1, 0] and True.
    """
    owner = {pair: layer for layer, pair in written.items()}
    key_owner = {key: layer for layer, (key, _) in written.items()}
    traced: list[int | None] = []
    is_exact = True
    for layer, pair in calls:
        is_exact = is_exact and pair in owner
        traced.append(key_owner.get(pair[0], layer if layer in written else None))
    return traced, is_exact
