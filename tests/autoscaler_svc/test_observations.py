"""What is remembered of the pool, and for how long."""

from autoscaler_svc.load import PoolLoad
from autoscaler_svc.observations import LONGEST_WINDOW_S, Observation, Observations
from tests.autoscaler_svc.tables import observe


def seen_for(seconds: int, interval_s: float = 1.0) -> Observations:
    seen = Observations()
    for number in range(int(seconds / interval_s) + 1):
        seen.add(Observation(at=number * interval_s, load=PoolLoad()))
    return seen


def test_the_longest_window_is_covered_when_it_is_over():
    """A window of an hour that never ended would keep executors for ever."""
    assert not seen_for(3590).covers(3590, LONGEST_WINDOW_S)
    for seconds in (3600, 3700, 9000):
        assert seen_for(seconds).covers(seconds, LONGEST_WINDOW_S), seconds


def test_memory_is_bounded_however_often_one_looks():
    """Ten looks a second for a day are no reason to grow."""
    seen = seen_for(4 * 3600, 0.1)

    assert len(seen) <= 300 / 0.1 + 3600 / 10 + 10
    assert [one.at for one in seen] == sorted(one.at for one in seen)
    assert seen.since(seen.last.at - 60) == list(seen)[-601:]


def test_the_speed_is_remembered_when_nobody_is_there_any_more():
    """The first wave of the morning finds a plan, not a guess."""
    seen = Observations()
    known = observe({"t": 0, "ready": 1, "mean_output_token_count": 10})
    seen.add(known)
    seen.add(observe({"t": 9000, "ready": 0}))

    assert seen.with_speed is known


def test_half_an_executor_is_one():
    """Rounded to none it would be drained without a cooldown."""
    assert Observation(at=0, load=PoolLoad(), starting_count=1, capacity=0.5).executor_count == 1
    assert Observation(at=0, load=PoolLoad(), starting_count=1, capacity=1.0).executor_count == 1
    assert Observation(at=0, load=PoolLoad(), starting_count=3, capacity=2.5).executor_count == 3
