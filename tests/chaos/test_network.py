"""Nothing is lost on the way: each of the three lines of the system is cut, goes dead and gets slow.

The lines are those of the client, of the executors' `Join` calls, and of the scheduler's step streams.
"""

import asyncio
import os

import pytest

from tests.chaos.crowd import of_every_kind
from tests.chaos.house import SCHEDULER
from tests.chaos.proxy import Way
from tests.end_to_end.processes import until

STEP = ("--fake-step-us", "10000")


def on(house, line):
    """The proxies of one kind of line."""
    return {
        "client": [house.client_line],
        "join": list(house.join_lines.values()),
        "attach": list(house.attach_lines.values()),
    }[line]


async def faults_happen(house, line):
    """Let four of the things that networks do happen on a line, for a moment each."""
    dice = house.dice
    faults = [
        lambda proxy: proxy.cut(),
        lambda proxy: proxy.cut_after(dice.randint(1, 2000), Way.THERE),
        lambda proxy: proxy.cut_after(dice.randint(1, 2000), Way.BACK),
        lambda proxy: proxy.drop(),
        lambda proxy: proxy.drop(dice.choice(list(Way))),
        lambda proxy: proxy.delay(dice.uniform(0.1, 0.4)),
    ]
    for fault in dice.sample(faults, 4):
        for proxy in on(house, line):
            fault(proxy)
        await asyncio.sleep(dice.uniform(0.3, 0.6))
        for proxy in on(house, line):
            proxy.heal()
        await asyncio.sleep(dice.uniform(0.1, 0.3))


@pytest.mark.parametrize("line", ["client", "join", "attach"])
async def test_answers_are_whole_whatever_a_line_does(house, line):
    """Between two machines a line is never sure to be there, and a broken one need not say so."""
    await house.start(proxied=True, executor=STEP)
    usual = await house.descriptor_counts()
    crowd = house.crowd(of_every_kind(house.dice, 300))
    await crowd.has_begun()
    await faults_happen(house, line)
    counts = await crowd.recomputation_counts()

    if line != "attach":  # a half-open step stream may keep a result for ever
        assert counts == [0] * len(counts)
    await house.assert_clean(usual)


async def test_lines_that_are_cut_all_day_leave_no_sockets_behind(house):
    """A process that forgets one socket with each broken line ends in a week, at the worst moment."""
    await house.start(proxied=True, executor=STEP)
    usual = await house.descriptor_counts()
    crowd = house.crowd(of_every_kind(house.dice, 250))
    await crowd.has_begun()
    for _ in range(20):
        for proxy in house.lines:
            proxy.cut()
        await asyncio.sleep(house.dice.uniform(0.05, 0.2))
    await crowd.recomputation_counts()

    await house.assert_clean(usual)


async def test_a_cut_step_stream_goes_on_where_it_was(house):
    """A switch that restarts must not cost what is in the caches behind it."""
    await house.start(proxied=True, executor=STEP)
    crowd = house.crowd(of_every_kind(house.dice, 150))
    await crowd.has_begun()
    for proxy in house.attach_lines.values():
        proxy.cut_after(house.dice.randint(1, 500), house.dice.choice(list(Way)))
    counts = await crowd.recomputation_counts()

    assert counts == [0] * len(counts)
    await house.assert_clean()


async def test_an_executor_that_cannot_call_any_more_is_given_up_and_comes_back(house):
    """Its step stream may still be there, but who does not renew a lease has lost its requests to others."""
    await house.start(proxied=True, executor=STEP, scheduler=("--lease", "1"))
    crowd = house.crowd(of_every_kind(house.dice, 250))
    await crowd.has_begun()
    await house.has_work("e0")
    house.join_lines["e0"].drop()
    house.join_lines["e0"].refuse()

    async def is_given_up():
        return await house.services.state_of("e0") is None

    await until(is_given_up, "the lease does not run out")
    house.join_lines["e0"].heal()
    await house.is_ready("e0")
    assert any(await crowd.recomputation_counts())

    await house.assert_clean()


async def test_an_executor_whose_step_stream_is_dead_is_replaced(house):
    """It says that it lives, and no result comes: to the scheduler that is a device that got stuck."""
    await house.start(proxied=True, executor=STEP, scheduler=("--step-timeout", "1"))
    crowd = house.crowd(of_every_kind(house.dice, 250))
    await crowd.has_begun()
    await house.has_work("e0")
    house.attach_lines["e0"].drop()
    exit_code = await house.processes["e0"].exit_code()
    house.attach_lines["e0"].heal()
    await house.restart("e0")
    assert any(await crowd.recomputation_counts())

    assert exit_code == 1
    await house.assert_clean()


async def test_plans_of_a_dead_scheduler_that_arrive_late_change_nothing(house):
    """What was on its way when a process died comes to executors that have a new one, and must not be run."""
    await house.start(proxied=True, executor=STEP)
    crowd = house.crowd(of_every_kind(house.dice, 200))
    await crowd.has_begun()
    for proxy in house.attach_lines.values():
        proxy.delay(2.5, Way.THERE)
    await asyncio.sleep(house.dice.uniform(0.02, 0.1))
    house.kill(SCHEDULER)
    for proxy in house.attach_lines.values():
        proxy.heal()  # for what comes from now on
    await house.restart(SCHEDULER)
    await crowd.recomputation_counts()

    await house.assert_clean()


@pytest.mark.skipif(not os.environ.get("PACELINE_CHAOS_LONG"), reason="takes as long as keepalive does")
@pytest.mark.parametrize("line", ["client", "join", "attach"])
async def test_a_connection_that_a_router_has_forgotten_is_replaced(house, line):
    """Nothing says that it is dead, and new ones would do: only asking over it finds out, after half a minute."""
    await house.start(proxied=True, executor=STEP)
    crowd = house.crowd(of_every_kind(house.dice, 400))
    await crowd.has_begun()
    for proxy in on(house, line):
        proxy.forget()
    await crowd.recomputation_counts()

    await house.assert_clean()
