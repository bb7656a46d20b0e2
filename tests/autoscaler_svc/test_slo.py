"""Policy `slo`: executors for the times that users see."""

import pytest

from autoscaler_svc.policies.slo import Capacity, Slo
from tests.autoscaler_svc.tables import EXECUTOR, check

# An executor of the tables has 10 slots and steps of 10 ms + 0.1 ms a token. With 100 tokens of prompt and 100 of
# output it has memory for 9.6 requests at once, at 12 ms a step: 1.2 s each, 8 requests/s.
KNOWN = "mean_prompt_token_count 100 mean_output_token_count 100"


def run(table: str, **values) -> None:
    policy = Slo(**{"down_window_s": 0, "utilization": 1.0, "down_margin": 1.0, "wait_share": 1.0, **values})
    check(table, lambda now, seen: policy.wish(now, seen).count)


def test_capacity_is_what_keeps_the_time_per_token():
    """Slots are no measure: with all of them in use each token may come too late."""
    roomy = Capacity.of(EXECUTOR, 100, 100, per_token_s=0.1)
    tight = Capacity.of(EXECUTOR, 100, 100, per_token_s=0.0108)

    assert roomy is not None
    assert tight is not None
    assert roomy.concurrency == pytest.approx(1600 * 0.9 / 150)  # the memory is less than the slots
    assert roomy.requests_per_s == pytest.approx(roomy.concurrency / (100 * (0.01 + roomy.concurrency * 0.0002)))
    assert tight.concurrency == pytest.approx(4)


def test_a_target_out_of_reach_is_no_reason_for_more_executors():
    """No number of them makes one step faster."""
    capacity = Capacity.of(EXECUTOR, 100, 100, per_token_s=0.001)

    assert capacity == Capacity.of(EXECUTOR, 100, 100, per_token_s=1000)


def test_forecast_arrivals_decide_before_they_are_there():
    """Who starts an executor when the queue is there has it when the queue is too long."""
    run(f"""
        t 0  ready 1  requests 5  rate 5   startup_s 30  {KNOWN}  -> 1
        t 1  ready 1  requests 5  rate 20  startup_s 30  {KNOWN}  -> 3
        t 2  ready 3  requests 5  rate 20  startup_s 30  {KNOWN}  -> 3
    """)


def test_a_backlog_that_is_gone_before_an_executor_is_ready_needs_none():
    """One that takes a minute to start is no help for a queue of ten seconds."""
    run(f"""
        t 0  ready 2  requests 80  rate 0  startup_s 60  {KNOWN}  -> 2
        t 1  ready 2  requests 80  rate 0  startup_s 0   {KNOWN}  -> 4
        t 2  ready 2  requests 800  rate 0  startup_s 10  {KNOWN}  -> 25
    """)


def test_plans_to_spend_only_a_part_of_the_target_waiting():
    """Who plans for the whole of it is late in every second case."""
    run(f"t 0  ready 2  requests 50  startup_s 0  {KNOWN}  -> 2")
    run(f"t 0  ready 2  requests 50  startup_s 0  {KNOWN}  -> 4", wait_share=0.25)


def test_somebody_who_waits_longer_than_the_target_gets_one_more():
    """Whatever the model of the load says: it is wrong where users wait."""
    run(f"""
        t 0  ready 1  requests 40  oldest_waiting_s 1  startup_s 60  {KNOWN}  -> 1
        t 1  ready 1  requests 40  oldest_waiting_s 3  startup_s 60  {KNOWN}  -> 2
        t 2  ready 1  starting 1  requests 40  oldest_waiting_s 3  startup_s 60  {KNOWN}  -> 2
    """)


def test_memory_counts_where_contexts_are_long():
    """Ten slots are free, and no room in the cache for what would run in them."""
    run(f"t 0  ready 1  requests 5  running_token_count 3000  {KNOWN}  -> 3")


def test_stays_where_one_less_would_be_too_tight():
    """Down and up again costs a start and a drain, and nobody gains."""
    run(
        f"""
        t 0   ready 3  rate 15  startup_s 30  {KNOWN}  -> 3
        t 1   ready 3  rate 9   startup_s 30  {KNOWN}  -> 2
    """,
        utilization=0.85,
        down_margin=0.8,
    )


def test_goes_down_to_the_most_that_was_needed_in_the_window():
    """A lull between two waves is no lower load."""
    run(
        f"""
        t 0    ready 3  rate 20  startup_s 30  {KNOWN}  -> 3
        t 59   ready 3  rate 1   startup_s 30  {KNOWN}  -> 3
        t 61   ready 3  rate 1   startup_s 30  {KNOWN}  -> 1
    """,
        down_window_s=60,
    )


def test_gaps_longer_than_a_start_need_nobody():
    """One is kept for requests that come more often than an executor could be started."""
    run(f"""
        t 0  ready 1  rate 0.1   startup_s 20  {KNOWN}  -> 1
        t 1  ready 1  rate 0.01  startup_s 20  {KNOWN}  -> 0
    """)


def test_one_executor_finds_out_what_nobody_knows_yet():
    """Before the first step has run there is no speed to plan with."""
    run("""
        t 0  ready 0  requests 0   -> 0
        t 1  ready 0  requests 5   -> 1
        t 2  ready 0  requests 30  -> 2    # sixteen each, it is assumed
        t 3  ready 1  requests 30  step_us 0  token_us 0  -> 3    # by the slots
        t 4  ready 1  requests 0   -> 0
    """)


def test_what_was_known_before_zero_is_known_after():
    """The next wave finds a plan, not a guess."""
    run(f"""
        t 0   ready 1  requests 5  {KNOWN}  -> 1
        t 10  ready 0  requests 0           -> 0
        t 20  ready 0  requests 100  mean_output_token_count 0  -> 4
    """)
