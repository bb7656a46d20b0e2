"""Which nodes to take."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from autoscaler_svc.node_mix import cheapest
from autoscaler_svc.scaling_settings import NodeType

BIG = NodeType(name="big", capacity=4, price_per_hour=3.0)
SMALL = NodeType(name="small", capacity=1, price_per_hour=1.0)


def test_one_small_node_does_for_a_small_rest():
    """Choosing by price per capacity would pay for a second big one."""
    assert cheapest(5, [BIG, SMALL], {}) == {"big": 1, "small": 1}
    assert cheapest(1, [BIG, SMALL], {}) == {"small": 1}
    assert cheapest(3, [BIG, SMALL], {}) == {"big": 1}  # as dear as three small ones, and one instead of three


def test_as_much_as_there_is_where_not_all_can_be_had():
    """A quota that is full is no reason to take nothing."""
    few = NodeType(name="few", price_per_hour=1.0, max=3)

    assert cheapest(9, [few], {"few": 1}) == {"few": 2}
    assert cheapest(9, [few], {"few": 3}) == {}
    assert cheapest(2, [], {}) == {}


def test_without_prices_the_first_one_wins():
    """Most files name one type, or none, and no money."""
    assert cheapest(3, [NodeType(name="local"), NodeType(name="other")], {}) == {"local": 3}
    assert cheapest(0, [NodeType(name="local")], {}) == {}
    assert cheapest(-1, [NodeType(name="local")], {}) == {}


types = st.builds(
    NodeType,
    name=st.sampled_from("abc"),
    capacity=st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0]),
    price_per_hour=st.sampled_from([0.0, 0.5, 1.0, 2.5, 7.0]),
    max=st.integers(0, 4),
)


@given(st.lists(types, min_size=1, max_size=3, unique_by=lambda node_type: node_type.name), st.integers(1, 8))
def test_no_other_choice_is_cheaper(node_types, missing):
    """Held against trying all of them."""
    chosen = cheapest(missing, node_types, {})
    by_name = {node_type.name: node_type for node_type in node_types}

    def capacity(counts):
        return sum(by_name[name].capacity * count for name, count in counts.items())

    def price(counts):
        return sum(by_name[name].price_per_hour * count for name, count in counts.items())

    every = [
        dict(zip(by_name, counts, strict=True))
        for counts in itertools.product(*(range(node_type.max + 1) for node_type in node_types))
    ]
    enough = [counts for counts in every if capacity(counts) >= missing]
    if enough:
        assert capacity(chosen) >= missing
        assert price(chosen) <= min(map(price, enough)) + 1e-6
    else:
        assert capacity(chosen) == max(map(capacity, every))
