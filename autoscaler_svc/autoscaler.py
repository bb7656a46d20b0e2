"""The loop: observe, forecast, decide, act."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from autoscaler_svc.actuators.actuator import Actuator, ActuatorError, Launched, NoRoomError
from autoscaler_svc.arrivals import ArrivalHistory
from autoscaler_svc.cost import CostMeter
from autoscaler_svc.decide import Change, Decision, HeldBy, decide
from autoscaler_svc.fleet_client import FleetError
from autoscaler_svc.forecast import forecast
from autoscaler_svc.load import PoolLoad
from autoscaler_svc.observations import Arrivals, Observation, Observations
from autoscaler_svc.policies.slo import Slo
from autoscaler_svc.reconcile import Action, Drain, Launch, Pauses, Sightings, Standing, Terminate, actions, standing
from autoscaler_svc.scaling_settings import ScalingSettings
from autoscaler_svc.startup import StartupTimes

log = structlog.get_logger()

_ACTION_TIMEOUT_S = 15.0
_KEPT_CHANGES = 100
_HORIZON_AT_LEAST_S = 1.0
_TELL_AGAIN_S = 30.0


class Fleet(Protocol):
    """What is asked of the scheduler."""

    @property
    def may_act(self) -> bool:
        """Whether executors may be added and removed at this moment."""
        ...

    async def renew(self, starting_count: int, next_ready_s: float) -> bool:
        """Take the right to act or keep it, and tell what is to come; returns whether it is held."""
        ...

    async def drain(self, executor_id: str, finish_within_s: float) -> None:
        """Let an executor finish and go. Raises `FleetError`."""
        ...


@dataclass(slots=True)
class Counts:
    """What happened, for metrics."""

    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)  # (direction, held by)
    actions: Counter[tuple[str, str]] = field(default_factory=Counter)  # (action, outcome)
    never_ready: int = 0


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
        self.counts = Counts()
        self.startup = StartupTimes(settings.times.startup_s)
        self.history = history or ArrivalHistory()
        self.round_count = 0  # rounds of the loop that are over
        self.actuator_error = ""  # of the last look or action; "": it works
        self._fleet = fleet
        self._actuator = actuator
        self._clock, self._wall = clock, wall
        self._seen = Observations()
        self._changes: deque[Change] = deque(maxlen=_KEPT_CHANGES)
        self._sightings = Sightings(clock())
        self._pauses = Pauses()
        self._errors_told: dict[str, float] = {}  # when, by action
        self._was_ready: set[str] | None = None  # at the last look; None: there was none
        self._restarted: set[str] = set()  # have been ready since they were launched: their age says nothing of a start
        self._news = asyncio.Condition()
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
            await self._fleet.renew(0, 0.0)
            return None
        await self._list()
        there = self._stand(load)
        self._seen.add(self._observe(load, there))
        decision = decide(self._seen.last.at, self._seen, self.settings, tuple(self._changes))
        self._note(decision)
        await self._fleet.renew(len(there.starting), self._next_ready_s(there))
        if self._actuator is not None and self._fleet.may_act:
            doing = actions(self._clock(), decision.wanted, load, there, self._sightings, self._pauses, self.settings)
            await asyncio.gather(*(self._do(action) for action in doing))
        return decision

    # --- observe ------------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        """Ask the actuator who is there; what it said last stands while it does not answer."""
        if self._actuator is None:
            return
        try:
            async with asyncio.timeout(_ACTION_TIMEOUT_S):
                self.launched = await self._actuator.list()
        except (ActuatorError, TimeoutError) as error:
            self._note_error("list", error)
        else:
            self.actuator_error = ""

    def _stand(self, load: PoolLoad) -> Standing:
        now = self._clock()
        self._sightings.look(now, load, self.launched)
        there = standing(now, load, self.launched, self._sightings, self.settings, self.startup.typical_s)
        self.standing = there
        ready = {one.executor_id for one in there.ready}
        self._restarted &= {one.executor_id for one in self.launched}
        if self._was_ready is None:
            self._restarted |= ready
        for one in there.ready:
            if self._was_ready is not None and one.executor_id not in self._was_ready:
                self._note_ready(one)
        self._was_ready = ready
        self.cost.look(now, self.launched, {node.name: node for node in self.settings.kinds_of_nodes})
        return there

    def _note_ready(self, one: Launched) -> None:
        self._pauses.note_ready(one.node_type)
        is_first = one.executor_id not in self._restarted
        self._restarted.add(one.executor_id)
        if is_first:
            self.startup.note(one.age_s)
        log.info(
            "executor ready" if is_first else "executor ready again",
            executor_id=one.executor_id,
            age_s=round(one.age_s, 2),
        )

    def _observe(self, load: PoolLoad, there: Standing) -> Observation:
        for executor in load.executors:
            self.startup.note_reported(executor.startup_s)
        startup_s = self.startup.typical_s or max((e.startup_s for e in load.executors), default=0.0)
        return Observation(
            at=self._clock(),
            load=load,
            starting_count=len(there.starting),
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
        if not is_news:
            return
        self.counts.decisions[direction, decision.held_by.value] += 1
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

    # --- act ----------------------------------------------------------------------------------------------------

    async def _do(self, action: Action) -> None:
        """Do one thing. What fails is said, and tried again with the next look."""
        name = type(action).__name__.lower()
        try:
            async with asyncio.timeout(_ACTION_TIMEOUT_S):
                await self._effect(action)
        except (ActuatorError, FleetError, TimeoutError) as error:
            self._note_error(name, error)
            if isinstance(action, Launch):
                pause_s = self._pauses.note_failure(action.node_type, self._clock())
                log.warning("launching pauses", node_type=action.node_type, pause_s=pause_s)
        else:
            self.counts.actions[name, "done"] += 1
            log.info(name, **{key: getattr(action, key) for key in action.__slots__ if getattr(action, key)})

    def _effect(self, action: Action) -> Awaitable[object]:
        assert self._actuator is not None
        match action:
            case Launch(node_type):
                return self._actuator.launch(node_type)
            case Drain(executor_id):
                return self._drain(executor_id)
            case Terminate(executor_id):
                return self._terminate(executor_id)

    async def _drain(self, executor_id: str) -> None:
        assert self._actuator is not None
        await self._actuator.retire(executor_id)  # first: what ends by itself would be started again
        await self._fleet.drain(executor_id, self.settings.times.finish_s)

    async def _terminate(self, executor_id: str) -> None:
        assert self._actuator is not None
        await self._actuator.terminate(executor_id)
        stuck = (
            next((one for one in self.standing.stuck if one.executor_id == executor_id), None)
            if self.standing
            else None
        )
        if stuck is not None:
            self.counts.never_ready += 1
            self._pauses.note_failure(stuck.node_type, self._clock())

    def _note_error(self, action: str, error: BaseException) -> None:
        """Say it, but not with every look: that it still fails is no news."""
        outcome = (
            "no room" if isinstance(error, NoRoomError) else "timeout" if isinstance(error, TimeoutError) else "error"
        )
        reason = str(error) or f"no answer within {_ACTION_TIMEOUT_S:g} s"
        self.counts.actions[action, outcome] += 1
        now, told_at = self._clock(), self._errors_told.get(action, -math.inf)
        if now - told_at > _TELL_AGAIN_S:
            self._errors_told[action] = now
            log.error("the actuator failed", action=action, reason=reason)
        self.actuator_error = reason

    def change_settings(self, settings: ScalingSettings) -> None:
        """Go by another file from the next round on. Whoever acts stays the same until the next start."""
        if settings.actuator != self.settings.actuator:
            log.warning("another actuator needs a restart; the old one stays", actuator=settings.actuator.kind)
            settings = settings.model_copy(update={"actuator": self.settings.actuator})
        self.settings = settings
        self.startup.assumed_s = settings.times.startup_s


def explain(settings: ScalingSettings, load: PoolLoad, starting_count: int, wall_at: float) -> Decision:
    """What would be decided if the load had been for ever as it is now.

    Example: windows and cooldowns hold nothing back, since nothing has changed.
    """
    observations = Observations()
    startup_s = max([settings.times.startup_s, *(e.startup_s for e in load.executors)])
    for age_s in (3600.0, 1800.0, 600.0, 300.0, 120.0, 60.0, 30.0, 10.0, 5.0, 2.0, 1.0, 0.0):
        one = Observation(-age_s, load, starting_count, wall_at=wall_at, startup_s=startup_s)
        observations.add(replace(one, at=3600.0 - age_s))
    return decide(3600.0, observations, settings)
