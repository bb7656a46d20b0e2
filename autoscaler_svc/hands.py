"""Does what was decided: one thing at a time for each executor, and nobody waits for what is slow."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from autoscaler_svc.actuators.actuator import Actuator, ActuatorError, Launched, NoRoomError
from autoscaler_svc.fleet_client import FleetError
from autoscaler_svc.reconcile import Action, Drain, Launch, Pauses, Terminate

log = structlog.get_logger()

_LIST_TIMEOUT_S = 5.0
_ACTION_TIMEOUT_S = 15.0
_PATIENCE_S = 0.25
"""For which a round waits for what it has begun: most things are done by then, and are seen with the next look."""

_TELL_AGAIN_S = 30.0


class Fleet(Protocol):
    """What is asked of the scheduler."""

    @property
    def may_act(self) -> bool:
        """Whether executors may be added and removed at this moment."""
        ...

    def tell(self, starting_count: int, next_ready_s: float) -> None:
        """What is to come, for the next time that the right to act is renewed."""
        ...

    def show(self, wanted: int, reason: str, changed_at: float, cost_per_hour: float) -> None:
        """What was decided, for operators; `changed_at` in seconds since 1970."""
        ...

    async def drain(self, executor_id: str, finish_within_s: float) -> None:
        """Let an executor finish and go. Raises `FleetError`."""
        ...


@dataclass(slots=True)
class ActionCounts:
    """What was done, for metrics."""

    by_outcome: Counter[tuple[str, str]] = field(default_factory=Counter)  # (action, outcome)
    never_ready: int = 0


class Hands:
    """Acts through an actuator and the scheduler. What fails is told, and found out again with the next look."""

    def __init__(self, actuator: Actuator, fleet: Fleet, pauses: Pauses, clock: Callable[[], float]) -> None:
        """Nothing is being done yet."""
        self.counts = ActionCounts()
        self.errors: dict[str, str] = {}  # by action, the last one's, while it fails
        self._actuator = actuator
        self._fleet = fleet
        self._pauses = pauses
        self._clock = clock
        self._doing: dict[tuple[str, str], asyncio.Task[None]] = {}  # by kind of action and executor, or number
        self._launching: Counter[str] = Counter()  # by node type, of those
        self._launch_number = 0
        self._told_at: dict[str, float] = {}  # by action
        self._given_up: set[str] = set()  # executors that never became ready, and were counted

    @property
    def launching(self) -> Counter[str]:
        """Executors, by node type, whose launch was asked for and is not answered."""
        return +self._launching

    async def list(self) -> Sequence[Launched] | None:
        """Who is there; None where the actuator does not say."""
        try:
            async with asyncio.timeout(_LIST_TIMEOUT_S):
                launched = await self._actuator.list()
        except (ActuatorError, TimeoutError) as error:
            self._note_error("list", error, _LIST_TIMEOUT_S)
            return None
        self.errors.pop("list", None)
        self._given_up &= {one.executor_id for one in launched}
        return launched

    async def do(self, actions: Collection[Action], stuck: Collection[Launched], finish_s: float) -> None:
        """Begin what is not being done, and wait a moment for it."""
        self._pauses.begin_round()
        for action in actions:
            key = self._key(action)
            if key not in self._doing:
                self._doing[key] = asyncio.create_task(self._do(action, key, stuck, finish_s))
        if self._doing:
            await asyncio.wait(self._doing.values(), timeout=_PATIENCE_S)

    def _key(self, action: Action) -> tuple[str, str]:
        if isinstance(action, Launch):
            self._launch_number += 1
            self._launching[action.node_type] += 1
            return "launch", str(self._launch_number)
        return type(action).__name__.lower(), action.executor_id

    async def _do(self, action: Action, key: tuple[str, str], stuck: Collection[Launched], finish_s: float) -> None:
        name = key[0]
        try:
            async with asyncio.timeout(_ACTION_TIMEOUT_S):
                await self._effect(action, finish_s)
        except (ActuatorError, FleetError, TimeoutError) as error:
            self._note_error(name, error, _ACTION_TIMEOUT_S)
            if isinstance(action, Launch):
                self._pause(action.node_type)
        else:
            self.errors.pop(name, None)
            self.counts.by_outcome[name, "done"] += 1
            log.info(name, **{key: getattr(action, key) for key in action.__slots__ if getattr(action, key)})
            self._note_given_up(action, stuck)
        finally:
            self._doing.pop(key, None)
            if isinstance(action, Launch):
                self._launching[action.node_type] -= 1

    async def _effect(self, action: Action, finish_s: float) -> None:
        if not self._fleet.may_act:
            raise FleetError("another autoscaler may act by now")
        match action:
            case Launch(node_type):
                await self._actuator.launch(node_type)
            case Drain(executor_id):
                await self._actuator.retire(executor_id)  # first: what ends by itself would be started again
                await self._fleet.drain(executor_id, finish_s)
            case Terminate(executor_id):
                await self._actuator.terminate(executor_id)

    def _note_given_up(self, action: Action, stuck: Collection[Launched]) -> None:
        """An executor that never became ready was ended: once for each, however long its end takes."""
        name = "" if isinstance(action, Launch) else action.executor_id
        one = next((one for one in stuck if one.executor_id == name), None)
        if one is None or name in self._given_up:
            return
        self._given_up.add(name)
        self.counts.never_ready += 1
        self._pause(one.node_type)

    def _pause(self, node_type: str) -> None:
        pause_s = self._pauses.note_failure(node_type, self._clock())
        if pause_s:
            log.warning("launching pauses", node_type=node_type, pause_s=pause_s)

    def _note_error(self, action: str, error: BaseException, limit_s: float) -> None:
        """Say it, but not with every look: that it still fails is no news."""
        is_late, is_full = isinstance(error, TimeoutError), isinstance(error, NoRoomError)
        self.counts.by_outcome[action, "timeout" if is_late else "no room" if is_full else "error"] += 1
        reason = str(error) or f"no answer within {limit_s:g} s"
        self.errors[action] = reason
        now = self._clock()
        if now - self._told_at.get(action, -math.inf) > _TELL_AGAIN_S:
            self._told_at[action] = now
            log.error("the actuator failed", action=action, reason=reason)

    async def close(self) -> None:
        """Let what is being done end, for a moment, and let go."""
        if self._doing:
            await asyncio.wait(self._doing.values(), timeout=_PATIENCE_S)
        for task in list(self._doing.values()):
            task.cancel()
        await asyncio.gather(*self._doing.values(), return_exceptions=True)
        await self._actuator.close()
