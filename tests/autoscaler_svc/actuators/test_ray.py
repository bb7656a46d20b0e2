"""The actuator on a real cluster of Ray, whose nodes are processes of this machine."""

from __future__ import annotations

import asyncio
import builtins
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from autoscaler_svc.actuators.actuator import ActuatorError, Launched, NoRoomError
from autoscaler_svc.actuators.ray import ActorName, RayActuator

STORE_BYTES = 80 * 1024 * 1024
NEEDS = {"cpu": {"num_cpus": 0.0, "executor": 1.0}, "other": {"num_cpus": 0.0}}
EXECUTOR = """
import os, sys, time
with open(os.path.join(sys.argv[1], sys.argv[2]), "a") as file:
    print(os.getpid(), sys.argv[3], file=file)
time.sleep(600)
"""


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that has no room for executors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        ray.shutdown()  # a test that failed may be connected still
        cluster.shutdown()


def make_actuator(address: str, folder: Path, **settings: Any) -> RayActuator:
    command = (sys.executable, "-c", EXECUTOR, str(folder), "{executor_id}", "{node_ip}")
    return RayActuator(
        command, NEEDS, address=address, pool="demo", max_counts={"cpu": 2}, first_pause_s=0.1, **settings
    )


async def until(
    actuator: RayActuator, condition: Callable[[Sequence[Launched]], bool], limit_s: float = 40
) -> Sequence[Launched]:
    """The first list that is as it should be."""
    end = time.monotonic() + limit_s
    while not condition(listed := await actuator.list()):
        assert time.monotonic() < end, f"it stays {listed}"
        await asyncio.sleep(0.1)
    return listed


def all_run(listed: Sequence[Launched]) -> bool:
    return bool(listed) and all(one.is_running for one in listed)


async def start_of(folder: Path, name: str, number: int) -> tuple[int, str]:
    """Process and node of the executor's start of that number, once there was one."""
    path = folder / name
    while not path.exists() or len(lines := path.read_text().splitlines()) <= number:
        await asyncio.sleep(0.05)
    pid, node_ip = lines[number].split()
    return int(pid), node_ip


async def has_ended(pid: int, limit_s: float = 10) -> bool:
    end = time.monotonic() + limit_s
    while is_there(pid) and time.monotonic() < end:
        await asyncio.sleep(0.05)
    return not is_there(pid)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_executors_live_on_the_nodes_of_a_cluster(cluster: Any, tmp_path: Path):
    """One test, because a cluster takes as long to start as all the rest: from waiting for a node to its loss."""
    actuator = make_actuator(cluster.address, tmp_path, node_wait_s=1.0)
    await waits_for_a_node_and_is_given_up(actuator)

    first = await actuator.launch("cpu")
    node = cluster.add_node(num_cpus=1, resources={"executor": 2}, object_store_memory=STORE_BYTES)
    (running,) = await until(actuator, all_run)
    assert (running.executor_id, running.node_type, running.is_retired) == (first, "cpu", False)
    _, node_ip = await start_of(tmp_path, first, 0)
    assert socket.inet_aton(node_ip)

    second = await actuator.launch("cpu")
    await until(actuator, all_run)
    with pytest.raises(NoRoomError, match="2 executors of node type 'cpu'"):
        await actuator.launch("cpu")

    successor = await restarted(actuator, lambda: make_actuator(cluster.address, tmp_path))
    await dies_and_is_started_again(successor, tmp_path, first)
    await retires_and_stays_ended(successor, tmp_path, first)
    await terminates(successor, tmp_path, second)

    lost = await successor.launch("cpu")
    await until(successor, lambda listed: any(one.executor_id == lost and one.is_running for one in listed))
    pid, _ = await start_of(tmp_path, lost, 0)
    cluster.remove_node(node)
    await until(successor, lambda listed: not any(one.is_running for one in listed))
    assert await has_ended(pid)
    await successor.close()


