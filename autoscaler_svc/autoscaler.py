"""The loop: observe, forecast, decide, act."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from autoscaler_svc.actuators.actuator import Actuator, Launched
from autoscaler_svc.arrivals import ArrivalHistory
from autoscaler_svc.cost import CostMeter
from autoscaler_svc.decide import Change, Decision, HeldBy, decide
from autoscaler_svc.forecast import forecast
from autoscaler_svc.hands import Fleet, Hands
from autoscaler_svc.load import PoolLoad
from autoscaler_svc.observations import Arrivals, Observation, Observations
from autoscaler_svc.policies.slo import Slo
from autoscaler_svc.reconcile import Pauses, Sightings, Standing, actions, standing
from autoscaler_svc.scaling_settings import ScalingSettings
from autoscaler_svc.startup import StartupTimes

log = structlog.get_logger()

_KEPT_CHANGES = 100
_HORIZON_AT_LEAST_S = 1.0
_NEW_S = 10.0
"""Age beyond which an executor that is seen for the first time was not seen to start."""


class Autoscaler:
    """One pool of executors and what is wanted of it. Effects are in `fleet` and `actuator`, time in two clocks."""

    def __init__(
        self,
        settings: ScalingSettings,
        fleet: Fleet,
        actuator: Actuator | None,
        *,
        history: ArrivalHistory | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Without an `actuator` it only says what is wanted: somebody else acts."""
        self.settings = settings
        self.load: PoolLoad | None = None
        self.decision: Decision | None = None
        self.standing: Standing | None = None
        self.launched: Sequence[Launched] = ()
        self.cost = CostMeter()
        self.decision_counts: Counter[tuple[str, str]] = Counter()  # (direction, held by)
        self.startup = StartupTimes(settings.times.startup_s)
        self.history = history or ArrivalHistory()
        self.round_count = 0  # rounds of the loop that are over
        self._fleet = fleet
        self._clock, self._wall = clock, wall
        self._seen = Observations()
        self._changes: deque[Change] = deque(maxlen=_KEPT_CHANGES)
        self._sightings = Sightings(clock())
        self._pauses = Pauses()
        self.hands = Hands(actuator, fleet, self._pauses, clock) if actuator is not None else None
        self._was_ready: set[str] = set()  # at the last look
        self._known: set[str] = set()  # who was launched, at the last look
        self._started: set[str] = set()  # of those, whose start is over, or was not seen: their age says nothing of it
        self._news = asyncio.Condition()
        self._said, self._changed_at = "", wall()  # why so many are wanted, and since when
        self._arrived: tuple[int, int] | None = None  # epoch and counter at the last look

    @property
    def wanted(self) -> int | None:
        """Executors there should be; None while the load is unknown."""
        return self.decision.wanted if self.decision is not None else None

    async def changed(self, since: int) -> None:
        """Wait until `round_count` is another one."""
        async with self._news:
            await self._news.wait_for(lambda: self.round_count != since)

    async def look(self, load: PoolLoad | None) -> Decision | None:
        """One round of the loop with what the scheduler told; None, and nothing is changed, where that is nothing."""
        try:
            return await self._look(load)
        finally:
            async with self._news:
                self.round_count += 1
                self._news.notify_all()

    async def _look(self, load: PoolLoad | None) -> Decision | None:
        self.load = load
        if load is None:
            self.decision = None
            return None
        launched = await self.hands.list() if self.hands is not None else ()
        if launched is not None:
            self._note_known(launched)
        there = self._stand(load)
        self._seen.add(self._observe(load, there))
        decision = decide(self._seen.last.at, self._seen, self.settings, tuple(self._changes))
        self._note(decision)
        self._fleet.show(decision.wanted, self._said, self._changed_at, self.cost.per_hour)
        self._fleet.tell(len(there.starting), self._next_ready_s(there))
        # By an old list what was just launched would be launched again, and again.
        if self.hands is not None and launched is not None and self._fleet.may_act:
            doing = actions(self._clock(), decision.wanted, load, there, self._sightings, self._pauses, self.settings)
            await self.hands.do(doing, there.stuck, self.settings.times.finish_s)
        return decision

    # --- observe ------------------------------------------------------------------------------------------------

    def _note_known(self, launched: Sequence[Launched]) -> None:
        """Keep who is there; whoever is older than a look was not seen to start."""
        names = {one.executor_id for one in launched}
        self._started |= {
            one.executor_id for one in launched if one.executor_id not in self._known and one.age_s > _NEW_S
        }
        self._started &= names
        self._known = names
        self.launched = launched

    def _stand(self, load: PoolLoad) -> Standing:
        now = self._clock()
        self._sightings.look(now, load, self.launched)
        there = standing(now, load, self.launched, self._sightings, self.settings, self.startup.typical_s)
        if self.hands is not None:
            there = replace(there, launching=self.hands.launching)
        self.standing = there
        for one in there.ready:
            if one.executor_id not in self._was_ready:
                self._note_ready(one)
        self._was_ready = {one.executor_id for one in there.ready}
        self.cost.look(now, self.launched, {node.name: node for node in self.settings.kinds_of_nodes})
        return there

    def _note_ready(self, one: Launched) -> None:
        self._pauses.note_ready(one.node_type)
        is_first = one.executor_id not in self._started
        self._started.add(one.executor_id)
        if is_first:
            self.startup.note(one.age_s)
        event = "executor ready" if is_first else "executor ready again"
        log.info(event, executor_id=one.executor_id, age_s=round(one.age_s, 2))

    def _observe(self, load: PoolLoad, there: Standing) -> Observation:
        for executor in load.executors:
            self.startup.note_reported(executor.startup_s)
        startup_s = self.startup.typical_s or max((e.startup_s for e in load.executors), default=0.0)
        return Observation(
            at=self._clock(),
            load=load,
            starting_count=len(there.starting) + there.launching.total(),
            capacity=there.capacity(self.settings.kinds_of_nodes),
            wall_at=self._wall(),
            startup_s=startup_s,
            arrivals=self._forecast(load, startup_s),
        )

    def _forecast(self, load: PoolLoad, startup_s: float) -> Arrivals:
        """What will arrive when an executor that is asked for now would be ready."""
        now = self._wall()
        if self._arrived is not None and self._arrived[0] == load.epoch:
            self.history.note(now, max(0, load.arrived_request_count - self._arrived[1]))
        elif self._arrived is None:
            self.history.note(now, 0)
        self._arrived = load.epoch, load.arrived_request_count
        quantile = max((p.quantile for p in self.settings.policies if isinstance(p, Slo)), default=0.9)
        expected = forecast(self.history, now, max(_HORIZON_AT_LEAST_S, startup_s), quantile)
        return Arrivals(expected.mean, expected.high, expected.method)

    def _next_ready_s(self, there: Standing) -> float:
        """Least seconds until somebody takes requests who does not now; 0: unknown."""
        least_s = self.startup.least_s
        if not least_s or not there.starting:
            return least_s
        return max(0.001, min(least_s - one.age_s for one in there.starting))

    # --- decide -------------------------------------------------------------------------------------------------

    def _note(self, decision: Decision) -> None:
        """Keep what changed, and say it in one line."""
        last = self.decision
        before = last.wanted if last is not None else decision.current
        self.decision = decision
        if decision.wanted != before:
            self._changes.append(Change(decision.at, before, decision.wanted))
        direction = "up" if decision.wanted > before else "down" if decision.wanted < before else "hold"
        is_news = direction != "hold" or last is None or last.held_by is not decision.held_by
        held = f"held by {decision.held_by.value}" if decision.held_by is not HeldBy.NOTHING else ""
        self._said = "; ".join(part for part in (decision.reason, held, decision.seen) if part)
        if direction != "hold" or last is None:
            self._changed_at = self._wall()
        if not is_news:
            return
        self.decision_counts[direction, decision.held_by.value] += 1
        log.info(
            "decided",
            wanted=decision.wanted,
            there=decision.current,
            before=before,
            reason=decision.reason,
            held_by=decision.held_by.value if decision.held_by is not HeldBy.NOTHING else "",
            seen=decision.seen,
            expected_per_s=f"{self._seen.last.arrivals.high_requests:.3g} ({self._seen.last.arrivals.method})",
            cost_per_hour=round(self.cost.per_hour, 4),
        )

    def change_settings(self, settings: ScalingSettings) -> None:
        """Go by another file from the next round on. Whoever acts stays the same until the next start."""
        fixed = {name: getattr(self.settings, name) for name in ("actuator", "targets", "keda", "history")}
        for name, value in fixed.items():
            if getattr(settings, name) != value:
                log.warning("this needs a restart of the autoscaler; what it was stays", setting=name)
        interval_s = self.settings.times.interval_s
        if settings.times.interval_s != interval_s:
            log.warning("this needs a restart of the autoscaler; what it was stays", setting="times.interval")
        times = settings.times.model_copy(update={"interval_s": interval_s})
        settings = settings.model_copy(update={**fixed, "times": times})
        self.settings = settings
        self.startup.assumed_s = settings.times.startup_s


def explain(
    settings: ScalingSettings, load: PoolLoad, starting_count: int, wall_at: float, arriving_per_s: float = 0.0
) -> Decision:
    """What would be decided if the load had been for ever as it is now, with so many requests arriving.

    Windows and cooldowns hold nothing back then, since nothing has changed.
    """
    observations = Observations()
    startup_s = max([settings.times.startup_s, *(e.startup_s for e in load.executors)])
    arrivals = Arrivals(arriving_per_s, arriving_per_s, "level")
    for age_s in (3600.0, 1800.0, 600.0, 300.0, 120.0, 60.0, 30.0, 10.0, 5.0, 2.0, 1.0, 0.0):
        one = Observation(0.0, load, starting_count, None, wall_at, startup_s, arrivals)
        observations.add(replace(one, at=3600.0 - age_s))
    return decide(3600.0, observations, settings)
