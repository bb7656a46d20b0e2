"""Nothing dies with a process: each is killed or suspended in each phase of its life, while answers are read.

Every test sends requests of every kind, greedy ones, ones with a seed, with stop strings and with several choices, and
holds each answer to that of an undisturbed run, token by token. `PACELINE_CHAOS_LONG=1` adds the combinations for which
there is no time in a run on every change.
"""

import asyncio
import os

import pytest

from paceline.v1 import fleet_pb2
from tests.chaos.crowd import of_every_kind
from tests.chaos.house import SCHEDULER
from tests.end_to_end.processes import until

IS_LONG = bool(os.environ.get("PACELINE_CHAOS_LONG"))
STEP = ("--fake-step-us", "10000")
SMALL_STEPS = (*STEP, "--max-num-batched-tokens", "64")
EVERYTHING = (SCHEDULER, "e0", "e1")


async def loading(house, names):
    """They were killed in the middle of answers, and have not come back yet."""
    crowd = await decoding(house, names)
    house.kill(*names)
    house.start_again(*names)
    await asyncio.sleep(house.dice.uniform(0, 0.6))
    return crowd


async def coming_back(house, names):
    """They were killed in the middle of answers, and have just begun to be again what they were."""
    crowd = await decoding(house, names)
    house.kill(*names)
    house.start_again(*names)
    for name in names:
        await house.processes[name].has_printed("scheduler ready" if name == SCHEDULER else "executor ready")
    await asyncio.sleep(house.dice.uniform(0, 0.2))
    return crowd


async def reading_prompts(house, names):
    """Long prompts are being read in many chunks, and not every request has a token."""
    crowd = house.crowd(of_every_kind(house.dice, 60, rounds=1, prompt_length=3000))
    await house.has_work("e0", "e1")
    await asyncio.sleep(house.dice.uniform(0, 0.3))
    assert any(not reader.token_count for reader in crowd.readers), "the prompts are too short"
    return crowd


async def decoding(house, names):
    """All requests are in the middle of their answers."""
    crowd = house.crowd(of_every_kind(house.dice, 120))
    await crowd.has_begun(house.dice.randint(3, 30))
    await house.has_work("e0", "e1")
    return crowd


async def draining(house, names):
    """They were told to end in good order, and have requests yet."""
    crowd = await decoding(house, names)
    for name in names:
        house.processes[name].terminate()
        await house.processes[name].has_printed("draining")
    await asyncio.sleep(house.dice.uniform(0, 0.2))
    return crowd


# What is killed at once, one after the other, in which phase of its life.
KILLS = {
    loading: [("e0",), (SCHEDULER,), EVERYTHING],
    coming_back: [("e0",), (SCHEDULER,), (SCHEDULER, "e0")],
    reading_prompts: [("e0",), (SCHEDULER,), (SCHEDULER, "e0")],
    decoding: [("e0",), (SCHEDULER,), (SCHEDULER, "e0"), ("e0", "e1")],
    draining: [("e0",), (SCHEDULER,)],
}
if IS_LONG:
    KILLS = dict.fromkeys(KILLS, (("e0",), (SCHEDULER,), (SCHEDULER, "e0"), ("e0", "e1"), EVERYTHING))


@pytest.mark.parametrize("phase", KILLS, ids=lambda phase: phase.__name__)
async def test_answers_are_whole_whatever_is_killed(house, phase):
    """The promise of the whole: a user sees a pause, then the same stream, no token lost and none repeated."""
    await house.start(executor=SMALL_STEPS)
    usual = await house.descriptor_counts()
    for names in KILLS[phase]:
        print(f"{phase.__name__}: {names}")
        crowd = await phase(house, names)
        house.kill(*names)
        await asyncio.sleep(house.dice.uniform(0, 0.3))
        await house.restart(*names)
        await crowd.recomputation_counts()

        await house.assert_clean(usual)


async def test_a_restarted_scheduler_takes_over_what_executors_have_computed(house):
    """A new release of the scheduler must not cost a fleet of GPUs everything in their caches."""
    await house.start(executor=STEP)
    crowd = house.crowd(of_every_kind(house.dice, 150))
    await crowd.has_begun()
    before = await house.services.executors()
    house.kill(SCHEDULER)
    await house.restart(SCHEDULER)
    counts = await crowd.recomputation_counts()
    after = await house.services.executors()

    assert counts == [0] * len(counts)
    assert {name: executor.incarnation for name, executor in after.items()} == {
        name: executor.incarnation for name, executor in before.items()
    }
    await house.assert_clean()


async def test_a_scheduler_hands_over_to_its_next_start(house):
    """A rollout need not wait for answers that take minutes: they go on in the next process."""
    await house.start(executor=STEP, scheduler=("--drain-timeout", "0"))
    crowd = house.crowd(of_every_kind(house.dice, 150))
    await crowd.has_begun()
    house.processes[SCHEDULER].terminate()
    exit_code = await house.processes[SCHEDULER].exit_code()
    assert not crowd.is_done
    await house.restart(SCHEDULER)
    counts = await crowd.recomputation_counts()

    assert exit_code == 0
    assert counts == [0] * len(counts)
    await house.assert_clean()


async def test_an_executor_that_an_operator_drains_may_be_killed_meanwhile(house):
    """Patience runs out: what is still there when somebody pulls the plug goes on elsewhere."""
    await house.start(executor=STEP)
    crowd = house.crowd(of_every_kind(house.dice, 120))
    await crowd.has_begun()
    await house.has_work("e0")
    await house.services.drain("e0", finish_within_s=60)

    async def drains():
        return await house.services.state_of("e0") == fleet_pb2.EXECUTOR_STATE_DRAINING

    await until(drains, "e0 does not drain")
    house.kill("e0")
    await house.restart("e0")
    await crowd.recomputation_counts()

    await house.assert_clean()


async def test_answers_are_whole_when_processes_freeze_and_thaw(house):
    """A paused virtual machine comes back and believes that no time has passed: what it says must not count twice."""
    await house.start(scheduler=("--lease", "1"), executor=STEP)
    usual = await house.descriptor_counts()
    for names in (("e0",), EVERYTHING):
        crowd = house.crowd(of_every_kind(house.dice, 250))
        await crowd.has_begun()
        for name in names:
            house.processes[name].suspend()
        await asyncio.sleep(house.dice.uniform(1.6, 2.5))  # longer than the lease
        for name in names:
            house.processes[name].resume()
        assert not crowd.is_done
        await crowd.recomputation_counts()

        await house.assert_clean(usual)


async def test_a_zombie_does_not_take_its_place_back(house):
    """Two processes of one name, each sure to be the one: the later has the place, and the earlier changes nothing."""
    await house.start(scheduler=("--lease", "1"), executor=STEP)
    crowd = house.crowd(of_every_kind(house.dice, 250))
    await crowd.has_begun()
    zombie = house.processes["e0"]
    zombie.suspend()

    async def is_given_up():
        return await house.services.state_of("e0") is None

    await until(is_given_up, "the lease does not run out")
    await house.start_executor("e0", *STEP, "--listen", house.services.address_of("second"))
    await house.is_ready("e0")
    successor = (await house.services.executors())["e0"].incarnation
    zombie.resume()
    counts = await crowd.recomputation_counts()

    assert any(counts)
    assert (await house.services.executors())["e0"].incarnation == successor
    await house.assert_clean()
