"""What the executors have cost: from the launch to the end, starting and draining included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from autoscaler_svc.actuators.actuator import Launched
from autoscaler_svc.scaling_settings import NodeType

_LONGEST_GAP_S = 60.0
"""Between two looks, beyond which nobody knows what was there."""


class CostMeter:
    """Adds up executor-seconds and money by node type."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.executor_seconds: Counter[str] = Counter()
        self.cost: Counter[str] = Counter()
        self.per_hour = 0.0  # by what was there at the last look
        self._looked_at: float | None = None

    def look(self, now: float, launched: Iterable[Launched], node_types: Mapping[str, NodeType]) -> None:
        """Count the time since the last look for everybody who is there now.

        Example: two executors at 1.80 an hour, a second after the last look: 2 executor-seconds, 0.001 in money.
        """
        there = Counter(one.node_type for one in launched)
        prices = {name: node_types[name].price_per_hour if name in node_types else 0.0 for name in there}
        self.per_hour = sum(count * prices[name] for name, count in there.items())
        seconds = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        if not 0 < seconds <= _LONGEST_GAP_S:
            return
        for name, count in there.items():
            self.executor_seconds[name] += count * seconds  # type: ignore[assignment]
            self.cost[name] += count * seconds * prices[name] / 3600  # type: ignore[assignment]
