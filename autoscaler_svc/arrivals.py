"""What has arrived, by the clock on the wall: what forecasts are made from."""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FINE_S, FINE_KEPT_S = 2, 3600
COARSE_S, COARSE_KEPT_S = 60, 22 * 86400  # a week ago can be tried out, and the week before it
_LONGEST_GAP_S = 600.0
"""Between two notes, beyond which nobody knows what arrived in between."""

_BROKEN = (
    KeyError,
    ValueError,
    IndexError,
    TypeError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy's reader raises for a damaged file."""


class Buckets:
    """Amounts per bucket of equal length, for a bounded time; NaN where nobody knows."""

    def __init__(self, length_s: int, kept_s: int) -> None:
        """Start knowing nothing."""
        self.length_s = length_s
        self._count = kept_s // length_s
        self.first = 0  # number of the first bucket: Unix seconds over the length
        self.amounts: NDArray[np.float64] = np.zeros(0)

    @property
    def end(self) -> int:
        """Number of the bucket after the last one."""
        return self.first + len(self.amounts)

    def reach(self, bucket: int) -> None:
        """Have all buckets up to and with this one; those between are empty."""
        if not len(self.amounts) or bucket - self.end > self._count:
            self.first, self.amounts = bucket, np.zeros(1)
            return
        missing = bucket + 1 - self.end
        if missing > 0:
            self.amounts = np.concatenate([self.amounts, np.zeros(missing)])
        surplus = len(self.amounts) - self._count
        if surplus > 0:
            self.first, self.amounts = self.first + surplus, self.amounts[surplus:]

    def add(self, begin: float, end: float, amount: float) -> None:
        """Spread an amount evenly over the time from `begin` to `end`, Unix seconds."""
        self.reach(math.floor(end / self.length_s))
        first = max(self.first, math.floor(begin / self.length_s))
        last = self.end - 1
        if end <= begin or first == last:
            self._put(last, amount)
            return
        for bucket in range(first, last + 1):
            inside = min(end, (bucket + 1) * self.length_s) - max(begin, bucket * self.length_s)
            self._put(bucket, amount * max(0.0, inside) / (end - begin))

    def _put(self, bucket: int, amount: float) -> None:
        index = bucket - self.first
        self.amounts[index] = np.nan_to_num(self.amounts[index]) + amount

    def forget(self, begin: float, end: float) -> None:
        """Nobody knows what arrived in the whole buckets from `begin` to `end`."""
        self.reach(math.floor(end / self.length_s))
        first = max(0, math.ceil(begin / self.length_s) - self.first)
        self.amounts[first : math.floor(end / self.length_s) - self.first] = np.nan


class ArrivalHistory:
    """What arrived: in fine buckets of late, in coarse ones for three weeks."""

    def __init__(self) -> None:
        """Start knowing nothing."""
        self.fine = Buckets(FINE_S, FINE_KEPT_S)
        self.coarse = Buckets(COARSE_S, COARSE_KEPT_S)
        self._noted_at: float | None = None

    def note(self, now: float, amount: float) -> None:
        """So much has arrived since the last note; `now` is in Unix seconds.

        A clock that is set back a little loses nothing: the amount is counted where the buckets end. Set back by more
        than ten minutes it was wrong, and everything begins anew. After more than ten minutes without a note the time
        between is unknown, not empty. Raises `ValueError` for what is no amount.
        """
        if not (math.isfinite(amount) and amount >= 0):
            raise ValueError(f"an amount that arrived is {amount}, must be 0 or more")
        before = now if self._noted_at is None else self._noted_at
        if now < before - _LONGEST_GAP_S:
            self.fine, self.coarse = Buckets(FINE_S, FINE_KEPT_S), Buckets(COARSE_S, COARSE_KEPT_S)
            before = now
        now = max(now, before)
        for buckets in (self.fine, self.coarse):
            if now - before > _LONGEST_GAP_S:
                buckets.forget(before, now)
                buckets.add(now, now, amount)
            else:
                buckets.add(before, now, amount)
        self._noted_at = now

    def save(self, path: Path) -> None:
        """Write it to a file, whole or not at all. Raises `OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(
                    file,
                    firsts=np.array([self.fine.first, self.coarse.first]),
                    fine=self.fine.amounts,
                    coarse=self.coarse.amounts,
                    noted_at=np.array([self._noted_at or 0.0]),
                )
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: Path) -> ArrivalHistory:
        """Read what was saved. Raises `ValueError` for a file that is none of ours, `OSError` as reading does."""
        history = cls()
        try:
            with path.open("rb") as file, np.load(file) as content:
                firsts = content["firsts"]
                history.fine.first, history.fine.amounts = int(firsts[0]), content["fine"].astype(float)
                history.coarse.first, history.coarse.amounts = int(firsts[1]), content["coarse"].astype(float)
                history._noted_at = float(content["noted_at"][0]) or None
                for buckets in (history.fine, history.coarse):
                    _check(buckets)
        except _BROKEN as error:
            raise ValueError(f"{path} has no arrivals that can be read; take it away to begin anew") from error
        return history


def _check(buckets: Buckets) -> None:
    """Refuse what cannot have been saved. Raises `ValueError`."""
    amounts = buckets.amounts
    if amounts.ndim != 1 or np.isinf(amounts).any() or (amounts < 0).any():
        raise ValueError("no amounts")
