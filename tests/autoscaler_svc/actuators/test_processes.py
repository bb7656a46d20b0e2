"""The actuator against a launcher that is served over a socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from autoscaler_svc.actuators.actuator import Actuator, ActuatorError, NoRoomError
from autoscaler_svc.actuators.processes import ProcessActuator
from paceline_cli.launcher import launching
from paceline_cli.supervisor import ChildCommand, Supervisor
from tests.paceline_cli.conftest import Recorder

SLEEP = ("sleep", "600")


@pytest.fixture
def supervisor(tmp_path: Path):
    supervisor = Supervisor([], Recorder())
    commands = [ChildCommand(f"executor-{index}", SLEEP) for index in range(2)]
    with launching(supervisor, commands, address_in(tmp_path)):
        yield supervisor
        supervisor.kill()


@pytest_asyncio.fixture
async def actuator(supervisor: Supervisor, tmp_path: Path) -> AsyncIterator[Actuator]:
    actuator = ProcessActuator(address_in(tmp_path))
    yield actuator
    await actuator.close()


def address_in(folder: Path) -> str:
    return f"unix:{folder}/launcher.sock"


async def test_executors_are_launched_retired_and_terminated(actuator: Actuator, supervisor: Supervisor):
    """The whole life of an executor, as the autoscaler lives it."""
    name = await actuator.launch("local")
    (launched,) = await actuator.list()
    await actuator.retire(name)
    (retired,) = await actuator.list()
    await actuator.terminate(name)
    while await actuator.list():
        supervisor.watch()
        await asyncio.sleep(0.01)

    assert name == launched.executor_id == "executor-0"
    assert launched.is_running
    assert launched.node_type == "local"
    assert 0 <= launched.age_s < 60
    assert (launched.is_retired, retired.is_retired) == (False, True)


async def test_naming_one_that_is_gone_is_no_error(actuator: Actuator):
    """A repeated wish must be harmless: an autoscaler repeats what it is not sure of."""
    await actuator.retire("executor-1")
    await actuator.terminate("executor-1")

    assert list(await actuator.list()) == []


async def test_a_full_machine_is_told_from_a_failure(actuator: Actuator):
    """No room means to try another node type; a failure means to try again."""
    for _ in range(2):
        await actuator.launch("")

    with pytest.raises(NoRoomError, match="all 2 executors"):
        await actuator.launch("")


async def test_a_refusal_keeps_the_words_of_the_launcher(actuator: Actuator):
    """They are what a person reads in the autoscaler's log."""
    with pytest.raises(ActuatorError, match="no node type 'h100'") as refusal:
        await actuator.launch("h100")

    assert not isinstance(refusal.value, NoRoomError)


async def test_a_launcher_that_is_not_there_is_an_actuator_error(tmp_path: Path):
    """The autoscaler goes on and tries again; any other exception would end it."""
    actuator = ProcessActuator(f"unix:{tmp_path}/nobody.sock")

    with pytest.raises(ActuatorError, match=r"nobody\.sock"):
        await actuator.list()
    await actuator.close()


async def test_a_launcher_that_does_not_answer_is_not_waited_for(tmp_path: Path):
    """One hung call would stop every later decision."""
    path = f"{tmp_path}/hung.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        # Less than gRPC's own 0.1 s for a connection: beyond them either of the two may be over first.
        actuator = ProcessActuator(f"unix:{path}", timeout_s=0.03)

        with pytest.raises(ActuatorError, match=r"within 0\.03 s"):
            await actuator.list()
        await actuator.close()
