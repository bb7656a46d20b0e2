"""What is expected to arrive when an executor that is asked for now would be ready."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler_svc.arrivals import ArrivalHistory
from autoscaler_svc.forecast import Forecast, forecast

NOON = 1_764_072_000.0


def history_of(seconds: int, rate, step_s: int = 10, until: float = NOON) -> ArrivalHistory:
    """A history in which `rate(unix seconds)` arrived per second, for so long before `until`."""
    history = ArrivalHistory()
    start = until - seconds
    history.note(start, 0)
    for at in np.arange(start + step_s, until + step_s / 2, step_s):
        history.note(float(at), max(0.0, rate(float(at) - step_s / 2)) * step_s)
    return history


def test_an_even_load_goes_on():
    """Nothing is read into what does not change."""
    expected = forecast(history_of(3600, lambda _: 5.0), NOON, 60, 0.9)

    assert expected.method == "level"
    assert expected.mean == pytest.approx(5)
    assert expected.high == pytest.approx(5, rel=0.01)


def test_a_rise_is_followed_ahead():
    """Whoever reacts to what is there is late by the time of a start."""
    expected = forecast(history_of(3600, lambda at: (at - NOON + 3600) / 100), NOON, 120, 0.5)

    assert expected.method == "trend"
    assert expected.mean > 36  # what is there now


def daily(at: float) -> float:
    """Nothing at night, up at eight in a quarter of an hour, ten a second until evening."""
    hour = at % 86400 / 3600
    return 10 * min(1.0, max(0.0, (hour - 8) * 4)) if hour < 20 else 0.2


def test_a_morning_that_comes_every_day_is_expected():
    """Executors that take minutes are there before the people are."""
    eight = NOON - 4 * 3600
    expected = forecast(history_of(3 * 86400, daily, step_s=60, until=eight - 60), eight - 60, 600, 0.9)

    assert expected.method == "daily"
    assert expected.mean > 3


def test_a_day_that_comes_every_week_is_expected():
    """Mondays are not Sundays."""
    monday = NOON - NOON % 86400 + 86400 * 5 + 8 * 3600  # a Monday, 8:00

    def weekly(at: float) -> float:
        return 10.0 if (at - monday) % (7 * 86400) < 12 * 3600 else 0.5

    expected = forecast(history_of(20 * 86400, weekly, step_s=300, until=monday - 120), monday - 120, 600, 0.9)

    assert expected.method == "weekly"
    assert expected.mean > 5


def test_one_day_is_no_season_yet():
    """One morning may be chance."""
    eight = NOON - 4 * 3600
    expected = forecast(history_of(86400, daily, step_s=60, until=eight - 60), eight - 60, 600, 0.9)

    assert expected.method in ("level", "trend")


def test_the_quantile_covers_what_it_says():
    """Planning for nine cases of ten means nine of ten."""
    random = np.random.default_rng(7)
    counts = random.poisson(50, 720)
    history = ArrivalHistory()
    history.note(NOON, 0)
    within = tried = 0
    for number, count in enumerate(counts):
        at = NOON + 10 * (number + 1)
        history.note(at, float(count))
        if number > 200 and number + 6 < len(counts):
            high = forecast(history, at, 30, 0.9).high
            within += float(np.mean(counts[number + 4 : number + 7])) / 10 <= high
            tried += 1

    assert 0.8 <= within / tried <= 0.97


def test_nothing_is_expected_where_nothing_is_known_or_nothing_comes():
    """Zero traffic is zero, and no division by it."""
    assert forecast(ArrivalHistory(), NOON, 60, 0.9) == Forecast(0.0, 0.0, "none")
    nothing = forecast(history_of(3600, lambda _: 0.0), NOON, 60, 0.9)
    assert (nothing.mean, nothing.high) == (0, 0)


def test_a_gap_is_no_lull():
    """What the autoscaler slept through did not cease to arrive."""
    history = history_of(3600, lambda _: 5.0)
    history.note(NOON + 3600, 0)
    for step in range(1, 13):
        history.note(NOON + 3600 + 10 * step, 50)

    assert forecast(history, NOON + 3720, 60, 0.5).mean == pytest.approx(5, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=30, max_size=300))
def test_a_higher_quantile_is_never_lower(amounts):
    """Whoever asks for more certainty gets more executors, or as many."""
    history = ArrivalHistory()
    history.note(NOON, 0)
    for number, amount in enumerate(amounts):
        history.note(NOON + 10 * (number + 1), amount)
    highs = [forecast(history, NOON + 10 * len(amounts), 30, quantile).high for quantile in (0.1, 0.5, 0.9, 0.99)]

    assert highs == sorted(highs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=100), st.floats(1, 900), st.floats(0.05, 0.95))
def test_a_forecast_is_a_number_and_not_below_zero(amounts, horizon_s, quantile):
    """Whatever came: somebody multiplies with it."""
    history = ArrivalHistory()
    history.note(NOON, 0)
    for number, amount in enumerate(amounts):
        history.note(NOON + 10 * (number + 1), amount)

    expected = forecast(history, NOON + 10 * len(amounts), horizon_s, quantile)

    assert math.isfinite(expected.mean)
    assert math.isfinite(expected.high)
    assert expected.mean >= 0
    assert expected.high >= 0
