"""What has arrived, bucket by bucket."""

import contextlib

import numpy as np
import pytest

from autoscaler_svc.arrivals import COARSE_S, FINE_S, ArrivalHistory

NOON = 1_764_072_000.0  # a whole hour


def test_amounts_are_spread_over_the_time_they_came_in():
    """A look that comes late does not make a burst of what came evenly."""
    history = ArrivalHistory()
    history.note(NOON, 0)
    history.note(NOON + 5 * FINE_S, 100)

    assert history.fine.amounts[:5] == pytest.approx([20] * 5)
    assert history.coarse.amounts.sum() == pytest.approx(100)


def test_what_nobody_saw_is_unknown_and_not_nothing():
    """A forecast that takes a night without an autoscaler for a night without traffic closes in the morning."""
    history = ArrivalHistory()
    history.note(NOON, 5)
    history.note(NOON + 3600, 7)

    assert np.isnan(history.coarse.amounts[2:-1]).all()
    assert history.coarse.amounts[-1] == 7


def test_a_clock_that_is_set_back_loses_nothing():
    """Daylight saving, a battery, an operator: the requests came all the same."""
    history = ArrivalHistory()
    history.note(NOON, 0)
    history.note(NOON + 100, 10)
    history.note(NOON - 400, 7)

    assert np.nansum(history.fine.amounts) == pytest.approx(17)


def test_a_clock_that_was_wrong_by_far_begins_anew():
    """What stands in next year would otherwise swallow everything that comes until then."""
    history = ArrivalHistory()
    history.note(NOON + 1e6, 0)
    history.note(NOON + 1e6 + 100, 10)
    history.note(NOON, 3)
    history.note(NOON + 10, 5)

    assert np.nansum(history.fine.amounts) == 8


def test_memory_is_bounded():
    """It runs for months."""
    history = ArrivalHistory()
    for step in range(1000):
        history.note(NOON + step * 300, 1)

    assert len(history.fine.amounts) <= 2 * 3600 // FINE_S
    assert len(history.coarse.amounts) <= 15 * 86400 // COARSE_S
    assert np.nansum(history.fine.amounts) == pytest.approx(12, abs=1)


@pytest.mark.parametrize("amount", [-1, float("nan"), float("inf")])
def test_what_is_no_amount_is_refused(amount):
    """One NaN would make every later forecast one."""
    with pytest.raises(ValueError, match="must be 0 or more"):
        ArrivalHistory().note(NOON, amount)


def test_survives_a_restart_through_its_file(tmp_path):
    """Days of history are not seen again within a minute."""
    history = ArrivalHistory()
    history.note(NOON, 0)
    history.note(NOON + 100, 10)
    history.save(tmp_path / "new" / "arrivals.npz")

    again = ArrivalHistory.load(tmp_path / "new" / "arrivals.npz")
    again.note(NOON + 110, 3)
    assert np.nansum(again.fine.amounts) == pytest.approx(13)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["arrivals.npz"]


def test_a_file_with_one_wrong_byte_is_named_too(tmp_path):
    """Whatever the library makes of it: the autoscaler has to start."""
    history = ArrivalHistory()
    history.note(NOON, 0)
    history.note(NOON + 100, 10)
    history.save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    for place in range(0, len(whole), 7):
        (tmp_path / "b.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(ValueError, OSError):
            ArrivalHistory.load(tmp_path / "b.npz")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off"])
def test_a_broken_file_is_named(tmp_path, content):
    """The autoscaler begins anew and says why."""
    (tmp_path / "a.npz").write_bytes(content)

    with pytest.raises(ValueError, match=r"a\.npz has no arrivals"):
        ArrivalHistory.load(tmp_path / "a.npz")
