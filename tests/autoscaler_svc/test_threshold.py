"""Policy `threshold`: the rule that people know from Kubernetes, line by line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler_svc.policies.threshold import StepLimit, Threshold, total
from tests.autoscaler_svc.tables import check, observe

FREE = StepLimit(count=10_000)


def policy(**values) -> Threshold:
    return Threshold(**{"target": 10, "down_window_s": 0, "up": FREE, "down": FREE, **values})


def run(table: str, **values) -> None:
    one = policy(**values)
    check(table, lambda now, seen: one.wish(now, seen).count)


def test_keeps_the_target_on_each_executor():
    """`ceil(total / target)`: the number that people work out by hand."""
    run("""
        t 0  ready 2  requests 33   -> 4
        t 1  ready 4  requests 33   -> 4
        t 2  ready 4  requests 12   -> 2
        t 3  ready 2  requests 0    -> 0
        t 4  ready 0  requests 0    -> 0
        t 5  ready 0  requests 1    -> 1   # from nothing there is no ratio, and somebody waits
        t 6  ready 0  requests 25   -> 3
    """)


def test_what_is_nearly_right_is_left_alone():
    """Without a tolerance each request that comes or goes would move an executor."""
    run("""
        t 0  ready 10  requests 109  -> 10
        t 1  ready 10  requests 111  -> 12
        t 2  ready 10  requests 91   -> 10
        t 3  ready 10  requests 89   -> 9
        t 4  ready 2   starting 1  requests 32  -> 3   # who is starting counts
    """)


def test_going_down_waits_for_the_whole_window():
    """The highest of the last five minutes holds: load that comes in waves does not make executors come and go."""
    run(
        """
        t 0    ready 4  requests 40  -> 4
        t 100  ready 4  requests 10  -> 4
        t 299  ready 4  requests 10  -> 4
        t 301  ready 4  requests 10  -> 1
        t 302  ready 4  requests 25  -> 3
        t 303  ready 3  requests 10  -> 3
    """,
        down_window_s=300,
    )


def test_going_up_waits_for_its_window_too():
    """Whoever pays by the start asks for a load that stays."""
    run(
        """
        t 0   ready 1  requests 10  -> 1
        t 10  ready 1  requests 50  -> 1
        t 29  ready 1  requests 30  -> 1
        t 31  ready 1  requests 60  -> 3   # the lowest of the last 30 s
    """,
        up_window_s=30,
    )


def test_history_that_is_shorter_than_the_window_takes_nothing_away():
    """An autoscaler that has just been restarted knows nothing of the peak a minute ago."""
    run(
        """
        t 1000  ready 4  requests 10  -> 4
        t 1200  ready 4  requests 10  -> 4
        t 1301  ready 4  requests 10  -> 1
    """,
        down_window_s=300,
    )


def test_steps_are_limited_each_way():
    """At most twice as many, or four more, within 15 s; the other way as the file says."""
    run(
        """
        t 0   ready 1  requests 900  -> 5
        t 1   ready 5  requests 900  -> 5    # the four of this period are there
        t 15  ready 5  requests 900  -> 5
        t 16  ready 5  requests 900  -> 10
        t 24  ready 20  requests 200  -> 20
        t 40  ready 20  requests 10  -> 18
        t 41  ready 18  requests 10  -> 18
        t 56  ready 18  requests 10  -> 16
    """,
        up=StepLimit(),
        down=StepLimit(count=2, percent=0),
    )


def test_a_clock_that_jumps_changes_nothing_by_itself():
    """Back: what was seen is forgotten. Forward: the window is empty, and the present alone would be acted upon."""
    run(
        """
        t 5000  ready 4  requests 40  -> 4
        t 100   ready 4  requests 10  -> 4   # nothing is known of before
        t 401   ready 4  requests 10  -> 1
    """,
        down_window_s=300,
    )


@pytest.mark.parametrize(
    ("signal", "line", "wanted"),
    [
        ("waiting_requests", "t 0 ready 1 requests 35", 3),  # ten of them run
        ("running_requests", "t 0 ready 3 requests 25", 3),
        ("waiting_tokens", "t 0 ready 1 waiting_token_count 31", 4),
        ("tokens", "t 0 ready 1 waiting_token_count 25 running_token_count 16", 5),
        ("backlog_seconds", "t 0 ready 2 backlog_token_count 9 backlog_s 30", 6),
    ],
)
def test_signals_are_what_their_names_say(signal, line, wanted):
    """A target is chosen for a signal; another one would make it meaningless."""
    run(f"{line} -> {wanted}", signal=signal)


def test_the_share_of_blocks_is_an_average_over_the_caches():
    """0.8 of the memory in use means the same with any number of executors."""
    run(
        """
        t 0  ready 2  held 90   -> 3
        t 1  ready 2  held 82   -> 2
        t 2  ready 4  held 20   -> 1
    """,
        signal="block_share",
        target=0.8,
    )


def test_an_unknown_signal_wants_no_change():
    """A backlog of unknown length is neither nothing nor everything."""
    run("t 0 ready 2 backlog_token_count 900 backlog_s 0 -> -", signal="backlog_seconds")
    assert math.isnan(total(observe({"t": 0, "ready": 1, "backlog_token_count": 9}).load, "backlog_seconds"))


def test_a_signal_that_is_no_number_wants_no_change():
    """Zero traffic has made other autoscalers divide by it, and stay where they were for ever."""
    run(
        """
        t 0  ready 2  waiting_token_count 20   -> 2
        t 1  ready 2  waiting_token_count nan  -> -
        t 2  ready 2  waiting_token_count 10   -> 1
    """,
        signal="waiting_tokens",
    )


@given(st.integers(0, 50), st.floats(0, 1e6), st.floats(0.01, 1e4))
def test_what_is_wanted_is_enough_and_not_one_too_many(count, requests, target):
    """Within the tolerance, and to the executor."""
    seen = observe({"t": 0, "ready": count, "waiting": requests})

    wanted = policy(target=target, signal="waiting_requests").recommend(seen)

    assert wanted is not None
    assert wanted * target * 1.1 + 1e-3 >= requests
    assert wanted == count or (wanted - 1) * target <= requests * 1.000001
