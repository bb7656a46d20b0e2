"""What is counted when requests end, and of those that wait."""

import asyncio
import math
import time
from dataclasses import replace

import pytest

from paceline.v1 import inference_pb2
from scheduler_svc.core.request import RequestState
from scheduler_svc.engine import EARLY_S
from scheduler_svc.load import load_of
from scheduler_svc.load_meter import LoadWatcher
from tests.observability.test_losses import Scene
from tests.system import FAST, request, started, until

SLOW = replace(FAST, fake_step_us=20_000)


@pytest.mark.parametrize(
    ("left_s", "outcome"),
    [(-1.0, "deadline"), (EARLY_S / 2, "deadline"), (3600.0, "cancelled"), (math.inf, "cancelled")],
)
async def test_a_call_that_ends_with_its_deadline_has_missed_it(left_s, outcome):
    """The end of the call and the engine's own timer are a race; a missed deadline must not look like a user's whim."""
    scene = Scene("a")
    submitted = scene.submit()
    scene.step("a")
    submitted.deadline = time.monotonic() + left_s
    answers = scene.engine.answers
    answers.leave(answers.read(answers["r"], {}))
    await scene.engine.durable()

    assert dict(scene.meter.outcome_counts) == {outcome: 1}
    assert scene.timeline.summary.outcome == outcome


async def test_a_request_that_is_cancelled_by_id_is_cancelled_however_late():
    """Who says so means it: only the silent end of a call is open to doubt."""
    scene = Scene("a")
    scene.submit().deadline = time.monotonic() + EARLY_S / 2
    scene.engine.cancel_id("r")
    await scene.engine.durable()

    assert dict(scene.meter.outcome_counts) == {"cancelled": 1}


async def test_a_request_that_ends_in_the_queue_had_nothing_looked_up():
    """The share of reused tokens says whether the cache is large enough; a full queue must not change it."""
    async with started(executor=replace(SLOW, max_num_seqs=1)) as system:
        running = asyncio.ensure_future(drained(system, request("x" * 7, 20, request_id="runs", ignore_eos=True)))
        await until(lambda: (one := system.app.engine.find("runs", 0)) is not None and one.output_count)
        waiting = [asyncio.ensure_future(drained(system, request("y" * 50, 20, request_id=f"w{n}"))) for n in range(3)]
        await until(lambda: system.scheduler.waiting_count == 3)
        for number in range(3):
            await system.inference.Cancel(inference_pb2.CancelRequest(request_id=f"w{number}"))
        await asyncio.gather(running, *waiting, return_exceptions=True)
        await system.idle()
        meter, pages = system.app.engine.meter, system.app.metrics().collect()
        told = {one.name: one.samples[0].value for one in pages if one.name.startswith("paceline_prompt_tokens")}

    assert dict(meter.outcome_counts) == {"length": 1, "cancelled": 3}
    assert told == {"paceline_prompt_tokens_arrived": 157, "paceline_prompt_tokens_placed": 7}
    assert meter.mean_lengths == (7.0, 20.0), "nor what an autoscaler expects of others"


async def drained(system, message):
    async for _ in system.generate(message):
        pass


async def test_who_waits_again_waits_since_it_lost_its_place():
    """An alert that a long answer was let in long ago wakes people for nothing."""
    for lose in (lambda scene: scene.engine.lost(scene.links["a"]), hand_over):
        scene = Scene("a")
        scene.submit()
        scene.step("a")
        assert scene.engine.oldest_waiting_at() is None
        before = time.monotonic()
        lose(scene)
        since = scene.engine.oldest_waiting_at()
        scene.submit("later")

        assert scene.engine.scheduler.waiting_count == 2
        assert before <= since <= time.monotonic()
        assert scene.engine.oldest_waiting_at() == since, "it still is the one that waits longest"


def hand_over(scene):
    link = scene.links["a"]
    scene.engine.drain(link)
    scene.engine.hand_over(link)
    while link.plans:
        scene.step("a")


async def test_the_one_that_waits_longest_need_not_be_the_oldest():
    """Who was let in first may have run until now; who came after it has waited since."""
    scene = Scene("a")
    accepted = {}
    for number in range(20):
        submitted = scene.submit(f"r{number}")
        accepted[submitted] = scene.timeline.accepted_at
    waits = [at for one, at in accepted.items() if one.state is RequestState.WAITING]
    before = scene.engine.oldest_waiting_at()
    scene.engine.lost(scene.links["a"])

    assert 0 < len(waits) < 20
    assert before == scene.engine.oldest_waiting_at() == waits[0]


async def test_who_has_ended_is_not_waited_for():
    """A figure that stays up after the queue is empty is an alert that never ends."""
    scene = Scene()
    for name in ("a", "b"):
        scene.submit(name)
    first, second = scene.engine.oldest_waiting_at(), scene.timeline.accepted_at
    scene.engine.cancel_id("a")
    await scene.engine.durable()
    then = scene.engine.oldest_waiting_at()
    scene.engine.cancel_id("b")
    await scene.engine.durable()

    assert (first <= second, then) == (True, second)
    assert scene.engine.oldest_waiting_at() is None
    assert not scene.engine._waiting._since


@pytest.mark.parametrize(("at_door_s", "queued_s"), [(100, 1), (1, 100), (100, None), (None, 100)])
async def test_whoever_waits_longest_is_told_be_it_at_the_door_or_in_the_queue(at_door_s, queued_s):
    """After a restart there may be a queue before there is an executor, and a door too."""
    async with started(0) as system:
        engine, now = system.app.engine, time.monotonic()
        engine.arrivals.held_since = lambda *_: None if at_door_s is None else now - at_door_s
        engine.oldest_waiting_at = lambda: None if queued_s is None else now - queued_s
        load = load_of("fake", system.app.fleet, engine, LoadWatcher())

    assert load.oldest_waiting_ms >= 100_000
