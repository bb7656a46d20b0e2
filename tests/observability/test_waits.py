"""What the trace says that a request waited for."""

import asyncio
from array import array
from dataclasses import replace

from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.obstacles import A_STRONGER_CLAIM, Obstacle
from scheduler_svc.core.plan import Capacity, Result
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.request import Request
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.observation.waits import ITS_EXECUTOR, QueueWatch, Wait
from tests.observability.test_overview import read
from tests.system import FAST, request, started, until

SLOW = replace(FAST, fake_step_us=20_000)


def causes(system, request_id):
    """What each of its times in the queue was for."""
    observer = system.app.engine.observer
    spans = observer.spans(observer.find(request_id))
    return [span.attributes.get("paceline.queue.waited_for", ()) for span in spans if span.name == "queue"]


async def waited_behind(config, first, second):
    """What `second` waited for while `first` ran, as its trace says."""
    async with started(executor=config) as system:
        reading = asyncio.ensure_future(read(system, first))
        await until(lambda: any(executor.running for executor in system.scheduler.executors.values()))
        await read(system, second)
        await reading
        (waited_for,) = causes(system, second.request_id)
        account = observer_account(system, second.request_id)
    return waited_for, account


def observer_account(system, request_id):
    observer = system.app.engine.observer
    return observer.spans(observer.find(request_id))[0].attributes["paceline.account"]


async def test_who_finds_no_slot_waited_for_one():
    """The way out is `--max-num-seqs`, and more cache would not help."""
    waited_for, account = await waited_behind(
        replace(SLOW, max_num_seqs=1),
        request("first", 20, request_id="a", ignore_eos=True),
        request("second", 2, request_id="b"),
    )

    assert waited_for[0] == "a slot"
    assert any(" for a slot" in sentence for sentence in account)


async def test_who_waits_behind_the_prompt_of_another_waited_for_the_tokens_of_the_step():
    """Slots and cache are free then, and four seconds in the queue look like a fault."""
    waited_for, _ = await waited_behind(
        replace(SLOW, max_num_batched_tokens=8, fake_block_count=256),
        request("x" * 300, 2, request_id="a"),
        request("y", 2, request_id="b"),
    )

    assert waited_for[0] == "the step's tokens"


async def test_who_finds_the_cache_full_waited_for_its_blocks():
    """More memory helps, and more slots would only preempt."""
    waited_for, _ = await waited_behind(
        replace(SLOW, fake_block_count=12),
        request("x" * 20, 24, request_id="a", ignore_eos=True),
        request("y" * 20, 2, request_id="b"),
    )

    assert waited_for[0] == "blocks of the cache"


async def test_who_finds_nobody_waited_for_an_executor():
    """Nothing that is set on this scheduler would have helped."""
    async with started(1, lease_s=0.5) as system:
        await read(system, request("before", 2, request_id="before"))
        (task,) = system.tasks
        task.cancel()
        await until(lambda: not system.scheduler.executors)
        reading = asyncio.ensure_future(read(system, request("hello", 2, request_id="r")))
        await until(lambda: system.app.engine.find("r", 0) is not None)
        while_it_waits = causes(system, "r")
        system.add_executor(name="e1")
        await reading
        told = causes(system, "r")

    assert while_it_waits in ([("an executor",)], [()])  # not a moment had passed
    assert told == [("an executor",)]


async def test_who_is_placed_at_once_waited_for_nothing_worth_a_word():
    """A cause for a moment in the queue would be looked into."""
    async with started(1) as system:
        await read(system, request("hello", 2, request_id="r"))
        account = observer_account(system, "r")

    assert not any(f"for {cause.value}" in sentence for cause in list(Obstacle)[1:] for sentence in account)


def test_who_is_too_large_for_all_that_are_there_waits_for_a_larger_one():
    """It is not the number of executors that it lacks."""
    scheduler = Scheduler()
    scheduler.expect(Capacity((LayerGroup(4),), 64, 8, 64))
    scheduler.add(Request("r", array("I", range(100)), 100, 20))

    assert scheduler.obstacle is Obstacle.EXECUTOR
    scheduler.join("small", Capacity((LayerGroup(4),), 8, 8, 64))
    assert scheduler.obstacle is Obstacle.LARGER
    assert scheduler.plan("small", 0.0) is None
    assert scheduler.obstacle is Obstacle.LARGER
    scheduler.join("large", Capacity((LayerGroup(4),), 64, 8, 64))
    assert scheduler.obstacle is Obstacle.STEP
    assert scheduler.plan("large", 0.0) is not None
    assert scheduler.obstacle is None


def ran(scheduler, step_count):
    """So many steps of the only executor."""
    for _ in range(step_count):
        while scheduler.plan("e", 0.0) is not None:
            pass
        plan = scheduler.executors["e"].in_flight[0]
        scheduler.apply("e", Result(plan.step, [65] * len(plan.rows)))


def test_who_gives_way_knows_for_what():
    """A cache that is short and a request that goes first are mended in different places."""
    short = Scheduler()
    displaced = Scheduler(make_policy("priority"))
    for scheduler in (short, displaced):
        scheduler.join("e", Capacity((LayerGroup(4),), 8, 8, 64))
        scheduler.add(Request("old", array("I", range(4)), 4, 24))
    short.add(Request("young", array("I", range(100, 104)), 4, 24))
    ran(short, 16)
    ran(displaced, 3)
    displaced.add(Request("strong", array("I", range(100, 124)), 24, 4, priority=5))
    ran(displaced, 1)

    assert [(one.request_id, one.gave_way_for) for one in short.preempted] == [("young", Obstacle.BLOCKS.value)]
    assert [(one.request_id, one.gave_way_for) for one in displaced.preempted] == [("old", A_STRONGER_CLAIM)]


def test_a_wait_is_for_what_stood_in_the_way_longest():
    """Of several causes the first to be named is the first to be removed; what was there for a moment is none."""
    watch = QueueWatch()
    watch.note(0.0, Obstacle.SLOT)
    wait = Wait(watch, 10.0, awaits_executor=True)
    wait.move(11.0, awaits_executor=False)
    watch.note(13.0, Obstacle.STEP)
    watch.note(13.01, Obstacle.BLOCKS)

    assert wait.causes(19.01) == ("blocks of the cache", "a slot", ITS_EXECUTOR)
    assert wait.end(12.0 + 2.0) == ("a slot", ITS_EXECUTOR, "blocks of the cache")
    watch.note(100.0, None)
    assert wait.causes(200.0) == ("a slot", ITS_EXECUTOR, "blocks of the cache")
    assert Wait(watch, 150.0, awaits_executor=False).causes(160.0) == ()
