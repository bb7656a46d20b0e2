"""Who may add and remove executors: one autoscaler at a time."""

from __future__ import annotations

import math

from paceline.v1 import fleet_pb2

LEASE_S = 5.0
"""How long the right lasts after each renewal."""


class ScalingLease:
    """The right to scale, and what its holder says of executors to come. Time is an argument, in seconds."""

    def __init__(self, grants_from: float = -math.inf) -> None:
        """Held by nobody, and granted from a moment on: an earlier life of the scheduler may have granted it before."""
        self._grants_from = grants_from
        self._missing_since = grants_from  # when it was free last; meaningless while it is held
        self._holder = ""
        self._held_until = -math.inf
        self._next_ready_at = math.inf  # soonest; infinity: unknown
        self._starts_in_s = 0.0  # soonest, where none is being started
        self.starting_count = 0
        self._decision: fleet_pb2.ScalingDecision | None = None
        self._metrics_address = ""

    def told(self, decision: fleet_pb2.ScalingDecision | None, metrics_address: str) -> None:
        """What its holder says of itself, for operators."""
        self._decision, self._metrics_address = decision, metrics_address

    def decision(self, now: float) -> fleet_pb2.ScalingDecision | None:
        """What the holder decided last, if there is one and it has said so."""
        return self._decision if self.holder(now) else None

    def metrics_address(self, now: float) -> str:
        """Where the holder's metrics are; "": nowhere."""
        return self._metrics_address if self.holder(now) else ""

    def holder(self, now: float) -> str:
        """Who has it; "": nobody."""
        return self._holder if now < self._held_until else ""

    def opens_in_s(self, now: float) -> float:
        """Seconds until anybody may have it; 0: now."""
        return max(0.0, self._grants_from - now)

    def take(self, holder: str, now: float, starting_count: int = 0, next_ready_s: float = 0.0) -> bool:
        """Take or renew it; whether that worked. `next_ready_s` as in the call, 0: unknown."""
        if now < self._grants_from or self.holder(now) not in ("", holder):
            return False
        self._holder, self._held_until = holder, now + LEASE_S
        self._missing_since = self._held_until
        self.starting_count = starting_count
        self._next_ready_at = now + next_ready_s if starting_count and next_ready_s else math.inf
        self._starts_in_s = 0.0 if starting_count else next_ready_s
        return True

    def give_back(self, holder: str, now: float) -> None:
        """Let somebody else have it at once."""
        if self.holder(now) == holder:
            self._held_until = -math.inf
            self._missing_since = now

    def is_expected(self, now: float) -> bool:
        """Whether somebody has it, or had it a moment ago and may be on the way back: a restart takes seconds."""
        return now < self._missing_since + LEASE_S

    def least_wait_s(self, now: float) -> float:
        """Seconds, at least, until an executor takes requests where none does now; 0: unknown."""
        if not self.holder(now):
            return 0.0
        if self._next_ready_at != math.inf:
            return max(0.0, self._next_ready_at - now)
        return self._starts_in_s
