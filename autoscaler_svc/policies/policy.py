"""What a policy is, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from autoscaler_svc.observations import Observations


@dataclass(frozen=True, slots=True)
class Wish:
    """What one policy wants."""

    policy: str  # its name
    count: int | None  # executors; None: it has nothing to go by, and wants no change
    reason: str  # what it saw, in a few words with numbers


class Policy(Protocol):
    """A rule. It remembers nothing: what it needs of the past stands in the observations."""

    @property
    def name(self) -> str:
        """How it is called in logs."""
        ...

    def wish(self, now: float, seen: Observations) -> Wish:
        """How many executors there should be `now`. `seen` has at least one observation."""
        ...


def whole(value: float) -> int | None:
    """The executors that `value` of them make: rounded up, but for what is lost in floating point.

    Example: 3.0000000001 are 3, 3.1 are 4; not a number, or infinite, is None.
    """
    return math.ceil(value - 1e-9) if math.isfinite(value) else None
