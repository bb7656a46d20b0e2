"""When blocks run out: everybody gets on, nobody is computed over and over, large and small do not block each other."""

from array import array

import pytest

from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity
from scheduler_svc.core.policies import OVERTAKING_LIMIT, POLICIES, make_policy
from scheduler_svc.core.request import FinishReason, Request
from scheduler_svc.core.scheduler import Scheduler
from tests.scheduler_svc.core.drive import FULL, Drive
from tests.scheduler_svc.core.fleet import Fleet, make_request

HYBRID = (LayerGroup(16), LayerGroup(16, window=128))


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_pool_does_not_thrash(policy, reuse, groups):
    """Ninety requests want five times the pool: preempting one after the other would compute everything twice."""
    drive = Drive(make_policy(policy), groups=groups, blocks=256 if groups is FULL else 400, reuse=reuse)
    for number in range(96):
        drive.add(
            drive.draw.randint(50, 200), drive.draw.randint(100, 400), priority=number % 3, tenant=f"t{number % 2}"
        )
    peak = 0.0
    while drive.scheduler.request_count:
        drive.step()
        peak = max(peak, 1 - drive.executor.cache.pool.free_count / drive.executor.capacity.block_count)

    assert peak > 0.99, "the pool was never full: nothing was tested"
    assert sum(request.placement_count - 1 for request in drive.requests) > 0, "nobody was preempted"
    assert drive.recomputed_share < 0.15


def test_requests_that_grow_far_beyond_their_prompts_are_recomputed_less_than_once():
    """The worst case: two requests outgrow the pool. Each starts only where it can double before it has to go."""
    drive = Drive(blocks=64, reuse=False)
    for _ in range(48):
        drive.add(drive.draw.randint(16, 64), drive.draw.randint(400, 800))
    drive.run()

    assert max(request.placement_count for request in drive.requests) <= 1 + 6  # 16 tokens double 6 times to 864
    assert drive.recomputed_share < 1.0


def test_fifo_lets_nobody_starve():
    """Small requests keep coming; the large one is admitted after a bounded number of them, and runs to its end."""
    drive = Drive(blocks=40, slots=8)
    for _ in range(6):
        drive.add(64, 60)
    for _ in range(3):
        drive.step()
    large = drive.add(480, 60)
    while large.finish_reason is None:
        if len(drive.waiting) < 4:
            drive.add(20, 20)
        drive.step()
        assert drive.step_count < 1500, "the large request starves"

    later = [request for request in drive.requests if request.arrival > large.arrival and request.placed_at is not None]
    overtook = sum(request.placed_at < large.placed_at for request in later)
    assert large.finish_reason is FinishReason.LENGTH
    assert 0 < overtook <= OVERTAKING_LIMIT


def test_the_oldest_request_always_gets_on():
    """Under fifo the oldest that runs is never preempted and has a token in every step: so everybody's turn comes."""
    drive = Drive(blocks=24, slots=16, tokens=64)
    for _ in range(40):
        drive.add(drive.draw.randint(1, 150), drive.draw.randint(1, 150))
    oldest, seen, stalled_for = None, None, 0
    while drive.scheduler.request_count:
        drive.step()
        running = sorted(drive.executor.running, key=lambda request: request.arrival)
        if oldest is not None and oldest.finish_reason is None:
            assert running, "the oldest gave way"
            assert running[0].arrival <= oldest.arrival, "the oldest gave way to a younger one"
        if running:
            now = (running[0], running[0].output_count, running[0].computed_count)
            stalled_for = stalled_for + 1 if now == seen else 0
            assert stalled_for < 4, "the oldest makes no progress"
            seen = now
        oldest = running[0] if running else None

    assert sum(request.placement_count - 1 for request in drive.requests) > 0, "nobody had to give way"


@pytest.mark.parametrize(
    "groups",
    [
        (LayerGroup(4),),
        (LayerGroup(4), LayerGroup(4, window=4)),
        (LayerGroup(2, window=3),),
        (LayerGroup(8), LayerGroup(2, window=2)),
        (LayerGroup(4), LayerGroup(4, chunk=4)),
    ],
    ids=["full", "hybrid", "sliding", "hybrid of unequal blocks", "chunked"],
)
def test_four_blocks_are_enough_to_get_on(groups):
    """Twelve requests over four blocks, with shared beginnings: the smallest cache still serves what fits into it."""
    fleet = Fleet()
    fleet.join("e", Capacity(groups, 4, 4, 8))
    added = 0
    for number in range(60):
        prompt = [*range(1, 2 + number % 7), number]
        request = make_request(f"r{number}", prompt, 1 + number % 5)
        if fleet.scheduler.executors["e"].cache.most_blocks(request.cache_limit) <= 4:
            fleet.add(request)
            added += 1
    fleet.run_all()

    assert added >= 12
    fleet.assert_nothing_is_left()
    fleet.assert_tokens(groups)
    assert all(request.finish_reason is FinishReason.LENGTH for request in fleet.requests)


def test_a_small_executor_does_not_wait_for_a_request_that_it_could_never_hold():
    """Order holds among those who want the same room; who can go where nobody ahead could go may go."""
    scheduler = Scheduler()
    scheduler.join("large", Capacity(FULL, 100, 8, 512))
    scheduler.join("small", Capacity(FULL, 10, 8, 512))
    blocker, large = (Request(name, array("I", range(n, n + 1000)), 1000, 400) for n, name in ((0, "b"), (9, "l")))
    for request in (blocker, large):
        scheduler.add(request)
    scheduler.plan("large", 0.0)
    large.overtaken_count = OVERTAKING_LIMIT
    smalls = [Request(f"s{number}", array("I", [number] * 20), 20, 5) for number in range(4)]
    for request in smalls:
        scheduler.add(request)
    scheduler.plan("small", 0.0)

    assert blocker.executor is scheduler.executors["large"]
    assert large.executor is None
    assert {request.executor for request in smalls} == {scheduler.executors["small"]}


def test_a_sliding_request_holds_no_more_than_its_window():
    """Memory for a long text must not grow with the text: that is what a window is for."""
    group = LayerGroup(16, window=128)
    drive = Drive(groups=(group,), blocks=64, tokens=64)
    drive.add(3000, 600)
    held = 0
    while drive.scheduler.request_count:
        drive.step()
        held = max(held, drive.executor.capacity.block_count - drive.executor.cache.pool.free_count)

    in_flight = 2 * 64  # two chunks, or two tokens
    assert 128 // 16 <= held <= -(-(128 + in_flight) // 16) + 1


def test_a_hybrid_model_holds_more_requests_than_with_full_attention_everywhere():
    """One pool for both kinds of layers: what windows give back serves the others."""

    def most_running(groups, blocks):
        drive = Drive(groups=groups, blocks=blocks, tokens=2048)
        for _ in range(40):
            drive.add(1000, 50)
        most = 0
        while drive.scheduler.request_count:
            drive.step()
            most = max(most, drive.executor.decoding_count)
        return most

    # A quarter of the layers sees everything: its blocks hold three times the tokens. The bytes are the same.
    hybrid = most_running((LayerGroup(48), LayerGroup(16, window=128)), 512)
    full = most_running((LayerGroup(48), LayerGroup(16)), 512)
    assert hybrid > 2 * full
