"""What is done so that there are as many executors as are wanted."""

import pytest

from autoscaler_svc.actuators.actuator import Launched
from autoscaler_svc.load import ExecutorLoad, ExecutorState, PoolLoad
from autoscaler_svc.reconcile import Drain, Launch, Pauses, Sightings, Terminate, actions, standing
from autoscaler_svc.scaling_file import parse_scaling

READY, DRAINING = ExecutorState.READY, ExecutorState.DRAINING
CLOUD = "actuator: {kind: ray, command: [x]}\n"
SETTINGS = "executors: {max: 4}\ntimes: {startup_limit: 100, finish: 10}\n"
PRICED = SETTINGS + CLOUD


class Pool:
    """A pool at one moment, and what is done about it."""

    def __init__(self, text: str = SETTINGS, now: float = 1000.0) -> None:
        self.settings = parse_scaling(text, "scaling.yaml")
        self.now = now
        self.launched: list[Launched] = []
        self.executors: list[ExecutorLoad] = []
        self.sightings = Sightings(began_at=0.0)
        self.pauses = Pauses()
        self.startup_s = 10.0

    def has(self, name: str, state: ExecutorState | None = READY, *, age_s: float = 50.0, **values) -> "Pool":
        """An executor of ours, joined in that state, or not yet where that is None."""
        of_launch = {key: values.pop(key) for key in ("is_running", "is_retired", "last_failure") if key in values}
        self.launched.append(Launched(name, values.pop("node_type", "local"), age_s, **of_launch))
        if state is not None:
            self.executors.append(ExecutorLoad(name, state, token_us=1000.0, **values))
        return self

    def at(self, seconds: float) -> "Pool":
        """Later, with nothing changed but the ages."""
        later = self.now + seconds
        self.launched = [
            Launched(
                one.executor_id, one.node_type, one.age_s + seconds, one.is_running, one.is_retired, one.last_failure
            )
            for one in self.launched
        ]
        self.now = later
        return self

    def do(self, wanted: int) -> list[str]:
        load = PoolLoad(executors=tuple(self.executors))
        self.sightings.look(self.now, load, self.launched)
        there = standing(self.now, load, self.launched, self.sightings, self.settings, self.startup_s)
        doing = actions(self.now, wanted, load, there, self.sightings, self.pauses, self.settings)
        return [f"{type(one).__name__.lower()} {getattr(one, 'executor_id', '') or one.node_type}" for one in doing]


def test_starts_what_is_missing_and_no_more():
    """Those that are on their way count: else each look would start them again."""
    assert Pool().do(3) == ["launch local"] * 3
    assert Pool().has("a").has("b", None, age_s=1).do(3) == ["launch local"]
    assert Pool().has("a").has("b", None, age_s=1).do(2) == []


def test_never_more_than_max_whatever_is_wanted():
    """An executor that is late is no capacity; it still costs money and takes its place."""
    pool = Pool().has("a").has("b", None, age_s=40).has("c", None, age_s=40)

    assert pool.do(4) == ["launch local"]  # three are missing, one place is left


def test_executors_that_somebody_else_started_count():
    """They do the work; they are just not ours to end."""
    pool = Pool()
    pool.executors.append(ExecutorLoad("stranger"))

    assert pool.do(1) == []
    assert pool.do(2) == ["launch local"]
    assert pool.do(0) == []


def test_gives_up_those_that_have_not_started_before_those_that_work():
    """A running executor has requests and a warm cache, one that loads has nothing."""
    pool = Pool().has("a").has("old", None, age_s=9).has("young", None, age_s=2)

    assert pool.do(2) == ["terminate young"]
    assert pool.do(1) == ["terminate young", "terminate old"]
    assert pool.do(0) == ["terminate young", "terminate old", "drain a"]


def test_drains_the_one_with_the_least_to_lose():
    """Running tokens move and cached prefixes are computed again: both cost seconds."""
    pool = (
        Pool()
        .has("busy", running_token_count=500, running_request_count=3)
        .has("warm", useful_token_count=300)
        .has("idle")
    )

    assert pool.do(2) == ["drain idle"]
    assert pool.do(1) == ["drain idle", "drain warm"]


