"""How many executors there should be: the largest wish, within bounds, and not too soon after the last change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from autoscaler_svc.load import PoolLoad
from autoscaler_svc.observations import Observations
from autoscaler_svc.policies.policy import Wish
from autoscaler_svc.scaling_settings import ScalingSettings, affordable_count


class HeldBy(Enum):
    """What kept a decision from being the largest wish."""

    NOTHING = "nothing"
    NO_DATA = "no data"  # no policy had anything to go by
    WORK = "work is there"  # requests wait, or run: zero is out of the question
    RUNNING = "running requests"  # those who stay could not hold them
    COOLDOWN_UP = "cooldown up"
    COOLDOWN_DOWN = "cooldown down"
    COOLDOWN_ZERO = "cooldown zero"
    MIN = "min"
    MAX = "max"
    COST = "max cost per hour"


@dataclass(frozen=True, slots=True)
class Change:
    """The number of executors that was wanted was another one from this moment on."""

    at: float
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What is wanted now, and why."""

    at: float
    current: int  # executors that are there or on their way
    wanted: int
    wishes: tuple[Wish, ...]
    held_by: HeldBy
    seen: str  # the load in a few words

    @property
    def reason(self) -> str:
        """The wish that counted, in words, or that there was none."""
        known = [wish for wish in self.wishes if wish.count is not None]
        if not known:
            return "; ".join(f"{wish.policy}: {wish.reason}" for wish in self.wishes) or "nothing is known"
        largest = max(known, key=lambda wish: wish.count or 0)
        return f"{largest.policy} wants {largest.count}: {largest.reason}"


def decide(now: float, seen: Observations, settings: ScalingSettings, changes: Sequence[Change] = ()) -> Decision:
    """Decide how many executors there should be `now`. The largest wish wins.

    `seen` has at least one observation; `changes` are those of what was wanted, oldest first.

    Example: of 2 executors, one policy wants 1 and another 5, `max` is 4: 4, held by max.
    """
    last = seen.last
    current = last.executor_count
    wishes = tuple(policy.wish(now, seen) for policy in settings.policies)
    known = [wish.count for wish in wishes if wish.count is not None]
    wanted, held_by = (max(known), HeldBy.NOTHING) if known else (current, HeldBy.NO_DATA)
    for hold in (_keep_for_work, _cool_down, _keep_warm, _keep_within):
        wanted, held = hold(now, wanted, seen, settings, changes)
        held_by = held if held is not HeldBy.NOTHING else held_by
    return Decision(now, current, wanted, wishes, held_by, in_words(last.load))


def in_words(load: PoolLoad) -> str:
    """The load as it stands in the log."""
    return (
        f"{load.waiting_request_count} waiting, {load.running_request_count} running, {len(load.ready)} ready, "
        f"{load.held_block_count} of {load.block_count} blocks"
    )


_Hold = tuple[int, HeldBy]


def _keep_for_work(
    _now: float, wanted: int, seen: Observations, _settings: ScalingSettings, _changes: Sequence[Change]
) -> _Hold:
    """Who waits gets somebody, and who runs keeps a place."""
    load, current = seen.last.load, seen.last.executor_count
    needed = min(current, needed_by_running(load))
    if wanted < needed:
        return needed, HeldBy.RUNNING
    if not wanted and load.unfinished_request_count:
        return 1, HeldBy.WORK
    return wanted, HeldBy.NOTHING


def needed_by_running(load: PoolLoad) -> int:
    """Executors, at least, that have slots and memory for what runs now.

    Example: 70 requests run and hold 1,000 blocks, executors have 64 slots and 4,096 blocks: 2.
    """
    slots = max((e.slot_count for e in load.ready), default=0)
    blocks = max((e.block_count for e in load.ready), default=0)
    by_slots = math.ceil(load.running_request_count / slots) if slots else 0
    by_blocks = math.ceil(load.held_block_count / blocks) if blocks else 0
    return max(by_slots, by_blocks)


def _cool_down(
    now: float, wanted: int, seen: Observations, settings: ScalingSettings, changes: Sequence[Change]
) -> _Hold:
    """One change at a time: so that the effect of the last one can be seen. From zero nobody waits for that."""
    current = seen.last.executor_count
    ups = [change.at for change in changes if change.after > change.before]
    if wanted > current > 0 and ups and now - ups[-1] < settings.cooldowns.up_s:
        return current, HeldBy.COOLDOWN_UP
    if wanted < current and changes and now - changes[-1].at < settings.cooldowns.down_s:
        return current, HeldBy.COOLDOWN_DOWN
    return wanted, HeldBy.NOTHING


def _keep_warm(
    now: float, wanted: int, seen: Observations, settings: ScalingSettings, _changes: Sequence[Change]
) -> _Hold:
    """The last executor goes when nobody has come for a while; a start costs the next one its time."""
    if wanted or not seen.last.executor_count:
        return wanted, HeldBy.NOTHING
    quiet_s = settings.cooldowns.zero_s
    before = seen.before(now - quiet_s).load
    arrived = seen.last.load.arrived_request_count - before.arrived_request_count
    was_busy = arrived or any(one.load.unfinished_request_count for one in seen.since(now - quiet_s))
    if was_busy or not seen.covers(now, quiet_s):
        return 1, HeldBy.COOLDOWN_ZERO
    return 0, HeldBy.NOTHING


def _keep_within(
    _now: float, wanted: int, seen: Observations, settings: ScalingSettings, _changes: Sequence[Change]
) -> _Hold:
    """Bounds hold whatever anybody wishes."""
    bounds = settings.executors
    if wanted < bounds.min:
        return bounds.min, HeldBy.MIN
    if wanted > bounds.max:
        wanted, held_by = bounds.max, HeldBy.MAX
    else:
        held_by = HeldBy.NOTHING
    affordable = affordable_count(bounds, settings.kinds_of_nodes)
    if wanted > affordable:
        return max(bounds.min, int(affordable)), HeldBy.COST
    return wanted, held_by
