"""The building blocks of what people set: strict, immutable, with a unit in every name."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|h|d)\s*")


class Setting(BaseModel):
    """A part of the scaling file. Fields that end in `_s` are durations, and are called so there without it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.removesuffix("_s"),
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


def parse_seconds(value: Any) -> Any:
    """Seconds from `90s`, `1.5m`, `100ms`, `2h`, `1d` or a plain number of seconds. Raises `ValueError`.

    Example: `1.5m` is 90.0.
    """
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None:
            raise ValueError(f"'{value}' is no duration; write 100ms, 30s, 5m, 2h or 1d")
        return float(match[1]) * _UNITS[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no duration; write 100ms, 30s, 5m, 2h or 1d")
    return value


Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0, le=86400)]
Window = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0, le=3600)]
"""A time that is looked back over."""
Count = Annotated[int, Field(ge=0, le=10_000)]
Positive = Annotated[float, Field(gt=0)]
