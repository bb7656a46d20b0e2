"""What will arrive when an executor that is asked for now would be ready.

A few simple ways to say it are tried on the past: what each would have said, a start-up time before, for times that are
known by now. The one that was nearest speaks; how much more came than it had said gives the quantile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from autoscaler_svc.arrivals import COARSE_S, ArrivalHistory, Buckets

_DAY_S, _WEEK_S = 86400, 7 * 86400
_NEAR_S = 120.0
"""Horizon up to which the fine buckets are gone by."""

_TRIALS = 120
_TRIAL_EVERY_S = 10.0
"""Least time between two moments of the past at which each way is tried: twenty minutes of them, or more."""

_FEW = 20
"""Trials below which the spread is guessed: that of independent arrivals."""

_ALIKE = 2.0
"""Factor by which two rates may differ to be of the same kind."""

_LEVEL_S, _TREND_S = 10.0, 40.0
_DAMPING = 0.8
"""Part of a slope that is believed in: what rises goes on rising, for a while."""

_BETTER = 0.95
"""Part of the error of a simpler way that a less simple one may have to be preferred."""

_COVERAGE = 1.25
"""Periods of a season that have to be known before it is believed in."""

_MOST_GROWTH = 10.0
"""Factor by which today may differ from the day before."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Way = Callable[["_Series", Ints], Floats]
"""Says at each of some origins of a series what rate to expect; NaN where it has nothing to go by."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Arrivals per second, on average over the time in which an executor asked for now serves until the next could."""

    mean: float
    high: float  # the quantile that was asked for
    method: str  # none, level, trend, daily or weekly
    error: float = 0.0  # mean error of the trials, as a share of the mean rate


def forecast(history: ArrivalHistory, now: float, horizon_s: float, quantile: float) -> Forecast:
    """The rate from `now + horizon_s` to `now + 2 * horizon_s`. `now` is in Unix seconds, `quantile` between 0 and 1.

    Example: 5/s for an hour, at the quantile 0.5: 5/s by `level`.
    """
    near = _Series.of(history.fine if horizon_s <= _NEAR_S else history.coarse, now, horizon_s)
    if near is None:
        return Forecast(0.0, 0.0, "none")
    far = _Series.of(history.coarse, now, horizon_s)
    if far is not None and len(far.rates) >= _COVERAGE * _DAY_S / COARSE_S:
        seasonal = _best(far, _WAYS | _SEASONS, quantile)
        if seasonal.method in _SEASONS:
            return seasonal
    return _best(near, _WAYS, quantile)


def _best(series: _Series, ways: Mapping[str, Way], quantile: float) -> Forecast:
    """What the way says that was nearest in the trials. They are in order, the simplest first."""
    best, least = Forecast(0.0, 0.0, "none"), math.inf
    for name, way in ways.items():
        mean = float(way(series, np.array([len(series.rates)]))[0])
        if not math.isfinite(mean):
            continue
        said, came = series.trials(way)
        error = float(np.abs(said - came).mean()) if len(said) else math.inf
        if best.method == "none" or error < least * _BETTER:
            least = error
            high = max(0.0, series.quantile_of(mean, said, came, quantile))
            best = Forecast(mean, high, name, error / (series.typical or 1.0) if math.isfinite(error) else 0.0)
    return best


