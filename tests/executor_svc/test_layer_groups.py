"""Which layers share a block table."""

import numpy as np
import pytest

from executor_svc.layer_groups import FULL, Visibility, group_layers, trace_keys

WINDOW, CHUNK = Visibility(window=16), Visibility(chunk=16)


def test_layers_that_see_the_same_share_a_group():
    """Full attention comes first, then the order of layers: schedulers and people see one order for every executor."""
    groups = group_layers(range(5), enumerate([WINDOW, CHUNK, FULL, WINDOW, FULL]))

    assert list(groups.items()) == [(FULL, (2, 4)), (WINDOW, (0, 3)), (CHUNK, (1,))]


@pytest.mark.parametrize(
    ("readers", "expected"),
    [
        ([WINDOW, WINDOW], WINDOW),
        ([WINDOW, FULL], FULL),
        ([WINDOW, Visibility(window=20)], Visibility(window=20)),
        ([WINDOW, CHUNK], FULL),
        ([CHUNK, Visibility(chunk=24)], FULL),
    ],
    ids=str,
)
def test_keys_are_kept_for_whoever_sees_most_of_them(readers, expected):
    """A later layer may read the keys of an earlier one; what slid out for one may still be seen by the other."""
    groups = group_layers([0, 1], [(0, reader) for reader in readers] + [(1, expected)])

    assert groups == {expected: (0, 1)}


def test_everything_is_kept_where_a_reader_is_not_known():
    """The memory of full attention is the price of not knowing; a wrong token would be a worse one."""
    assert group_layers([0, 1], [(0, WINDOW), (1, FULL), (None, WINDOW)]) == {FULL: (0, 1)}


def test_keys_that_nobody_reads_are_kept():
    """Some layer may look at its cache by another way than the attention interface."""
    assert group_layers([0, 1], [(0, WINDOW)]) == {FULL: (1,), WINDOW: (0,)}


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(0, (10, 20)), (1, (11, 21))], ([0, 1], True)),  # the usual case
        ([(0, (10, 20)), (1, (11, 21)), (2, (10, 20))], ([0, 1, 0], True)),  # layer 2 attends to keys of layer 0
        ([(0, (30, 40)), (1, (11, 21))], ([0, 1], False)),  # layer 0 expands what it wrote
        ([(0, (10, 40)), (0, (10, 41)), (1, (11, 21))], ([0, 0, 1], False)),  # layer 0 halves its values
        ([(0, (10, 20)), (1, (11, 21)), (2, (10, 40))], ([0, 1, 0], False)),  # layer 2 reworks values of layer 0
        ([(0, (10, 20)), (1, (11, 21)), (2, (30, 40))], ([0, 1, None], False)),  # nobody knows where they come from
    ],
    ids=str,
)
def test_keys_are_traced_to_the_layer_that_wrote_them(calls, expected):
    """Reading in place is right only for exactly what was written, and blocks may go only when no reader is left."""
    assert trace_keys({0: (10, 20), 1: (11, 21)}, calls) == expected


def test_a_limit_that_no_position_meets_is_none():
    """Then the model has fewer groups, and blocks may be shared between requests without regard to windows."""
    assert Visibility(window=16).within(16) == FULL
    assert Visibility(window=16).within(17) == Visibility(window=16)
    assert Visibility(chunk=16).within(16) == FULL
    assert Visibility(window=15).first_key(np.arange(16)).any()
    assert not Visibility(window=16).first_key(np.arange(16)).any()
