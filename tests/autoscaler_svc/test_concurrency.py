"""Policy `concurrency`: two windows, as Knative has them."""

from autoscaler_svc.policies.concurrency import Concurrency
from tests.autoscaler_svc.tables import check


def run(table: str, **values) -> None:
    policy = Concurrency(**{"target": 10, "utilization": 1.0, **values})
    check(table, lambda now, seen: policy.wish(now, seen).count)


def test_follows_the_average_of_the_stable_window():
    """One look says little; a minute of them says what the load is."""
    run("""
        t 0   ready 2  requests 20  -> 2
        t 20  ready 2  requests 20  -> 2
        t 40  ready 2  requests 30  -> 3
        t 61  ready 3  requests 38  -> 3
        t 81  ready 3  requests 38  -> 4
    """)


def test_plans_for_less_than_all_of_what_an_executor_can():
    """At 0.7 there is room for those who come while the next executor starts."""
    run("t 0 ready 3 requests 21 -> 3", utilization=0.7)
    run("t 0 ready 3 requests 22 -> 4", utilization=0.7)


def test_panics_when_the_short_window_wants_twice_of_what_there_is():
    """A minute is too long when the load has just grown fivefold."""
    run("""
        t 0   ready 1  requests 5   -> 1
        t 30  ready 1  requests 5   -> 1
        t 37  ready 1  requests 30  -> 3    # twice and more: six seconds are enough
        t 40  ready 3  requests 60  -> 5    # and higher
        t 45  ready 5  requests 0   -> 5    # never down while it lasts
        t 96  ready 5  requests 0   -> 5
        t 99  ready 5  requests 0   -> 2    # a minute after the last such moment; at most by half at once
        t 170 ready 2  requests 0   -> 1
        t 300 ready 1  requests 0   -> 0
    """)


def test_goes_down_by_half_at_most():
    """Nobody knows whether a lull of a minute lasts."""
    run("""
        t 0    ready 8  requests 70  -> 7
        t 100  ready 8  requests 0   -> 4
        t 200  ready 4  requests 0   -> 2
    """)


def test_a_gap_in_what_was_seen_counts_from_the_present():
    """After a time without data there is no average, only what there is now."""
    run("""
        t 0     ready 2  requests 20   -> 2
        t 2000  ready 2  requests 15   -> 2
        t 2001  ready 2  requests 0    -> 1
    """)


def test_from_nothing_the_first_request_is_enough():
    """Zero executors times any rate are zero: the rule has to have a way out."""
    run("""
        t 0  ready 0  requests 0  -> 0
        t 1  ready 0  requests 1  -> 1
    """)
