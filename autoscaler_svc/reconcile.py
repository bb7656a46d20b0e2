"""What to do now so that there are as many executors as are wanted: by what is there, not by what was done before."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autoscaler_svc.actuators.actuator import Launched
from autoscaler_svc.load import ExecutorLoad, ExecutorState, PoolLoad
from autoscaler_svc.node_mix import cheapest
from autoscaler_svc.scaling_settings import NodeType, ScalingSettings

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0
_DOWN_LIMIT_S = 30.0
"""For which the process of an executor that has failed may be down before another takes its place."""

_LATE_FACTOR = 3
_LATE_AT_LEAST_S = 30.0
_DRAIN_MARGIN_S = 30.0
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Launch:
    """Start an executor."""

    node_type: str
    why: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Let an executor finish, hand over and go."""

    executor_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """End what is not needed, has drained, or never became ready."""

    executor_id: str
    why: str


Action = Launch | Drain | Terminate


@dataclass(slots=True)
class Sightings:
    """What the autoscaler has to have seen itself, because nobody else tells: since when things are as they are.

    All of it may be lost: executors that are stuck are then found out later.
    """

    began_at: float
    joined_at: dict[str, float] = field(default_factory=dict)  # last seen in the fleet
    down_since: dict[str, float] = field(default_factory=dict)  # the process does not run, and has failed
    draining_since: dict[str, float] = field(default_factory=dict)
    drained: set[str] = field(default_factory=set)  # of those that leave, who was seen to drain

    def look(self, now: float, load: PoolLoad, launched: Iterable[Launched]) -> None:
        """Take in what is there."""
        here = {one.executor_id for one in launched}
        fleet = {executor.executor_id: executor for executor in load.executors}
        for name in here & fleet.keys():
            if fleet[name].state is not ExecutorState.CONNECTING:  # who never gets any further never becomes ready
                self.joined_at[name] = now
        down = {one.executor_id for one in launched if not one.is_running and one.last_failure}
        draining = {one.executor_id for one in launched if is_leaving(one, fleet.get(one.executor_id))}
        for known, present in ((self.joined_at, here), (self.down_since, down), (self.draining_since, draining)):
            for name in known.keys() - present:
                del known[name]
            for name in present - known.keys() if known is not self.joined_at else ():
                known[name] = now
        self.drained |= {e.executor_id for e in load.executors if e.state is ExecutorState.DRAINING}
        self.drained &= draining


@dataclass(slots=True)
class Pauses:
    """When a node type may be tried again, after executors on it failed to start."""

    failure_counts: Counter[str] = field(default_factory=Counter)
    until: dict[str, float] = field(default_factory=dict)
    _failed_now: set[str] = field(default_factory=set)  # in this round: several at once are one failure

    def begin_round(self) -> None:
        """Another look: what fails now is a failure of its own."""
        self._failed_now.clear()

    def note_failure(self, node_type: str, now: float) -> float:
        """An executor could not be started, or never became ready; returns the pause in seconds, 0: it is known.

        Example: failures in a row pause 5, 10, 20 s, and so on up to 300.
        """
        if node_type in self._failed_now:
            return 0.0
        self._failed_now.add(node_type)
        self.failure_counts[node_type] += 1
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (min(self.failure_counts[node_type], 16) - 1))
        self.until[node_type] = now + pause_s
        return pause_s

    def note_ready(self, node_type: str) -> None:
        """An executor on it takes requests."""
        del self.failure_counts[node_type]
        self.until.pop(node_type, None)

    def holds(self, node_type: str, now: float) -> bool:
        """Whether it is too early for another try."""
        return self.until.get(node_type, now) > now


