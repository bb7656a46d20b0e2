"""What the autoscaler tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from autoscaler_svc.autoscaler import Autoscaler
from autoscaler_svc.decide import HeldBy


class AutoscalerMetrics(Collector):
    """Reads the autoscaler from another thread: each figure is right by itself."""

    def __init__(self, autoscaler: Autoscaler) -> None:
        """Watch this one."""
        self._autoscaler = autoscaler

    def collect(self) -> Iterator[Metric]:
        """Everything as it is now."""
        yield from self._decision()
        yield from self._executors()
        yield from self._events()
        yield from self._cost()

    def _decision(self) -> Iterator[Metric]:
        decision = self._autoscaler.decision
        yield GaugeMetricFamily(
            "paceline_autoscaler_load_known", "Whether the scheduler tells its load.", float(decision is not None)
        )
        if decision is None:
            return
        yield GaugeMetricFamily("paceline_autoscaler_executors_wanted", "Executors that are wanted.", decision.wanted)
        wishes = GaugeMetricFamily(
            "paceline_autoscaler_executors_wished", "Executors that one policy wants.", labels=["policy"]
        )
        for wish in decision.wishes:
            if wish.count is not None:
                wishes.add_metric([wish.policy], wish.count)
        yield wishes
        held = GaugeMetricFamily(
            "paceline_autoscaler_held_by", "What keeps the decision from the largest wish: 1 for it.", labels=["by"]
        )
        for by in HeldBy:
            held.add_metric([by.value], float(decision.held_by is by))
        yield held

    def _executors(self) -> Iterator[Metric]:
        there = self._autoscaler.standing
        if there is not None:
            states = GaugeMetricFamily(
                "paceline_autoscaler_executors", "Executors, by where they are.", labels=["state"]
            )
            for state in ("ready", "starting", "late", "stuck", "leaving", "strangers"):
                states.add_metric([state], len(getattr(there, state)))
            yield states
        yield GaugeMetricFamily(
            "paceline_autoscaler_startup_seconds",
            "Median time from a launch until the executor took requests. 0: unknown.",
            self._autoscaler.startup.typical_s,
        )

    def _events(self) -> Iterator[Metric]:
        hands = self._autoscaler.hands
        decisions = CounterMetricFamily(
            "paceline_autoscaler_decisions", "Decisions that changed something.", labels=["direction", "held_by"]
        )
        for (direction, held_by), count in list(self._autoscaler.decision_counts.items()):
            decisions.add_metric([direction, held_by], count)
        yield decisions
        if hands is None:
            return
        actions = CounterMetricFamily(
            "paceline_autoscaler_actions", "Actions and what came of them.", labels=["action", "outcome"]
        )
        for (action, outcome), count in list(hands.counts.by_outcome.items()):
            actions.add_metric([action, outcome], count)
        yield actions
        yield CounterMetricFamily(
            "paceline_autoscaler_never_ready",
            "Executors that were replaced before they took requests.",
            hands.counts.never_ready,
        )
        yield GaugeMetricFamily(
            "paceline_autoscaler_actuator_works",
            "Whether the actuator did what it was asked for last.",
            float(not hands.errors),
        )

    def _cost(self) -> Iterator[Metric]:
        meter, load = self._autoscaler.cost, self._autoscaler.load
        hours = CounterMetricFamily(
            "paceline_autoscaler_executor_hours", "Hours of executors from their launch on.", labels=["node_type"]
        )
        cost = CounterMetricFamily(
            "paceline_autoscaler_cost", "What they cost, by the prices of the file.", labels=["node_type"]
        )
        for name, seconds in list(meter.executor_seconds.items()):
            hours.add_metric([name], seconds / 3600)
            cost.add_metric([name], meter.cost[name])
        yield hours
        yield cost
        yield GaugeMetricFamily("paceline_autoscaler_cost_per_hour", "Of what is there now.", meter.per_hour)
        if load is not None and load.generated_token_count:
            yield GaugeMetricFamily(
                "paceline_autoscaler_generated_tokens",
                "Tokens that the scheduler's life has generated: cost over it is the cost of a token.",
                load.generated_token_count,
            )