def test_weighs_what_is_lost_against_the_money():
    """Of two that have as little to do the dear one goes; a little more work on it is worth its price."""
    text = PRICED + "node_types: [{name: dear, price_per_hour: 4.0}, {name: cheap, price_per_hour: 1.0}]\n"

    assert Pool(text).has("a", node_type="cheap").has("b", node_type="dear").do(1) == ["drain b"]
    assert Pool(text).has("a", node_type="cheap", running_token_count=100).has(
        "b", node_type="dear", running_token_count=300
    ).do(1) == ["drain b"]
    assert Pool(text).has("a", node_type="cheap", running_token_count=100).has(
        "b", node_type="dear", running_token_count=500
    ).do(1) == ["drain a"]


def test_ends_an_executor_only_when_it_has_left_the_fleet():
    """Drained first, ended then: nothing is lost with it."""
    leaving = Pool().has("a").has("b", DRAINING, is_retired=True)
    assert leaving.do(1) == []

    gone = Pool().has("a").has("b", None, is_retired=True)
    assert gone.do(1) == ["terminate b"]


def test_goes_on_with_a_drain_that_another_autoscaler_began():
    """It died between telling the actuator and telling the scheduler."""
    assert Pool().has("a").has("b", is_retired=True).do(1) == ["drain b"]


def test_an_executor_that_comes_back_after_its_drain_is_ended():
    """Kubernetes starts a container again that has ended: it would join, drain and end for ever."""
    pool = Pool().has("a").has("b", DRAINING, is_retired=True)
    assert pool.do(1) == []
    pool.executors[1] = ExecutorLoad("b", READY)
    assert pool.do(1) == ["terminate b"]


def test_a_drain_that_does_not_end_is_ended():
    """An executor that hangs would be paid for for ever; what it has left moves."""
    pool = Pool().has("a").has("b", DRAINING, is_retired=True)
    assert pool.do(1) == []
    assert pool.at(39).do(1) == []
    assert pool.at(2).do(1) == ["terminate b"]


def test_an_executor_that_an_operator_drains_is_replaced_and_not_disturbed():
    """`paceline fleet drain` is somebody's wish too."""
    assert Pool().has("a").has("b", DRAINING).do(2) == ["launch local"]


def test_an_executor_that_is_late_does_not_count_and_is_replaced_at_its_limit():
    """Somebody has to serve while the first one hangs; and two that hang are not better than one."""
    pool = Pool().has("a", None, age_s=25)
    assert pool.do(1) == []
    assert pool.at(10).do(1) == ["launch local"]  # three times the usual: no longer counted on
    pool.has("b", None, age_s=1)
    assert pool.do(1) == []
    assert pool.at(70).do(1) == ["terminate a", "launch local"]


def test_a_process_that_stays_dead_is_replaced_sooner():
    """Nobody starts it any more; its limit is for those that load."""
    pool = Pool().has("a", None, age_s=5, is_running=False, last_failure="ended with exit code 1")
    assert pool.do(1) == []
    assert pool.at(31).do(1) == ["terminate a", "launch local"]


def test_an_executor_that_comes_back_has_its_time_again():
    """It was ready an hour ago, was killed, and loads its model once more: not stuck for an hour."""
    pool = Pool().has("a", age_s=3600)
    assert pool.do(1) == []
    pool.executors.clear()
    assert pool.at(20).do(1) == []
    assert pool.at(90).do(1) == ["terminate a", "launch local"]


def test_an_autoscaler_that_has_just_begun_ends_nobody_for_being_old():
    """It has not seen when the executor was in the fleet last."""
    pool = Pool().has("a", None, age_s=3600)
    pool.sightings = Sightings(began_at=pool.now - 5)

    assert "terminate a" not in pool.do(1)


def pause_again(pool: Pool) -> float:
    pool.pauses.begin_round()
    return pool.pauses.note_failure("spot", pool.now)


