"""What will arrive when an executor that is asked for now would be ready.

A few simple ways to say it are tried on the past: what each would have said, a start-up time before, for times that are
known by now. The one with the smallest loss speaks; how wrong it was gives the quantile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from autoscaler_svc.arrivals import COARSE_S, ArrivalHistory, Buckets

_DAY_S, _WEEK_S = 86400, 7 * 86400
_ORIGINS = 120
"""Moments of the past at which each way is tried."""

_FEW = 20
"""Trials below which the spread is guessed: that of independent arrivals."""

_NEAR_S = 600.0
"""Horizon up to which the fine buckets are gone by."""

_LEVEL_S = 60.0
_BETTER = 0.95
"""Part of the loss of a simpler way that a less simple one may have to be preferred."""

_COVERAGE = 1.25
"""Periods of a season that have to be known before it is believed in."""

Rates = NDArray[np.float64]
Way = Callable[["_Series", int], float]
"""Says at an origin of a series what rate to expect; NaN where it has nothing to go by."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Arrivals per second, on average over the time in which an executor asked for now serves until the next could."""

    mean: float
    high: float  # the quantile that was asked for
    method: str  # none, level, trend, daily or weekly
    error: float = 0.0  # mean pinball loss of the trials, as a share of the mean rate


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
        tried = series.try_out(way, quantile)
        if tried is not None and (best.method == "none" or tried[0] < least * _BETTER):
            least = tried[0]
            best = Forecast(tried[1], tried[2], name, least / (series.typical or 1.0) if math.isfinite(least) else 0.0)
    return best


@dataclass(frozen=True, slots=True)
class _Series:
    """Whole buckets up to now, as rates; and how far ahead one looks, in buckets."""

    rates: Rates
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
        """The mean rate of the trials' time."""
        return float(np.nanmean(self.rates[-_ORIGINS - 2 * self.ahead :]))

    def actual(self, origin: int) -> float:
        """What came in the time that is forecast at an origin, which has to be over; NaN where nobody knows."""
        return _mean(self.rates[origin + self.ahead : origin + self.ahead + self.span])

    def origins(self) -> list[int]:
        """The moments of trials: of late, and at about this time a day ago, since each hour has its own ways."""
        last = len(self.rates) - self.ahead - self.span
        recent = range(max(1, last - _ORIGINS), last + 1)
        then = len(self.rates) - _DAY_S // self.length_s
        around = range(max(1, then - _ORIGINS // 2), then + _ORIGINS // 2) if then > 0 else range(0)
        return [*around, *(origin for origin in recent if origin not in around)]

    def try_out(self, way: Way, quantile: float) -> tuple[float, float, float] | None:
        """(mean pinball loss of the trials, forecast for now, its quantile); None where this way has nothing to say.

        The quantile is that of how much came in the trials, over what had been said.
        """
        mean = way(self, len(self.rates))
        if not math.isfinite(mean):
            return None
        pairs = [(way(self, origin), self.actual(origin)) for origin in self.origins()]
        trials = np.array([pair for pair in pairs if math.isfinite(pair[0]) and math.isfinite(pair[1])]).reshape(-1, 2)
        said, came = trials[:, 0], trials[:, 1]
        if len(trials) < _FEW:
            deviation = math.sqrt(max(mean, 0.0) / (self.length_s * self.span))
            high = mean + _normal_quantile(quantile) * deviation
        else:
            floor = 0.1 / self.length_s
            high = mean * float(np.quantile((came + floor) / (said + floor), quantile)) if mean else 0.0
        if not len(trials):
            return math.inf, mean, max(0.0, high)
        return _pinball(said, came, quantile), mean, max(0.0, high)


def _mean(rates: Rates) -> float:
    known = rates[~np.isnan(rates)]
    return float(known.mean()) if len(known) else math.nan


def _pinball(said: Rates, came: Rates, quantile: float) -> float:
    """What `said` costs on average where `came` came, if too little costs `quantile` and too much the rest."""
    short = came - said
    return float(np.mean(np.maximum(quantile * short, (quantile - 1) * short)))


def _level(series: _Series, origin: int) -> float:
    """As of late: the mean of the last minute, or of as long as one looks ahead."""
    count = max(series.ahead, round(_LEVEL_S / series.length_s))
    return _mean(series.rates[max(0, origin - count) : origin])


def _trend(series: _Series, origin: int) -> float:
    """On along the line through the last buckets, half as steeply: what rises goes on rising, for a while."""
    count = max(2 * series.ahead, round(4 * _LEVEL_S / series.length_s))
    recent = series.rates[max(0, origin - count) : origin]
    known = np.flatnonzero(~np.isnan(recent))
    if len(known) < 4:
        return math.nan
    middle, mean = known.mean(), recent[known].mean()
    spread = float(((known - middle) ** 2).sum())
    slope = float(((known - middle) * (recent[known] - mean)).sum()) / spread
    ahead = len(recent) + series.ahead + (series.span - 1) / 2 - middle
    return max(0.0, float(mean + 0.8 * slope * ahead))


def _season(period_s: int) -> Way:
    """As a period ago, by how much more there is now than there was then."""

    def way(series: _Series, origin: int) -> float:
        period = period_s // series.length_s
        if origin < _COVERAGE * period:
            return math.nan
        then = origin - period + series.ahead
        hour = 3600 // series.length_s
        now, before = (
            _mean(series.rates[origin - hour : origin]),
            _mean(series.rates[origin - period - hour : origin - period]),
        )
        ratio = min(10.0, max(0.1, now / before)) if before > 0 and now > 0 else 1.0
        return _mean(series.rates[then : then + series.span]) * ratio

    return way


_WAYS: dict[str, Way] = {"level": _level, "trend": _trend}
_SEASONS: dict[str, Way] = {"daily": _season(_DAY_S), "weekly": _season(_WEEK_S)}


def _normal_quantile(quantile: float) -> float:
    return NormalDist().inv_cdf(quantile)
