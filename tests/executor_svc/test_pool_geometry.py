"""How layer groups share blocks: every layer has its place, and little is wasted."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc.layer_groups import FULL, Visibility
from executor_svc.pool_geometry import LayerShape, PoolGeometry, Region, plan_pool

SLIDING, CHUNKED = Visibility(window=512), Visibility(chunk=512)
SHAPE = LayerShape(2, 16, 2, 16)


def plan(counts: dict[Visibility, int], base: int = 16, shapes: dict[Visibility, LayerShape] | None = None):
    """A geometry of `counts` layers that see alike, numbered one kind after the other."""
    layers, by_layer, groups = 0, {}, {}
    for visibility, count in counts.items():
        groups[visibility] = tuple(range(layers, layers + count))
        by_layer |= dict.fromkeys(groups[visibility], (shapes or {}).get(visibility, SHAPE))
        layers += count
    return plan_pool(by_layer, groups, base)


def test_layers_that_all_see_alike_have_a_plane_each():
    """The plain layout of a plain model: one tensor for each layer's keys, blocks of the size that was asked for."""
    geometry = plan({FULL: 30})

    assert [group.block_size for group in geometry.groups] == [16]
    assert {place.keys for place in geometry.places.values()} == {Region(first=0, stride=16)}
    assert sorted(place.plane for place in geometry.places.values()) == list(range(30))
    assert geometry.waste == 0


def test_a_block_holds_more_tokens_for_fewer_layers():
    """Gemma 3 1B: a sliding block has 16 tokens of six layers, or a full one 96 tokens of one layer, in each plane."""
    geometry = plan({FULL: 4, SLIDING: 22})

    assert [(group.block_size, group.window, group.layer_count) for group in geometry.groups] == [
        (96, 0, 4),
        (16, 512, 22),
    ]
    assert len(geometry.planes) == 4
    assert geometry.places[0].keys == Region(first=0, stride=96)
    assert [geometry.places[layer].keys.first for layer in range(4, 10)] == [0, 16, 32, 48, 64, 80]


MODELS = {
    "Gemma 2 2B": ({FULL: 13, SLIDING: 13}, {}, [16, 16], 0),
    "Gemma 3 4B": ({FULL: 5, SLIDING: 29}, {}, [96, 16], 1 / 30),
    "Gemma 3 27B": ({FULL: 10, SLIDING: 52}, {}, [80, 16], 2 / 52),
    "GPT-OSS": ({FULL: 12, SLIDING: 12}, {}, [16, 16], 0),
    "Llama 4": ({FULL: 12, CHUNKED: 36}, {}, [48, 16], 0),
    "all three kinds": ({FULL: 8, SLIDING: 24, CHUNKED: 16}, {}, [48, 16, 16], 1 / 3),
    "one against seven": ({FULL: 1, SLIDING: 7}, {}, [112, 16], 0),
    "MiMo-V2-Flash": (
        {FULL: 9, SLIDING: 39},
        {FULL: LayerShape(4, 192, 4, 128), SLIDING: LayerShape(8, 192, 8, 128)},
        [128, 16],
        3 / 39,
    ),
    "Gemma 4 31B": (
        {FULL: 10, SLIDING: 50},
        {FULL: LayerShape(4, 512, 4, 512), SLIDING: LayerShape(16, 256, 16, 256)},
        [160, 16],
        0,
    ),
}


@pytest.mark.parametrize(("counts", "shapes", "block_sizes", "waste"), MODELS.values(), ids=MODELS.keys())
def test_known_models_waste_little(counts, shapes, block_sizes, waste):
    """What is wasted of a block is memory that an operator paid for."""
    geometry = plan(counts, shapes=shapes)

    assert [group.block_size for group in geometry.groups] == block_sizes
    assert float(geometry.waste) == pytest.approx(waste)


LAYER = st.tuples(
    st.sampled_from([FULL, SLIDING, CHUNKED]),
    st.builds(LayerShape, *[st.sampled_from(values) for values in ([1, 2, 3], [4, 6, 16], [1, 2, 3], [4, 10])]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layers=st.lists(LAYER, min_size=1, max_size=12), base=st.sampled_from([1, 2, 4, 16]))
def test_every_token_of_every_layer_has_memory_of_its_own(layers, base):
    """Within a group no two tokens share memory and none lies outside its block, so that blocks are exchangeable."""
    groups: dict[Visibility, list[int]] = defaultdict(list)
    for layer, (visibility, _) in enumerate(layers):
        groups[visibility].append(layer)
    geometry = plan_pool({layer: shape for layer, (_, shape) in enumerate(layers)}, groups, base)

    assert sorted(geometry.places) == list(range(len(layers)))
    assert min(group.block_size for group in geometry.groups) == base
    assert all(group.block_size % base == 0 for group in geometry.groups)
    assert sum(group.layer_count for group in geometry.groups) == len(layers)
    for index, (group, visibility) in enumerate(zip(geometry.groups, groups, strict=True)):
        assert {layer for layer, place in geometry.places.items() if place.group == index} == set(groups[visibility])
        assert (group.window, group.chunk) == (visibility.window, visibility.chunk)
        check_group(geometry, index)
    assert all(plane.key_elements and plane.value_elements for plane in geometry.planes)
    assert 0 <= geometry.waste < len(groups)


def check_group(geometry: PoolGeometry, index: int) -> None:
    taken: dict[tuple[int, bool], set[int]] = defaultdict(set)
    for place in (place for place in geometry.places.values() if place.group == index):
        plane = geometry.planes[place.plane]
        for is_key, region, elements, block_elements in (
            (True, place.keys, place.shape.key_elements, plane.key_elements),
            (False, place.values, place.shape.value_elements, plane.value_elements),
        ):
            end = region.first + geometry.groups[index].block_size
            own = set(range(region.first * elements, end * elements))
            assert region.stride * elements == block_elements
            assert end <= region.stride
            assert not own & taken[place.plane, is_key]
            taken[place.plane, is_key] |= own
