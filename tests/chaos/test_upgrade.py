"""A release is exchanged for the next, process by process, while everybody streams."""

import asyncio

from tests.chaos.crowd import of_every_kind
from tests.chaos.house import SCHEDULER
from tests.end_to_end.processes import until


async def test_a_rolling_restart_of_everything_costs_nobody_anything(house):
    """Upgrades happen every week, on purpose, in the middle of the day: they must be no event at all."""
    await house.start(scheduler=("--drain-timeout", "0"), executor=("--fake-step-us", "15000"))
    usual = await house.descriptor_counts()
    first = dict(house.processes)
    supervising = asyncio.create_task(house.supervise())
    crowd = house.crowd(of_every_kind(house.dice, 500))
    await crowd.has_begun()
    for name in house.executors:
        await house.services.drain(name)
        leaver = house.processes[name]
        assert await leaver.exit_code() == 0

        async def is_back(name=name, leaver=leaver):
            return house.processes[name] is not leaver

        await until(is_back, f"{name} is not started again")
        await house.is_ready(name)
    house.processes[SCHEDULER].terminate()
    counts = await crowd.recomputation_counts()
    supervising.cancel()

    assert all(house.processes[name] is not process for name, process in first.items())
    assert sum(counts) > 0, "nobody was in the way"
    await house.assert_clean(usual)
