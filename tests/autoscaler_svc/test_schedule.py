"""Policy `schedule`: what people know of their week."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from autoscaler_svc.load import PoolLoad
from autoscaler_svc.observations import Observation, Observations
from autoscaler_svc.policies.schedule import Period, Schedule


def wanted(schedule: Schedule, moment: str, startup_s: float = 0.0) -> int | None:
    at = datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()
    seen = Observations()
    seen.add(Observation(at=0.0, load=PoolLoad(), wall_at=at, startup_s=startup_s))
    return schedule.wish(0.0, seen).count


WEEK = Schedule(
    timezone="Europe/Berlin",
    periods=(
        Period(days=("Mon", "Tue", "Wed", "Thu", "Fri"), begin="08:00", end="18:00", count=4),
        Period(begin="12:00", end="13:00", count=2),
        Period(days=("Fri",), begin="22:00", end="02:00", count=3),
    ),
)


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("2026-11-25T06:59", 0),  # Wednesday, 07:59 in Berlin
        ("2026-11-25T07:00", 4),
        ("2026-11-25T11:30", 4),  # two periods: the larger
        ("2026-11-25T16:59", 4),
        ("2026-11-25T17:00", 0),
        ("2026-11-28T11:30", 2),  # Saturday
        ("2026-11-27T21:00", 3),  # Friday, 22:00
        ("2026-11-28T00:59", 3),  # past midnight
        ("2026-11-28T01:00", 0),
        ("2026-07-01T06:00", 4),  # in summer the same hour is another one
    ],
)
def test_counts_by_the_local_clock(moment, count):
    """Offices open by the clock on their own wall, summer time included."""
    assert wanted(WEEK, moment) == count


def test_begins_early_enough_to_be_ready():
    """Who comes at eight finds an executor, not the start of one."""
    assert wanted(WEEK, "2026-11-25T06:59", startup_s=30) == 0
    assert wanted(WEEK, "2026-11-25T06:59", startup_s=90) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"begin": "8:00"},
        {"begin": 480},
        {"end": "25:00"},
        {"days": ["Monty"]},
        {"days": "mon-fri"},
        {"days": []},
        {"count": -1},
    ],
)
def test_a_wrong_period_is_refused(wrong):
    """A time that is never would keep the pool empty on the day it was made for."""
    with pytest.raises(ValidationError):
        Period(**{"count": 1, **wrong})
    with pytest.raises(ValidationError, match="no time zone"):
        Schedule(timezone="Europe/Atlantis", periods=(Period(count=1),))