@dataclass(frozen=True)
class _Series:
    """Whole buckets up to now, as rates; and how far ahead one looks, in buckets."""

    rates: Floats  # NaN where nobody knows
    length_s: int
    ahead: int  # buckets from an origin to what is forecast
    span: int  # buckets that are forecast together

    @classmethod
    def of(cls, buckets: Buckets, now: float, horizon_s: float) -> _Series | None:
        """Those of `buckets` that are over, and so not the last one; None where nothing is known."""
        known = buckets.amounts[: max(0, math.floor(now / buckets.length_s) - buckets.first)]
        if not len(known):
            known = buckets.amounts  # the very first one, as it is
        if not len(known) or bool(np.all(np.isnan(known))):
            return None
        steps = max(1, round(horizon_s / buckets.length_s))
        return cls(known / buckets.length_s, buckets.length_s, steps, steps)

    @property
    def typical(self) -> float:
        """The mean rate of late."""
        recent = self.rates[-_TRIALS - 2 * self.ahead :]
        return float(np.nanmean(recent)) if not np.isnan(recent).all() else 0.0

    @cached_property
    def sums(self) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Sums up to each bucket: of what is known 1, x and x², and of the rates y and x y, where x is its number."""
        known = ~np.isnan(self.rates)
        x, y = np.arange(len(self.rates), dtype=float), np.where(known, self.rates, 0.0)

        def up_to(values: Floats) -> Floats:
            return np.concatenate([[0.0], np.cumsum(values)])

        return up_to(known * 1.0), up_to(known * x), up_to(known * x * x), up_to(y), up_to(y * x)

    def between(self, begins: Ints, ends: Ints) -> tuple[Floats, ...]:
        """The sums from `begins` to `ends`, half-open, of each pair; outside of the series nothing is known."""
        first, last = (np.clip(edge, 0, len(self.rates)) for edge in (begins, ends))
        return tuple(total[np.maximum(first, last)] - total[first] for total in self.sums)

    def means(self, begins: Ints, ends: Ints) -> Floats:
        """Mean rates from `begins` to `ends`; NaN where nothing is known."""
        count, _, _, total, _ = self.between(begins, ends)
        return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)

    @cached_property
    def origins(self) -> Ints:
        """The moments of trials: of late, and at about this time a day and a week ago: each hour has its own ways."""
        stride = max(1, round(_TRIAL_EVERY_S / self.length_s))
        last = len(self.rates) - self.ahead - self.span
        parts = [np.arange(last, max(0, last - _TRIALS * stride), -stride)]
        for season_s in (_DAY_S, _WEEK_S):
            then = len(self.rates) - season_s // self.length_s
            if then > _TRIALS:
                parts.append(np.arange(then - _TRIALS // 2, then + _TRIALS // 2))
        found = np.unique(np.concatenate(parts))
        return found[(found > 0) & (found <= last)].astype(np.int64)

    def trials(self, way: Way) -> tuple[Floats, Floats]:
        """What a way would have said at the origins, and what came then."""
        said = way(self, self.origins)
        came = self.means(self.origins + self.ahead, self.origins + self.ahead + self.span)
        both = np.isfinite(said) & np.isfinite(came)
        return said[both], came[both]

    def quantile_of(self, mean: float, said: Floats, came: Floats, quantile: float) -> float:
        """The quantile of what comes where `mean` is said, by how much more came in trials that said about as much:
        what came after a lull says nothing of what comes after a peak. Of few trials: as of independent arrivals.
        """
        alike = (said > mean / _ALIKE) & (said < mean * _ALIKE)
        if np.count_nonzero(alike) < _FEW:
            deviation = math.sqrt(max(mean, 0.0) / (self.length_s * self.span))
            return mean + NormalDist().inv_cdf(quantile) * deviation
        return mean * float(np.quantile(came[alike] / said[alike], quantile))


def _level(series: _Series, origins: Ints) -> Floats:
    """As of late: the mean of the last ten seconds, or of as long as one looks ahead."""
    count = max(series.ahead, round(_LEVEL_S / series.length_s))
    return series.means(origins - count, origins)


def _trend(series: _Series, origins: Ints) -> Floats:
    """On along the line through the last buckets, less steeply."""
    count = max(3 * series.ahead, round(_TREND_S / series.length_s), 6)
    known, x, xx, y, xy = series.between(origins - count, origins)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle, mean = x / known, y / known
        slope = (xy - x * mean) / (xx - x * middle)
        there = origins + series.ahead + (series.span - 1) / 2
        said = np.maximum(0.0, mean + _DAMPING * slope * (there - middle))
    return np.where(known >= 4, said, np.nan)


def _season(period_s: int) -> Way:
    """As a period ago, by how much more there is now than there was then."""

    def way(series: _Series, origins: Ints) -> Floats:
        period, hour = period_s // series.length_s, 3600 // series.length_s
        now = series.means(origins - hour, origins)
        before = series.means(origins - period - hour, origins - period)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.clip(now / before, 1 / _MOST_GROWTH, _MOST_GROWTH)
        ratio = np.where((before > 0) & (now > 0), ratio, 1.0)
        then = origins - period + series.ahead
        return np.where(origins >= _COVERAGE * period, series.means(then, then + series.span) * ratio, np.nan)

    return way


_WAYS: dict[str, Way] = {"level": _level, "trend": _trend}
_SEASONS: dict[str, Way] = {"daily": _season(_DAY_S), "weekly": _season(_WEEK_S)}
