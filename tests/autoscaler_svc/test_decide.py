"""What becomes of the wishes: the largest wins, within bounds, and not too soon."""

import math

from autoscaler_svc.decide import Change, HeldBy, decide
from autoscaler_svc.observations import Observations
from autoscaler_svc.scaling_file import parse_scaling
from autoscaler_svc.scaling_settings import Bounds, NodeType, ScalingSettings, affordable_count
from tests.autoscaler_svc.tables import check, observe

PER_TEN = "policies: [{kind: threshold, target: 10, down_window: 0}]\n"


def settings(text: str) -> ScalingSettings:
    return parse_scaling(text, "scaling.yaml")


def run(text: str, table: str) -> None:
    """Decide tick by tick, and remember the changes as the loop does."""
    given, changes, last = settings(text), list[Change](), list[int]()

    def wanted(now: float, seen: Observations) -> str:
        decision = decide(now, seen, given, changes)
        before = last[-1] if last else decision.current
        if decision.wanted != before:
            changes.append(Change(now, before, decision.wanted))
        last.append(decision.wanted)
        held = "" if decision.held_by is HeldBy.NOTHING else f" {decision.held_by.value}"
        return f"{decision.wanted}{held}"

    check(table, wanted)


def test_the_largest_wish_wins():
    """Who needs capacity for one reason does not lose it because another rule does not see it."""
    run(
        """
executors: {max: 9}
cooldowns: {down: 0, zero: 0}
policies:
  - {kind: threshold, target: 10, down_window: 0}
  - {kind: threshold, signal: waiting_tokens, target: 100, down_window: 0}
""",
        """
        t 0  ready 2  requests 20  waiting_token_count 0    -> 2
        t 1  ready 2  requests 20  waiting_token_count 500  -> 5
        t 2  ready 2  requests 40  waiting_token_count 50   -> 4
    """,
    )


def test_bounds_hold_whatever_anybody_wishes():
    """They are what the operator has promised somebody who pays."""
    run(
        "executors: {min: 1, max: 4}\ncooldowns: {down: 0, zero: 0}\n" + PER_TEN,
        """
        t 0  ready 2  requests 90  -> 4 max
        t 1  ready 4  requests 0   -> 1 min
        t 2  ready 0  requests 0   -> 1 min
    """,
    )


def test_money_is_a_bound():
    """The cheapest executors that it is enough for; never fewer than the least that was asked for."""
    run(
        "executors: {max: 9, max_cost_per_hour: 2.5}\nnode_types: [{name: local, price_per_hour: 1.0}]\n" + PER_TEN,
        "t 0  ready 2  requests 90  -> 2 max cost per hour",
    )
    types = [NodeType(name="dear", price_per_hour=3.0), NodeType(name="cheap", price_per_hour=1.0, max=2)]
    assert affordable_count(Bounds(max=9, max_cost_per_hour=5.0), types) == 3
    large = [
        NodeType(name="large", price_per_hour=3.0, capacity=4),
        NodeType(name="half", price_per_hour=1, capacity=0.5),
    ]
    assert affordable_count(Bounds(max=9, max_cost_per_hour=6.0), large) == 8
    assert affordable_count(Bounds(max=9), types) == math.inf


def test_nothing_is_taken_away_too_soon_after_a_change():
    """The effect of one change has to be seen before the next; for a change upwards nobody is kept waiting."""
    run(
        "executors: {max: 9}\ncooldowns: {down: 60, zero: 0}\n" + PER_TEN,
        """
        t 0    ready 1  requests 30  -> 3
        t 10   ready 3  requests 10  -> 3 cooldown down
        t 59   ready 3  requests 10  -> 3 cooldown down
        t 60   ready 3  requests 10  -> 1
        t 61   ready 2  requests 50  -> 5
        t 62   ready 5  requests 10  -> 5 cooldown down
    """,
    )


def test_a_cooldown_upwards_spreads_starts_out():
    """Where starts are dear; from nothing nobody waits for it."""
    run(
        "executors: {max: 9}\ncooldowns: {up: 30, down: 0}\n" + PER_TEN,
        """
        t 0   ready 0  requests 10  -> 1
        t 5   ready 1  requests 30  -> 1 cooldown up
        t 36  ready 1  requests 30  -> 3
    """,
    )


def test_the_last_executor_stays_until_nobody_has_come_for_a_while():
    """A start costs the next user its time: a lull is no end."""
    run(
        "executors: {max: 9}\ncooldowns: {down: 0, zero: 120}\n" + PER_TEN,
        """
        t 0    ready 1  requests 0  -> 1 cooldown zero   # nobody knows of before
        t 100  ready 1  requests 1  -> 1
        t 101  ready 1  requests 0  -> 1 cooldown zero
        t 220  ready 1  requests 0  -> 1 cooldown zero
        t 221  ready 1  requests 0  -> 0
        t 222  ready 0  requests 0  -> 0
        t 223  ready 0  requests 1  -> 1
    """,
    )


def test_a_request_that_came_and_went_between_two_looks_counts():
    """Short requests are never seen running; the counter has them."""
    run(
        "executors: {max: 9}\ncooldowns: {down: 0, zero: 60}\n" + PER_TEN,
        """
        t 0    ready 1  requests 0  arrived_request_count 5  -> 1 cooldown zero
        t 50   ready 1  requests 0  arrived_request_count 6  -> 1 cooldown zero
        t 61   ready 1  requests 0                           -> 1 cooldown zero
        t 111  ready 1  requests 0                           -> 0
    """,
    )


def test_who_runs_keeps_a_place():
    """Whatever a rule for something else says: the others could not hold them."""
    run(
        "executors: {max: 9}\ncooldowns: {down: 0, zero: 0}\n"
        "policies: [{kind: threshold, signal: waiting_requests, target: 10, down_window: 0}]\n",
        """
        t 0  ready 4  requests 25  -> 3 running requests   # ten slots each
        t 1  ready 4  requests 5  held 60  -> 3 running requests   # 240 blocks, of which each has 100
        t 2  ready 1  requests 1  held 1   -> 1 running requests
        t 3  ready 0  requests 1  -> 1
    """,
    )


def test_work_without_a_wish_still_gets_an_executor():
    """A rule that looks at what runs never sees who waits at zero."""
    run(
        "executors: {max: 9}\ncooldowns: {down: 0, zero: 0}\n"
        "policies: [{kind: threshold, signal: running_requests, target: 10, down_window: 0}]\n",
        """
        t 0  ready 0  requests 5  -> 1 work is there
        t 1  ready 0  requests 0  -> 0
    """,
    )


def test_without_data_everything_stays():
    """Not knowing is no reason for anything."""
    run(
        "executors: {max: 9}\npolicies: [{kind: threshold, signal: backlog_seconds, target: 1}]\n",
        "t 0  ready 3  requests 9  backlog_token_count 10  backlog_s 0  -> 3 no data",
    )


def test_a_decision_says_what_it_saw_and_why():
    """An operator who asks why there are nine executors reads it in one line."""
    seen = Observations()
    seen.add(observe({"t": 0, "ready": 2, "requests": 90}))

    decision = decide(0, seen, settings("executors: {max: 4}\n" + PER_TEN))

    assert decision.seen == "70 waiting, 20 running, 2 ready, 0 of 0 blocks"
    assert decision.reason == (
        "threshold requests wants 6: requests 90 for 2, target 10 each; 9 but for the step limit"
    )