def test_an_executor_that_never_attaches_is_no_capacity_for_ever():
    """It has joined, and the scheduler cannot reach it: a wrong address, a network policy."""
    pool = Pool().has("a", ExecutorState.CONNECTING, age_s=5)
    assert pool.do(1) == []
    assert pool.at(31).do(1) == ["launch local"]
    assert pool.at(70).do(1) == ["terminate a", "launch local"]


def test_executors_of_before_are_not_late_for_an_autoscaler_that_has_just_begun():
    """Scheduler and autoscaler were restarted together: executors join again within seconds."""
    pool = Pool().has("a", None, age_s=3600).has("b", None, age_s=3600)
    pool.sightings = Sightings(began_at=pool.now)

    assert pool.do(2) == []


def test_those_that_leave_still_take_their_place():
    """Their name, their GPU and their price are free when they are gone."""
    pool = Pool().has("a").has("b", DRAINING, is_retired=True).has("c", DRAINING, is_retired=True)

    assert pool.do(4) == ["launch local"]


def test_money_is_not_spent_twice():
    """The cheap ones pause, and the dear ones would cost four times what is allowed."""
    text = PRICED.replace("{max: 4}", "{max: 9, max_cost_per_hour: 4}") + (
        "node_types: [{name: spot, price_per_hour: 1.0}, {name: dear, price_per_hour: 4.0}]\n"
    )
    pool = Pool(text)
    pool.pauses.note_failure("spot", pool.now)

    assert pool.do(4) == ["launch dear"]


def test_node_types_pause_after_failures_and_others_take_their_place():
    """A cloud without GPUs of one kind today may have another kind; asking in a loop helps nobody."""
    text = PRICED + "node_types: [{name: spot, price_per_hour: 1.0}, {name: sure, price_per_hour: 3.0}]\n"
    pool = Pool(text)
    assert pool.do(1) == ["launch spot"]

    assert pool.pauses.note_failure("spot", pool.now) == 5
    assert pool.do(1) == ["launch sure"]
    assert pool.at(6).do(1) == ["launch spot"]
    assert [pause_again(pool) for _ in range(7)] == [10, 20, 40, 80, 160, 300, 300]
    assert pool.pauses.note_failure("spot", pool.now) == 0  # of the same round: one failure, not two
    pool.pauses.note_ready("spot")
    assert pool.do(1) == ["launch spot"]


def test_capacity_counts_and_not_heads():
    """A large node does the work of several small ones, and is not taken away for the surplus of one."""
    text = PRICED.replace("max: 4", "max: 9") + "node_types: [{name: a}, {name: big, capacity: 4, price_per_hour: 1}]\n"

    assert Pool(text).has("x", node_type="big").do(4) == []
    assert Pool(text).has("x", node_type="big").do(6) == ["launch a", "launch a"]
    assert Pool(text).has("x", node_type="big").has("y", node_type="a").do(3) == ["drain y"]
    assert Pool(text).has("x", node_type="big").has("y", node_type="a").do(1) == ["drain x"]


@pytest.mark.parametrize("wanted", range(5))
def test_what_was_done_settles(wanted):
    """Level-triggered: when it is done nothing is left to do, wherever it began."""
    pool = Pool().has("a", running_token_count=5).has("b", None, age_s=3).has("c")
    for turn in range(6):
        for action in pool.do(wanted):
            verb, name = action.split()
            if verb == "launch":
                pool.has(f"new{turn}{len(pool.launched)}")
            else:
                pool.launched = [one for one in pool.launched if one.executor_id != name]
                pool.executors = [one for one in pool.executors if one.executor_id != name]

    assert len(pool.launched) == wanted
    assert pool.do(wanted) == []


def test_actions_say_why():
    """They stand in the log as they are."""
    assert Launch("local", "2 wanted, 1 there").why
    assert Drain("a", "1 wanted, 2 there").executor_id == "a"
    assert Terminate("a", "has drained").why
