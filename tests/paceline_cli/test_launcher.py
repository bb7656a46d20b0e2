"""The launcher over a real socket, with children that only sleep."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from paceline.internal.v1 import launcher_pb2 as pb
from paceline.internal.v1.launcher_pb2_grpc import LauncherServiceStub
from paceline_cli.launcher import launching
from paceline_cli.supervisor import ChildCommand, RestartPolicy, Supervisor
from tests.paceline_cli.conftest import Recorder, wait_until

SLEEP = ("sleep", "600")
TELL = ("sh", "-c", "echo GPU $CUDA_VISIBLE_DEVICES; exec sleep 600")


@dataclass
class Running:
    """A supervisor with a launcher, watched as `paceline serve` watches it."""

    supervisor: Supervisor
    stub: LauncherServiceStub

    def listed(self) -> list[pb.LaunchedExecutor]:
        return list(self.stub.ListLaunched(pb.ListLaunchedRequest()).executors)

    def launch(self, node_type: str = "") -> str:
        return self.stub.Launch(pb.LaunchRequest(node_type=node_type)).executor_id

    def terminate(self, name: str) -> None:
        self.stub.Terminate(pb.TerminateRequest(executor_id=name))


@pytest.fixture
def running(tmp_path: Path, recorder: Recorder) -> Iterator[Running]:
    supervisor = Supervisor([ChildCommand("scheduler", SLEEP)], recorder, RestartPolicy(first_delay_s=0.01))
    supervisor.start()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            supervisor.watch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    address = f"unix:{tmp_path}/launcher.sock"
    commands = [ChildCommand(f"executor-{index}", TELL, {"CUDA_VISIBLE_DEVICES": str(index)}) for index in range(3)]
    with launching(supervisor, commands, address), grpc.insecure_channel(address) as channel:
        yield Running(supervisor, LauncherServiceStub(channel))
        stop.set()
        watcher.join()
        supervisor.kill()


def test_launched_executors_are_listed_until_they_are_terminated(running: Running):
    """An autoscaler that was restarted knows only what it is told here."""
    assert running.listed() == []
    assert [running.launch(), running.launch("local")] == ["executor-0", "executor-1"]

    first, second = running.listed()
    assert (first.executor_id, first.node_type, first.is_running, first.is_retired) == (
        "executor-0",
        "local",
        True,
        False,
    )
    assert second.executor_id == "executor-1"

    running.terminate("executor-0")
    running.terminate("executor-0")
    wait_until(lambda: [executor.executor_id for executor in running.listed()] == ["executor-1"])


def test_the_lowest_free_name_is_taken(running: Running):
    """Names are few and come back, so that logs and metrics do not fill with executors that are gone."""
    launched = [running.launch() for _ in range(3)]
    running.terminate("executor-1")
    wait_until(lambda: len(running.listed()) == 2)

    assert launched == ["executor-0", "executor-1", "executor-2"]
    assert running.launch() == "executor-1"
    assert [executor.executor_id for executor in running.listed()] == launched


def test_a_launched_executor_has_the_gpus_of_its_name_also_when_it_comes_again(running: Running, recorder: Recorder):
    """One that took another's GPU would find its memory full."""
    for _ in range(2):
        running.launch()
    wait_until(lambda: ("executor-1", "GPU 1") in recorder.lines)
    os.kill(running.supervisor.pids["executor-1"], signal.SIGKILL)

    wait_until(lambda: recorder.lines.count(("executor-1", "GPU 1")) == 2)
    assert ("executor-0", "GPU 0") in recorder.lines


def test_one_more_than_the_machine_was_divided_by_is_refused(running: Running):
    """Its share of cores and memory is not there."""
    for _ in range(3):
        running.launch()

    with pytest.raises(grpc.RpcError) as refusal:
        running.launch()

    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "all 3 executors" in refusal.value.details()


def test_an_unknown_node_type_is_refused(running: Running):
    """A file made for a cluster must not quietly fill one machine."""
    with pytest.raises(grpc.RpcError) as refusal:
        running.launch("h100")

    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "'h100'" in refusal.value.details()


def test_a_retired_executor_says_so(running: Running):
    """Whoever drains it must see that the wish has arrived."""
    name = running.launch()
    running.stub.Retire(pb.RetireRequest(executor_id=name))
    running.stub.Retire(pb.RetireRequest(executor_id="executor-2"))

    assert [executor.is_retired for executor in running.listed()] == [True]


def test_nothing_is_launched_while_everything_ends(running: Running):
    """An executor that came now would be left behind."""
    running.supervisor.kill()

    with pytest.raises(grpc.RpcError) as refusal:
        running.launch()

    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