async def waits_for_a_node_and_is_given_up(actuator: RayActuator) -> None:
    """It is listed from the first moment on; after a while that is a failure, and giving up is enough to end it."""
    name = await actuator.launch("cpu")
    (fresh,) = await actuator.list()
    (late,) = await until(actuator, lambda listed: bool(listed[0].last_failure))
    began_at = time.monotonic()
    await actuator.terminate(name)

    assert (fresh.executor_id, fresh.is_running) == (name, False)
    assert bool(fresh.last_failure) == (fresh.age_s >= 1.0), "a slow machine may have waited for a second by then"
    assert "waits for a node with num_cpus 0, executor 1" in late.last_failure
    assert late.age_s >= 1.0
    assert time.monotonic() - began_at < 5.0
    assert await until(actuator, lambda listed: not listed) == []
    await actuator.terminate(name)
    await actuator.retire(name)


async def restarted(actuator: RayActuator, make: Callable[[], RayActuator]) -> RayActuator:
    """An autoscaler that starts finds what the one before it has launched, with its age."""
    before = await actuator.list()
    await actuator.close()
    successor = make()
    after = await until(successor, all_run)

    assert [one.executor_id for one in after] == [one.executor_id for one in before]
    assert all(new.age_s > old.age_s for new, old in zip(after, before, strict=True))
    return successor


async def dies_and_is_started_again(actuator: RayActuator, folder: Path, name: str) -> None:
    """A crash costs a restart of the process and keeps the name."""
    pid, _ = await start_of(folder, name, 0)
    os.kill(pid, signal.SIGKILL)
    again, _ = await start_of(folder, name, 1)
    listed = await until(actuator, all_run)

    assert again != pid
    assert {one.executor_id: one.last_failure for one in listed}[name] == "ended by SIGKILL"


async def retires_and_stays_ended(actuator: RayActuator, folder: Path, name: str) -> None:
    """Who has drained is left alone until it is terminated."""
    await actuator.retire(name)
    pid, _ = await start_of(folder, name, 1)
    os.kill(pid, signal.SIGTERM)
    await until(actuator, lambda listed: any(one.executor_id == name and not one.is_running for one in listed))
    await asyncio.sleep(0.5)
    (ended,) = [one for one in await actuator.list() if one.executor_id == name]

    assert (ended.is_running, ended.is_retired) == (False, True)
    await terminated(actuator.terminate(name))
    assert name not in [one.executor_id for one in await actuator.list()]


async def terminates(actuator: RayActuator, folder: Path, name: str) -> None:
    """The actor goes, and its executor first."""
    pid, _ = await start_of(folder, name, 0)
    await terminated(actuator.terminate(name))

    assert await has_ended(pid)
    assert await until(actuator, lambda listed: not listed) == []


async def terminated(call: Awaitable[None]) -> None:
    """An executor that ends when it is asked to is not waited for any longer."""
    began_at = time.monotonic()
    await call

    assert time.monotonic() - began_at < 5.0


# --- without a cluster ------------------------------------------------------------------------------------------


async def test_a_cluster_that_is_not_there_is_an_actuator_error(tmp_path: Path):
    """The autoscaler goes on and tries again; Ray by itself would try for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    actuator = make_actuator(f"127.0.0.1:{port}", tmp_path)

    with pytest.raises(ActuatorError, match=f"cannot connect to Ray at '127.0.0.1:{port}'"):
        await actuator.list()
    await actuator.close()


async def test_an_unknown_node_type_is_refused(tmp_path: Path):
    """Nothing is started where its resources are not known."""
    actuator = make_actuator("127.0.0.1:1", tmp_path)

    with pytest.raises(ActuatorError, match="no node type 'h100'; there are cpu, other"):
        await actuator.launch("h100")
    await actuator.close()


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Ray is an extra; most installations do without."""
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "autoscaler_svc.actuators.ray_cluster":
            raise ImportError("No module named 'ray'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(ActuatorError, match=r"pip install 'paceline-server\[ray\]'"):
        make_actuator("auto", tmp_path)


def test_the_name_of_an_actor_tells_everything():
    """What an autoscaler would have to remember otherwise."""
    name = ActorName("demo-3fa9c1", 1767225600000, "a100@east")

    assert ActorName.parse(str(name)) == name
    assert ActorName.parse("somebody-elses") is None
    assert ActorName.parse("a@b@c") is None
