"""Which part of a block belongs to which layer, so that any block serves any layer group.

A block takes the same memory whichever group holds it. The pool is cut into planes; in a plane a block holds `base`
tokens of the layers of one group that are placed there, or more tokens of another group with fewer or smaller layers
there. A model whose layers all see the same has one layer in each plane.

Example: 22 layers with a window and 4 without, 16 tokens wanted. In 4 planes a block holds either 16 tokens of 6
layers each (of 5 in the last) or 96 tokens of one layer each.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from executor_svc.batch import LayerGroup
from executor_svc.layer_groups import Visibility


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of one token, as its first forward pass showed it; keys and values may differ."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def key_elements(self) -> int:
        """Numbers that the keys of one token take."""
        return self.key_heads * self.key_dim

    @property
    def value_elements(self) -> int:
        """Numbers that the values of one token take."""
        return self.value_heads * self.value_dim

    @property
    def element_count(self) -> int:
        """Numbers that one token takes in this layer."""
        return self.key_elements + self.value_elements


@dataclass(frozen=True, slots=True)
class Region:
    """The part of every block that one layer's keys have, or its values; counted in tokens of that layer."""

    first: int  # where in a block its tokens begin
    stride: int  # from one block to the next


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where in the pool a layer's keys and values are."""

    group: int  # index of its layer group
    plane: int
    shape: LayerShape
    keys: Region
    values: Region


@dataclass(frozen=True, slots=True)
class Plane:
    """Numbers that one block has in a plane."""

    key_elements: int
    value_elements: int


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    """How the layers of a model share blocks."""

    groups: tuple[LayerGroup, ...]
    places: Mapping[int, LayerPlace]  # by layer that writes to the cache
    planes: tuple[Plane, ...]

    @property
    def block_elements(self) -> int:
        """Numbers that one block takes in all planes together."""
        return sum(plane.key_elements + plane.value_elements for plane in self.planes)

    @property
    def waste(self) -> Fraction:
        """The share of a block that each group leaves unused, summed over the groups."""
        used = [0] * len(self.groups)
        for place in self.places.values():
            used[place.group] += place.shape.element_count * self.groups[place.group].block_size
        return sum((1 - Fraction(count, self.block_elements) for count in used), Fraction())


def plan_pool(
    shapes: Mapping[int, LayerShape], layers_by_visibility: Mapping[Visibility, Sequence[int]], base_block_size: int
) -> PoolGeometry:
    """Share blocks with the least waste; of equal ways the one with most planes, the fewest layers in each.

    Every block size is a multiple of `base_block_size`, and for some group equal to it.
    """
    largest_first = {
        visibility: sorted(layers, key=lambda layer: (-shapes[layer].element_count, layer))
        for visibility, layers in layers_by_visibility.items()
    }
    most = max(map(len, largest_first.values()))
    best = _arrange(shapes, largest_first, base_block_size, most)
    for plane_count in range(most - 1, 0, -1):
        if not best.waste:
            break
        best = min(best, _arrange(shapes, largest_first, base_block_size, plane_count), key=lambda way: way.waste)
    return best


def _arrange(
    shapes: Mapping[int, LayerShape],
    layers_by_visibility: Mapping[Visibility, Sequence[int]],
    base_block_size: int,
    plane_count: int,
) -> PoolGeometry:
    """The geometry with `plane_count` planes, every group's layers spread over them in their order."""
    shares = [_split(layers, plane_count) for layers in layers_by_visibility.values()]
    # What a token takes in the plane where its group takes most.
    costs = [max(sum(shapes[layer].element_count for layer in layers) for layers in share) for share in shares]
    groups = tuple(
        LayerGroup(max(costs) // cost * base_block_size, visibility.window, visibility.chunk, len(layers))
        for cost, (visibility, layers) in zip(costs, layers_by_visibility.items(), strict=True)
    )
    planes: list[Plane] = []
    places: dict[int, LayerPlace] = {}
    for plane in range(plane_count):
        here = [(group, layer) for group, share in enumerate(shares) for layer in share[plane]]
        if not here:
            break  # fewer planes than asked for hold all layers
        block_sizes = [groups[group].block_size for group, _ in here]
        key_regions, key_elements = _regions([(g, shapes[layer].key_elements) for g, layer in here], block_sizes)
        value_regions, value_elements = _regions([(g, shapes[layer].value_elements) for g, layer in here], block_sizes)
        planes.append(Plane(key_elements, value_elements))
        for (group, layer), keys, values in zip(here, key_regions, value_regions, strict=True):
            places[layer] = LayerPlace(group, plane, shapes[layer], keys, values)
    return PoolGeometry(groups, places, tuple(planes))


def _split(layers: Sequence[int], plane_count: int) -> list[Sequence[int]]:
    """Runs of equal length, the last ones shorter or empty."""
    length = -(-len(layers) // plane_count)
    return [layers[plane * length : (plane + 1) * length] for plane in range(plane_count)]


def _regions(layers: Sequence[tuple[int, int]], block_sizes: Sequence[int]) -> tuple[list[Region], int]:
    """The regions of layers given as (group, numbers of a token), and the numbers that a block has for them.

    Layers of one group follow each other, each group begins at 0, and every block begins where a token of each layer
    could: so a layer's tokens are equal strides apart, in all blocks.
    """
    used: dict[int, int] = {}
    firsts = []
    for (group, token_elements), block_size in zip(layers, block_sizes, strict=True):
        first = -(-used.get(group, 0) // token_elements)
        firsts.append(first)
        used[group] = (first + block_size) * token_elements
    step = math.lcm(*(token_elements for _, token_elements in layers))
    block_elements = -(-max(used.values(), default=0) // step) * step
    return [
        Region(first, block_elements // elements) for first, (_, elements) in zip(firsts, layers, strict=True)
    ], block_elements
