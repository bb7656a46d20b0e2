"""What each policy promises, held by driving the scheduler for thousands of steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.core.policies import Fair, Policy, make_policy
from scheduler_svc.core.request import FinishReason
from tests.scheduler_svc.core.drive import Drive


def service_gap(policy: Policy, sizes: dict[str, tuple[int, int]], *, weights=(1.0, 2.0), slots=4, steps=1500) -> float:
    """The largest difference in weighted service between tenants who always have work waiting.

    `sizes` are (prompt, output) tokens of each tenant's requests.
    """
    drive = Drive(policy, slots=slots, blocks=400, tokens=256, reuse=False)
    served = dict.fromkeys(sizes, 0.0)
    charged, worst = set(), 0.0
    for _ in range(steps):
        for tenant, (prompt, output) in sizes.items():
            for _ in range(sum(r.tenant == tenant for r in drive.waiting), 2 * slots + 2):
                drive.add(prompt, output, tenant=tenant)
        outputs = drive.step()
        for request in drive.requests:
            if request.placed_at is not None and request not in charged:
                charged.add(request)
                served[request.tenant] += weights[0] * request.prompt_count
        for request, _ in outputs.tokens if outputs else ():
            served[request.tenant] += weights[1]
        worst = max(worst, max(served.values()) - min(served.values()))
        drive.requests = [r for r in drive.requests if r.finish_reason is None or r not in charged]
    assert min(served.values()) > 0
    return worst


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 60)), min_size=2, max_size=4),
    slots=st.integers(1, 6),
)
def test_fair_keeps_tenants_with_work_waiting_within_its_bound(sizes, slots):
    """Whoever sends larger, or more, requests gets no more: the difference stays below a constant, for ever."""
    policy = Fair()
    tenants = {f"t{number}": size for number, size in enumerate(sizes)}
    longest_prompt = max(prompt for prompt, _ in sizes)
    running_output_count = slots * max(output for _, output in sizes)

    assert service_gap(policy, tenants, slots=slots, steps=600) <= policy.service_bound(
        longest_prompt, running_output_count
    )


def test_fair_counts_a_prompt_once_whatever_the_number_of_its_choices():
    """Choices share their prompt; a tenant that asks for eight has still sent one."""
    policy = Fair()
    drive = Drive(policy, slots=3, reuse=True)
    drive.add(50, 10, choices=8, tenant="many")
    drive.run()

    assert policy.served["many"] == 50 + 8 * 10 * policy.output_weight


def test_without_fair_the_gap_grows_for_ever():
    """The bound means something: first come, first served breaks it, and by as much as one lets it run."""
    sizes = {"small": (10, 5), "large": (300, 50)}
    bound = Fair().service_bound(300, 4 * 50)

    assert service_gap(Fair(), sizes) <= bound
    assert service_gap(make_policy("fifo"), sizes) > 3 * bound


def test_a_tenant_that_was_away_has_saved_nothing_up():
    """Otherwise one who comes back after a night would shut everybody else out until it has caught up."""
    drive = Drive(Fair(), slots=1, reuse=False)
    for _ in range(50):
        drive.add(50, 2, tenant="busy")
    for _ in range(60):
        drive.step()
    for _ in range(20):
        drive.add(50, 2, tenant="back")
    before = len(drive.requests) - len(drive.waiting)
    placed = []
    while len(placed) < 12:
        drive.step()
        placed = sorted((r for r in drive.requests if r.placed_at is not None), key=lambda r: r.attempt)[before:]

    tenants = [request.tenant for request in placed[:12]]
    assert 5 <= tenants.count("back") <= 7


def test_the_counters_of_tenants_who_are_gone_are_forgotten():
    """Anybody may invent tenants; a counter for each of them would fill memory."""
    policy = Fair()
    drive = Drive(policy, slots=4)
    for number in range(2000):
        drive.add(4, 1, tenant=f"once-{number}")
        if number % 4 == 3:
            drive.step()
    drive.run()

    assert len(policy.served) < 300


def test_priority_runs_the_more_urgent_first_and_everybody_in_the_end():
    """An urgent request does not wait for what is not; what is not urgent is late, and not lost."""
    drive = Drive(make_policy("priority"), slots=2, blocks=64)
    background = [drive.add(30, 200) for _ in range(6)]
    for _ in range(20):
        drive.step()
    urgent = [drive.add(30, 10, priority=5) for _ in range(4)]
    started = drive.step_count
    while any(request.finish_reason is None for request in urgent):
        drive.step()

    assert drive.step_count - started < 4 * 10 + 20
    drive.run()
    assert all(request.finish_reason is FinishReason.LENGTH for request in background)


def test_a_displaced_request_is_displaced_by_larger_priorities_only():
    """Two equal priorities would throw each other out for ever."""
    drive = Drive(make_policy("priority"), slots=1)
    for _ in range(5):
        drive.add(20, 30, priority=3)
        drive.step()
    drive.run()

    assert all(request.placement_count == 1 for request in drive.requests)


def deadlines_met(policy: Policy) -> tuple[int, Drive]:
    """An overloaded executor, requests with more or less time: how many end in time."""
    drive = Drive(policy, slots=4, blocks=400, tokens=64, seconds=0.1)
    for _ in range(40):  # so that it knows its own speed
        drive.add(8, 4)
        drive.step()
    drive.run()
    for _ in range(150):
        drive.add(
            drive.draw.randint(8, 60), drive.draw.randint(5, 40), deadline=drive.now + drive.draw.uniform(2.0, 60.0)
        )
    drive.run()
    return sum(r.finish_reason is FinishReason.LENGTH for r in drive.requests[40:]), drive


def test_deadline_finishes_more_requests_in_time_than_fifo():
    """That is what it is for: work that comes too late anyway does not keep others from coming in time."""
    met, _ = deadlines_met(make_policy("deadline"))
    met_by_fifo, _ = deadlines_met(make_policy("fifo"))

    assert met > 1.2 * met_by_fifo


def test_deadline_sheds_early_and_only_what_is_hopeless():
    """A user who cannot be served in time learns it in time to go elsewhere."""
    drive = Drive(make_policy("deadline"), slots=4, blocks=400, tokens=64, seconds=0.1)
    for _ in range(40):
        drive.add(8, 4)
        drive.step()
    drive.run()
    hopeless = drive.add(64 * 60, 4, deadline=drive.now + 2)  # sixty steps of a tenth of a second
    feasible = drive.add(64, 4, deadline=drive.now + 2)
    unbounded = drive.add(64, 1000, deadline=drive.now + 2, length_is_bounded=False)
    asked_at = drive.now
    drive.step()

    assert drive.expired == [hopeless]
    assert hopeless.finish_reason is FinishReason.DEADLINE
    assert drive.now - asked_at < 0.5
    drive.run()
    assert feasible.finish_reason is FinishReason.LENGTH
    assert unbounded.output_count > 1, "its first token was in time, and nobody knows how many it needs"


def test_deadline_lets_running_requests_without_one_give_way():
    """A job for the night holds every slot; somebody who has a second must not wait until it is through."""
    drive = Drive(make_policy("deadline"), slots=2, seconds=0.01)
    background = [drive.add(20, 400) for _ in range(2)]
    for _ in range(30):
        drive.step()
    urgent = drive.add(20, 10, deadline=drive.now + 1.0)
    drive.run()

    assert urgent.finish_reason is FinishReason.LENGTH
    assert [request.finish_reason for request in background] == [FinishReason.LENGTH] * 2
    assert sum(request.placement_count - 1 for request in background) == 1


def test_deadline_does_not_judge_a_choice_by_a_prompt_that_another_computes():
    """The second of two choices has nothing to compute but its own tokens; it comes in time when the first does."""
    drive = Drive(make_policy("deadline"), tokens=16, seconds=0.1)
    drive.add(16 * 20, 4)
    drive.run()
    request = drive.add(16 * 40, 4, choices=2, deadline=drive.now + 5.5)  # its prompt takes four seconds
    drive.run()

    assert [choice.finish_reason for choice in request.choices] == [FinishReason.LENGTH] * 2


def test_a_preempted_request_is_judged_by_what_is_left_of_it():
    """Most of its work is done and in the cache; the moment by which it had to start at all is long past."""
    drive = Drive(make_policy("deadline"), tokens=16, seconds=0.1)
    drive.add(16 * 20, 4)
    drive.run()
    request = drive.add(16 * 30, 20, deadline=drive.now + 6.0)  # three seconds of prompt, two of output
    while request.output_count < 5:
        drive.step()
    drive.scheduler._placement.preempt(drive.executor, request)
    drive.run()

    assert request.placement_count == 2
    assert request.finish_reason is FinishReason.LENGTH


def test_deadline_learns_again_after_a_bad_spell():
    """A device was slow while it warmed up; that must not be held against requests for ever."""
    drive = Drive(make_policy("deadline"), seconds=25.0)
    drive.add(20, 20)
    drive.run()
    drive._seconds = 0.02
    drive.now += 60
    requests = []
    for _ in range(5):
        requests.append(drive.add(20, 3, deadline=drive.now + 1.0))
        drive.run()

    assert {request.finish_reason for request in requests} == {FinishReason.LENGTH}


def test_deadline_sheds_nobody_before_it_knows_how_fast_it_is():
    """The first steps of an executor are slow; refusing work by them would refuse work that could be done."""
    drive = Drive(make_policy("deadline"), seconds=5.0)
    request = drive.add(40, 1, deadline=8.0)
    drive.step()
    drive.step()

    assert not drive.expired
    assert request.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("name", "weights", "complaint"),
    [
        ("lifo", (1, 1), "policy must be one of fifo, prefill_first, priority, deadline, fair, got 'lifo'"),
        ("fair", (0, 1), "the input weight of policy 'fair' must be above 0 and finite, got 0"),
        ("fair", (1, float("nan")), "the output weight of policy 'fair' must be above 0 and finite, got nan"),
    ],
)
def test_a_policy_that_is_none_is_refused_with_the_choices(name, weights, complaint):
    """A mistyped policy must not mean first come, first served in silence."""
    with pytest.raises(ValueError, match=complaint):
        make_policy(name, input_weight=weights[0], output_weight=weights[1])