@dataclass(frozen=True, slots=True)
class Standing:
    """Where every executor is that was launched, or has joined by itself."""

    ready: tuple[Launched, ...]  # take requests
    starting: tuple[Launched, ...]  # will, in time
    late: tuple[Launched, ...]  # should have long ago: no capacity, and not given up
    stuck: tuple[Launched, ...]  # will not
    leaving: tuple[Launched, ...]  # drain, or have
    strangers: tuple[ExecutorLoad, ...]  # take requests, and somebody else started them
    launching: Counter[str] = field(default_factory=Counter)  # by node type; asked for, and nobody knows them yet

    @property
    def count(self) -> int:
        """Executors that are there or on their way."""
        return len(self.ready) + len(self.starting) + len(self.strangers) + self.launching.total()

    def capacity(self, node_types: Sequence[NodeType]) -> float:
        """What they do, in executors of capacity 1. Of strangers nobody knows more than that they are there."""
        known = sum(_capacity(one.node_type, node_types) for one in (*self.ready, *self.starting))
        coming = sum(count * _capacity(name, node_types) for name, count in self.launching.items())
        return known + coming + len(self.strangers)


def _capacity(name: str, node_types: Sequence[NodeType]) -> float:
    return next((node_type.capacity for node_type in node_types if node_type.name == name), 1.0)


def is_leaving(one: Launched, executor: ExecutorLoad | None) -> bool:
    """Whether an executor is drained: by us, or by an operator."""
    return one.is_retired or (executor is not None and executor.state is ExecutorState.DRAINING)


def standing(
    now: float,
    load: PoolLoad,
    launched: Sequence[Launched],
    sightings: Sightings,
    settings: ScalingSettings,
    startup_s: float,
) -> Standing:
    """Where everybody is `now`; `sightings` have looked at the same."""
    fleet = {executor.executor_id: executor for executor in load.executors}
    groups: dict[str, list[Launched]] = {name: [] for name in ("ready", "starting", "late", "stuck", "leaving")}
    late_after_s = max(_LATE_AT_LEAST_S, _LATE_FACTOR * startup_s) if startup_s else settings.times.startup_limit_s
    for one in launched:
        executor = fleet.get(one.executor_id)
        # Of the time before this autoscaler nobody knows whether the executor was ready then.
        waited_s = now - max(now - one.age_s, sightings.began_at, sightings.joined_at.get(one.executor_id, 0.0))
        down_s = now - sightings.down_since.get(one.executor_id, now)
        if is_leaving(one, executor):
            groups["leaving"].append(one)
        elif executor is not None and executor.state is ExecutorState.READY:
            groups["ready"].append(one)
        elif down_s > _DOWN_LIMIT_S or waited_s > settings.times.startup_limit_s:
            groups["stuck"].append(one)
        else:
            groups["late" if waited_s > late_after_s else "starting"].append(one)
    names = {one.executor_id for one in launched}
    strangers = tuple(executor for executor in load.ready if executor.executor_id not in names)
    ready, starting, late, stuck, leaving = (tuple(members) for members in groups.values())
    return Standing(ready, starting, late, stuck, leaving, strangers)


def actions(
    now: float,
    wanted: int,
    load: PoolLoad,
    there: Standing,
    sightings: Sightings,
    pauses: Pauses,
    settings: ScalingSettings,
) -> list[Action]:
    """What to do `now`. Doing it twice does no harm, and what fails is found out with the next look."""
    doing: list[Action] = [
        Terminate(one.executor_id, f"never became ready{f': {one.last_failure}' if one.last_failure else ''}")
        for one in there.stuck
    ]
    doing += _see_off(now, load, there, sightings, settings)
    capacity = there.capacity(settings.kinds_of_nodes)
    if capacity < wanted:
        doing += _launch(now, wanted - capacity, there, pauses, settings)
    elif capacity > wanted:
        doing += _take_away(capacity - wanted, load, there, settings)
    return doing


