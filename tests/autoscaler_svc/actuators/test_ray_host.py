"""What an actor does on its node, here in this process and without a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")  # whose address of the node is asked for

from autoscaler_svc.actuators.ray_host import ExecutorHost, fill_in

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "open(sys.argv[1], 'w').close(); time.sleep(600)",
)


@pytest.fixture
def start() -> Iterator[Callable[..., ExecutorHost]]:
    hosts: list[ExecutorHost] = []

    def start(*command: str) -> ExecutorHost:
        hosts.append(ExecutorHost("demo-1", command, first_pause_s=0.05))
        return hosts[-1]

    yield start
    for host in hosts:
        host.stop(0)


def wait_for(condition: Callable[[], Any], limit_s: float = 20) -> Any:
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
    return found


def running_pid(host: ExecutorHost) -> int:
    status = host.status()
    return status["pid"] if status["is_running"] else 0


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_executor_that_dies_is_started_again(start: Callable[..., ExecutorHost]):
    """A crash costs a restart of the process, and no decision of the autoscaler."""
    host = start(*SLEEP)
    first = wait_for(lambda: running_pid(host))
    os.kill(first, signal.SIGKILL)
    second = wait_for(lambda: running_pid(host) not in (0, first) and running_pid(host))

    assert second != first
    assert host.status()["last_failure"] == "ended by SIGKILL"
    assert not host.status()["is_retired"]


def test_a_retired_executor_that_ends_stays_ended(start: Callable[..., ExecutorHost]):
    """It has drained: started again it would take requests again."""
    host = start(*SLEEP)
    pid = wait_for(lambda: running_pid(host))
    host.retire()
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not host.status()["is_running"])
    time.sleep(0.3)

    assert host.status() == {"is_running": False, "is_retired": True, "last_failure": "ended by SIGTERM", "pid": pid}


def test_an_executor_that_does_not_end_is_killed(start: Callable[..., ExecutorHost], tmp_path: Path):
    """Whatever it hangs in: its GPU is needed."""
    host = start(*STUBBORN, str(tmp_path / "ready"))
    wait_for((tmp_path / "ready").exists)
    host.stop(grace_s=0.1)

    assert not host.status()["is_running"]
    assert wait_for(lambda: host.status()["last_failure"]) == "ended by SIGKILL"


def test_a_command_that_cannot_run_is_a_failure(start: Callable[..., ExecutorHost], capfd: pytest.CaptureFixture[str]):
    """A typing mistake in the scaling file shows in the list, and its reason in the log of the actor."""
    host = start("no-such-command")

    assert wait_for(lambda: host.status()["last_failure"]) == "ended with exit code 1"
    assert "cannot start no-such-command" in capfd.readouterr().err


def test_an_executor_ends_with_its_actor():
    """An actor that was killed must not leave an executor that nobody knows of."""
    code = (
        "import time; from autoscaler_svc.actuators.ray_host import ExecutorHost\n"
        f"host = ExecutorHost('demo-1', {SLEEP!r})\n"
        "while not host.status()['is_running']: time.sleep(0.01)\n"
        "time.sleep(0.5); print(host.status()['pid'], flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as actor:
        assert actor.stdout is not None
        executor = int(actor.stdout.readline())
        was_there = is_there(executor)
        actor.kill()
        wait_for(lambda: not is_there(executor))

    assert was_there


def test_only_what_is_known_is_filled_in():
    """A word may be JSON, whose braces are its own."""
    command = ["paceline", "--executor-id={executor_id}", "{node_ip}:0", '{"a": {}}']

    assert fill_in(command, "demo-1", "10.0.0.7") == ["paceline", "--executor-id=demo-1", "10.0.0.7:0", '{"a": {}}']
