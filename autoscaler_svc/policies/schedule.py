"""`schedule`: a number of executors by the clock on the wall."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from autoscaler_svc.observations import Observations
from autoscaler_svc.policies.policy import Wish
from autoscaler_svc.settings import Count, Setting

Day = Literal["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]

_DAYS: tuple[Day, ...] = get_args(Day)
_LONG_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])|24:00")


def _check_time(text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError('a time of the day stands in quotes: "08:30"')
    if not _TIME.fullmatch(text):
        raise ValueError(f'\'{text}\' is no time of the day; write "08:30", up to "24:00"')
    return text


def _day(name: Any) -> Any:
    """Monday, monday and mon are Mon."""
    short = name[:3].title() if isinstance(name, str) else name
    return short if short in _DAYS and name.lower() in (short.lower(), *_LONG_DAYS) else name


def _check_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"'{name}' is no time zone that this machine knows; write Europe/Berlin or UTC") from error
    return name


TimeOfDay = Annotated[str, BeforeValidator(_check_time)]
Zone = Annotated[str, AfterValidator(_check_zone)]


class Period(Setting):
    """A time of the day, on some days of the week; over midnight where it ends before it begins."""

    days: Annotated[tuple[Annotated[Day, BeforeValidator(_day)], ...], Field(min_length=1)] = _DAYS
    begin: TimeOfDay = "00:00"
    end: TimeOfDay = "24:00"
    count: Count

    @model_validator(mode="after")
    def _check(self) -> Period:
        if self.begin == "24:00":
            raise ValueError("begin is 24:00, which no day reaches; write 00:00")
        return self

    def holds(self, moment: datetime) -> bool:
        """Whether a moment, local time, is in it.

        Example: Fri 22:00 to 06:00 holds on Friday at 23:00 and on Saturday at 05:59.
        """
        time, today = moment.strftime("%H:%M"), _DAYS[moment.weekday()]
        if self.begin < self.end:
            return today in self.days and self.begin <= time < self.end
        yesterday = _DAYS[moment.weekday() - 1]
        return (today in self.days and time >= self.begin) or (yesterday in self.days and time < self.end)


class Schedule(Setting):
    """The largest count of the periods that it is now, or that it is when an executor asked for now would be ready."""

    kind: Literal["schedule"] = "schedule"
    timezone: Zone = "UTC"
    periods: Annotated[tuple[Period, ...], Field(min_length=1)]

    @property
    def name(self) -> str:
        """How it is called in logs."""
        return "schedule"

    def wish(self, now: float, seen: Observations) -> Wish:
        """How many executors there should be now."""
        del now  # of a clock that nobody hangs on a wall
        local = datetime.fromtimestamp(seen.last.wall_at, ZoneInfo(self.timezone))
        moments = (local, local + timedelta(seconds=seen.last.startup_s))
        count = max((p.count for p in self.periods if any(p.holds(moment) for moment in moments)), default=0)
        return Wish(self.name, count, f"{count} at {local:%a %H:%M} {self.timezone}")
