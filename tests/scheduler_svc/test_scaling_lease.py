"""One autoscaler acts at a time."""

from scheduler_svc.scaling_lease import LEASE_S, ScalingLease


def test_one_holds_it_until_it_stops_calling():
    """Two that scale one fleet would undo what the other does, for ever."""
    lease = ScalingLease()

    assert lease.take("a", 0.0)
    assert not lease.take("b", LEASE_S - 0.1)
    assert lease.take("a", LEASE_S - 0.1)
    assert lease.holder(LEASE_S) == "a"
    assert lease.take("b", 2 * LEASE_S)
    assert not lease.take("a", 2 * LEASE_S)


def test_who_gives_it_back_keeps_nobody_waiting():
    """An upgrade of the autoscaler costs no pause; another one cannot give it back for it."""
    lease = ScalingLease()
    lease.take("a", 0.0)

    lease.give_back("b", 1.0)
    assert not lease.take("b", 1.0)
    lease.give_back("a", 1.0)
    assert lease.take("b", 1.0)


def test_a_restarted_scheduler_waits_for_who_may_still_hold_it():
    """It does not know whom its earlier life had granted it a moment before."""
    lease = ScalingLease(grants_from=10.0)

    assert not lease.take("a", 9.9)
    assert lease.opens_in_s(9.0) == 1.0
    assert lease.take("a", 10.0)


def test_says_how_long_the_next_executor_takes_at_least():
    """What cannot be met is told at once; what is not known is no reason to refuse."""
    lease = ScalingLease()
    assert lease.least_wait_s(0.0) == 0.0
    lease.take("a", 0.0)
    assert lease.least_wait_s(1.0) == 0.0
    lease.take("a", 1.0, next_ready_s=8.0)
    assert lease.least_wait_s(3.0) == 8.0  # it is not being started yet
    lease.take("a", 4.0, starting_count=1, next_ready_s=7.0)
    assert lease.least_wait_s(6.0) == 5.0
    assert lease.least_wait_s(9.1) == 0.0  # the autoscaler is gone: nobody knows
