"""A request that kills whoever computes it, among many that do not."""

import asyncio

import pytest

from paceline import ServerError
from tests.chaos.crowd import of_every_kind

DEADLY = "é".encode()[0]  # the fake model never says it by itself


async def test_a_request_that_kills_executors_kills_two_and_nobody_elses_answer(house):
    """One bad request must not go through the fleet like a plague; those beside it see two pauses."""
    await house.start(executor=("--fake-step-us", "10000", "--fake-deadly-token", str(DEADLY)))
    supervising = asyncio.create_task(house.supervise())
    crowd = house.crowd(of_every_kind(house.dice, 150))
    await crowd.has_begun()
    with pytest.raises(ServerError, match="is given up: 2 executors in a row died while they computed it") as caught:
        await house.client.generate("plague é", max_output_tokens=20, stream=False)
    await crowd.recomputation_counts()
    supervising.cancel()
    deaths = [process for process in house.services.processes if process.has_ended]

    assert caught.value.code.name == "INTERNAL"
    assert len(deaths) == 2
    await house.assert_clean()