def _see_off(
    now: float, load: PoolLoad, there: Standing, sightings: Sightings, settings: ScalingSettings
) -> Iterable[Action]:
    """Finish what was begun with those that leave, whoever began it."""
    fleet = {executor.executor_id: executor for executor in load.executors}
    limit_s = settings.times.finish_s + _DRAIN_MARGIN_S
    for one in there.leaving:
        executor = fleet.get(one.executor_id)
        if executor is None:
            yield Terminate(one.executor_id, "has drained")
        elif executor.state is not ExecutorState.DRAINING and one.executor_id in sightings.drained:
            yield Terminate(one.executor_id, "has drained, and was started again")
        elif executor.state is not ExecutorState.DRAINING:
            yield Drain(one.executor_id, "was to be drained")
        elif now - sightings.draining_since.get(one.executor_id, now) > limit_s:
            yield Terminate(one.executor_id, f"has not drained within {limit_s:g} s; what is left on it moves")


def _launch(now: float, missing: float, there: Standing, pauses: Pauses, settings: ScalingSettings) -> Iterable[Action]:
    """Start what is missing, at the least cost. Who is late or stuck is no capacity, and still takes a place."""
    node_types = settings.kinds_of_nodes
    groups = (there.ready, there.starting, there.late, there.stuck, there.leaving)
    members = Counter(one.node_type for group in groups for one in group)
    members += there.launching
    taken = sum(count * _capacity(name, node_types) for name, count in members.items())
    room = settings.executors.max - len(there.strangers) - taken
    open_types = [node_type for node_type in node_types if not pauses.holds(node_type.name, now)]
    chosen = cheapest(min(missing, room), open_types, members)
    prices = {node_type.name: node_type.price_per_hour for node_type in node_types}
    limit = settings.executors.max_cost_per_hour
    money = math.inf if limit is None else limit - sum(count * prices.get(name, 0.0) for name, count in members.items())
    why = f"{there.capacity(node_types) + missing:g} wanted, {there.capacity(node_types):g} there"
    for name in sorted(chosen.elements(), key=lambda name: prices[name]):
        money -= prices[name]
        if money < -_ROUNDING:
            return
        yield Launch(name, why)


def _take_away(surplus: float, load: PoolLoad, there: Standing, settings: ScalingSettings) -> Iterable[Action]:
    """Give up those that have not started yet, the youngest first; then drain those with the least to lose. One whose
    capacity is more than what is too much stays.
    """
    node_types = settings.kinds_of_nodes
    capacity = there.capacity(node_types)
    why = f"{capacity - surplus:g} wanted, {capacity:g} there"
    for one in sorted(there.starting, key=lambda one: (one.age_s, one.executor_id)):
        if _capacity(one.node_type, node_types) <= surplus + _ROUNDING:
            yield Terminate(one.executor_id, why)
            surplus -= _capacity(one.node_type, node_types)
    fleet = {executor.executor_id: executor for executor in load.executors}
    prices = {node_type.name: node_type for node_type in node_types}
    for one in sorted(there.ready, key=lambda one: _loss(one, fleet[one.executor_id], prices)):
        if _capacity(one.node_type, node_types) > surplus + _ROUNDING:
            continue
        surplus -= _capacity(one.node_type, node_types)
        executor = fleet[one.executor_id]
        yield Drain(
            one.executor_id,
            f"{why}; least to lose: {executor.running_token_count} tokens of {executor.running_request_count} "
            f"requests, {executor.useful_token_count} that others may reuse",
        )


def _loss(one: Launched, executor: ExecutorLoad, prices: Mapping[str, NodeType]) -> tuple[float, float, str]:
    """What goes with an executor: the seconds of computing again, for the money that it saves; the dearest of equals.

    Example: 1,000 tokens at 1 ms on a node for 2.0 an hour weigh as much as 500 on one for 1.0.
    """
    seconds = (executor.running_token_count + executor.useful_token_count) * (executor.token_us or 1.0) / 1e6
    node_type = prices.get(one.node_type)
    price = node_type.price_per_hour if node_type else 0.0
    return (seconds / price if price else seconds), -price, one.executor_id
