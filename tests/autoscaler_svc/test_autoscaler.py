"""The loop, with a scheduler and an actuator that are simple and real enough to be wrong."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from autoscaler_svc.actuators.actuator import ActuatorError, Launched, NoRoomError
from autoscaler_svc.autoscaler import Autoscaler, explain
from autoscaler_svc.decide import HeldBy
from autoscaler_svc.fleet_client import FleetError
from autoscaler_svc.load import ExecutorLoad, ExecutorState, PoolLoad
from autoscaler_svc.scaling_file import parse_scaling

FILE = """
executors: {max: 3}
policies: [{kind: threshold, target: 10, down_window: 0}]
cooldowns: {down: 0, zero: 5}
times: {finish: 10, startup_limit: 60}
"""


class House:
    """A scheduler and an actuator in virtual time: executors are ready some seconds after their launch, and leave the
    fleet when they are drained.
    """

    def __init__(self, text: str = FILE) -> None:
        self.now = 1000.0
        self.startup_s = 4.0
        self.requests = 0
        self.arrived_count = 0
        self.may = True
        self.answers: Iterator[bool] | None = None  # of the next questions whether it may act
        self.launch_takes: asyncio.Event | None = None  # to be set when launches are to be answered
        self.asked_count = 0
        self.survivors = False  # terminated executors go on
        self.launch_error: Exception | None = None
        self.list_error: Exception | None = None
        self.launched: dict[str, float] = {}
        self.retired: set[str] = set()
        self.draining: set[str] = set()
        self.done: list[str] = []
        self.told: list[tuple[int, float]] = []
        self.autoscaler = self.start(text)

    def start(self, text: str = FILE) -> Autoscaler:
        """An autoscaler that knows nothing of the one before."""
        self.autoscaler = Autoscaler(
            parse_scaling(text, "f"), self, self, clock=self.clock, wall=lambda: 1.7e9 + self.now
        )
        return self.autoscaler

    def clock(self) -> float:
        """Time passes while one looks, too."""
        self.now += 1e-6
        return self.now

    # --- the scheduler ---

    @property
    def may_act(self) -> bool:
        return self.may if self.answers is None else next(self.answers, False)

    def show(self, wanted, reason, changed_at, cost_per_hour):
        self.shown = wanted, reason

    def tell(self, starting_count: int, next_ready_s: float) -> None:
        self.told.append((starting_count, next_ready_s))

    async def drain(self, executor_id: str, finish_within_s: float) -> None:
        if executor_id not in self.ready():
            raise FleetError(f"{executor_id} is not there")
        assert executor_id in self.retired, "drained before whoever restarts it was told"
        self.draining.add(executor_id)
        self.done.append(f"drain {executor_id}")

    def ready(self) -> Sequence[str]:
        return [name for name, at in self.launched.items() if self.now - at >= self.startup_s]

    def load(self) -> PoolLoad:
        executors = tuple(
            ExecutorLoad(name, ExecutorState.DRAINING if name in self.draining else ExecutorState.READY, slot_count=10)
            for name in self.ready()
        )
        running = min(self.requests, 10 * sum(e.state is ExecutorState.READY for e in executors))
        return PoolLoad(
            model="m",
            epoch=1,
            waiting_request_count=self.requests - running,
            running_request_count=running,
            arrived_request_count=self.arrived_count,
            executors=executors,
        )

    # --- the actuator ---

    async def list(self) -> Sequence[Launched]:
        if self.list_error:
            raise self.list_error
        return [
            Launched(name, name.split("-")[0], self.now - at, is_retired=name in self.retired)
            for name, at in self.launched.items()
        ]

    async def launch(self, node_type: str) -> str:
        self.asked_count += 1
        if self.launch_error:
            raise self.launch_error
        if self.launch_takes:
            await self.launch_takes.wait()
        name = f"{node_type}-{len(self.done)}"
        self.launched[name] = self.now
        self.done.append(f"launch {name}")
        return name

    async def retire(self, executor_id: str) -> None:
        self.retired.add(executor_id)

    async def terminate(self, executor_id: str) -> None:
        if not self.survivors:
            self.launched.pop(executor_id, None)
        self.done.append(f"terminate {executor_id}")

    async def close(self) -> None:
        pass

    # --- time ---

    async def pass_time(self, seconds: int, requests: int | None = None) -> Sequence[str]:
        """Look once a second; returns what was done."""
        if requests is not None:
            self.arrived_count += max(0, requests - self.requests)
            self.requests = requests
        before = len(self.done)
        for _ in range(seconds):
            self.now += 1
            for name in list(self.draining):  # it had nothing left
                self.draining.discard(name)
                self.launched[name] = float("inf")  # its process has ended, the actuator still lists it
            await self.autoscaler.look(self.load())
        return self.done[before:]


async def test_follows_the_load_up_and_down_to_nothing():
    """The whole way: from nothing to the limit, back, and to nothing, with every executor drained before its end."""
    house = House()

    assert await house.pass_time(3, requests=0) == []
    up = await house.pass_time(10, requests=25)
    assert [line.split()[0] for line in up] == ["launch"] * 3
    assert len(house.ready()) == 3
    down = await house.pass_time(10, requests=8)
    assert sorted(line.split()[0] for line in down) == ["drain", "drain", "terminate", "terminate"]
    assert [line.split()[0] for line in await house.pass_time(10, requests=0)] == ["drain", "terminate"]
    assert not house.launched


async def test_without_the_right_to_act_nothing_is_done():
    """Two autoscalers must not fight: the second one watches."""
    house = House()
    house.may = False

    assert await house.pass_time(5, requests=30) == []
    house.may = True
    assert len(await house.pass_time(1)) == 3


async def test_an_unknown_load_changes_nothing():
    """A scheduler that restarts is no reason to end its executors."""
    house = House()
    await house.pass_time(10, requests=25)
    before = list(house.done)

    for _ in range(100):
        house.now += 1
        assert await house.autoscaler.look(None) is None

    assert house.done == before
    assert house.autoscaler.decision is None


async def test_an_autoscaler_that_comes_back_goes_on():
    """What it has to know stands with the scheduler and the actuator."""
    house = House()
    await house.pass_time(10, requests=25)
    house.start()

    assert await house.pass_time(10) == []
    assert [line.split()[0] for line in await house.pass_time(10, requests=0)] != []


async def test_errors_of_the_actuator_are_said_once_and_tried_again():
    """A cloud that refuses for an hour makes one line, not thousands; when it gives again, it is asked again."""
    house = House()
    house.launch_error = ActuatorError("no quota")

    with capture_logs() as logs:
        await house.pass_time(20, requests=5)
    errors = [line for line in logs if line["event"] == "the actuator failed"]
    assert [line["reason"] for line in errors] == ["no quota"] * len(errors)
    assert len(errors) == 1
    assert house.autoscaler.hands.counts.by_outcome["launch", "error"] <= 3  # after pauses of 5 and 10 s
    house.launch_error = None
    assert await house.pass_time(40) != []


async def test_an_actuator_that_does_not_list_changes_nothing_that_is_known():
    """What it said last stands: else everybody would be launched again."""
    house = House()
    await house.pass_time(10, requests=25)
    house.list_error = ActuatorError("the API server is away")

    assert await house.pass_time(10) == []
    assert house.autoscaler.hands.errors == {"list": "the API server is away"}
    house.list_error = None
    await house.pass_time(1)
    assert house.autoscaler.hands.errors == {}


async def test_launches_nothing_by_an_old_list():
    """What was just launched is not on it: it would be launched again with every look."""
    house = House(FILE.replace("max: 3", "max: 9"))
    await house.pass_time(10, requests=15)
    house.list_error = ActuatorError("timed out")

    assert await house.pass_time(60, requests=80) == []
    house.list_error = None
    assert [line.split()[0] for line in await house.pass_time(1)] == ["launch"] * 4  # which is the step limit


async def test_the_age_of_an_executor_is_no_start():
    """Learnt as one it would be the horizon of every forecast, and deadlines of hours would be refused by it."""
    house = House()
    await house.pass_time(10, requests=25)
    house.now += 5000
    house.draining.clear()
    launched, house.launched = house.launched, dict.fromkeys(house.launched, house.now + 3)  # all were killed
    house.start()
    house.list_error = ActuatorError("not yet")
    await house.pass_time(3)
    house.list_error, house.launched = None, launched
    await house.pass_time(10)

    assert house.autoscaler.startup.typical_s == 0


async def test_a_slow_launch_is_asked_for_once_and_holds_up_nobody():
    """A cloud takes ten seconds to answer, and the load has changed by then."""
    house = House()
    house.launch_takes = asyncio.Event()

    await house.pass_time(3, requests=8)
    assert house.asked_count == 1
    assert house.autoscaler.decision.wanted == 1
    house.launch_takes.set()
    await house.pass_time(1)
    assert len(house.launched) == 1


async def test_what_was_begun_is_not_done_by_somebody_who_may_not_any_more():
    """Another autoscaler acts by now."""
    house = House()
    house.answers = iter([True])  # when the round looks; no longer when the action does

    assert await house.pass_time(1, requests=8) == []


async def test_an_executor_that_takes_long_to_die_is_counted_once():
    """Each look ends it again; pauses that grew with each would stop every launch."""
    house = House()
    house.startup_s = 1e9
    house.survivors = True
    await house.pass_time(1, requests=8)
    await house.pass_time(100)

    assert house.autoscaler.hands.counts.never_ready == 1


async def test_no_room_is_counted_as_what_it_is():
    """A full quota is for whoever pays, a broken API for whoever runs it."""
    house = House()
    house.launch_error = NoRoomError("at most 2")
    await house.pass_time(2, requests=30)

    assert house.autoscaler.hands.counts.by_outcome["launch", "no room"] >= 1


async def test_learns_how_long_a_start_takes_and_tells_the_scheduler():
    """The scheduler refuses at once what cannot be ready in time; forecasts look that far ahead."""
    house = House()
    assert (await house.pass_time(1, requests=0), house.told[-1]) == ([], (0, 0.0))
    await house.pass_time(10, requests=8)
    assert house.autoscaler.startup.typical_s == pytest.approx(4, abs=1)

    await house.pass_time(20, requests=0)
    assert house.told[-1] == (0, house.autoscaler.startup.least_s)
    await house.pass_time(2, requests=8)
    starting_count, next_ready_s = house.told[-1]
    assert starting_count == 1
    assert 0 < next_ready_s < house.autoscaler.startup.least_s


async def test_every_decision_stands_in_the_log_with_its_reason():
    """An operator reads there why there are three, and what kept it from being six."""
    house = House()
    with capture_logs() as logs:
        await house.pass_time(1, requests=0)
        await house.pass_time(3, requests=60)

    decided = [line for line in logs if line["event"] == "decided"]
    assert [line["wanted"] for line in decided] == [0, 3]
    assert decided[-1]["held_by"] == "max"
    assert "requests 60 for 0, target 10 each" in decided[-1]["reason"]
    assert house.autoscaler.decision_counts["up", "max"] == 1


async def test_what_executors_cost_counts_from_their_launch():
    """Starts and drains are paid for, whoever is served by them."""
    house = House(FILE + "node_types: [{name: local, price_per_hour: 3600.0}]\n")
    await house.pass_time(12, requests=5)

    assert house.autoscaler.cost.executor_seconds["local"] == pytest.approx(11, abs=1)
    assert house.autoscaler.cost.cost["local"] == house.autoscaler.cost.executor_seconds["local"]
    assert house.autoscaler.cost.per_hour == 3600


async def test_another_file_is_gone_by_at_once():
    """Somebody who raises `max` in a rush does not restart anything."""
    house = House()
    await house.pass_time(30, requests=60)
    house.autoscaler.change_settings(parse_scaling(FILE.replace("max: 3", "max: 5"), "f"))

    assert len(await house.pass_time(1)) == 2


async def test_only_one_who_acts_is_kept_without_a_restart():
    """Half of the executors in one cloud and half in another would be nobody's wish."""
    house = House()
    other = FILE + "actuator: {kind: kubernetes, deployments: {a: b}}\n"
    house.autoscaler.change_settings(parse_scaling(other, "f"))

    assert house.autoscaler.settings.actuator.kind == "processes"


def test_explains_what_would_be_done_without_doing_it():
    """Before a file goes live: what would it do now?"""
    settings = parse_scaling("executors: {max: 9}\npolicies: [{kind: threshold, target: 10}]", "f")
    load = replace(House().load(), waiting_request_count=30)

    decision = explain(settings, load, 0, 1.7e9)

    assert (decision.wanted, decision.held_by, decision.current) == (3, HeldBy.NOTHING, 0)
