"""`paceline serve` as a whole: real processes, no model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline import Client
from tests.paceline_cli.conftest import REPOSITORY, is_alive, wait_until


class Served:
    """A running `paceline serve fake` and what it has printed."""

    def __init__(self, output: Path, *words: str) -> None:
        self._output = output
        path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "client")))
        command = [sys.executable, "-m", "paceline_cli", "serve", "fake", "--port", "0", *words]
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
            )

    @property
    def printed(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def address(self) -> str:
        """Where it is ready; waits until it is."""

        def look():
            assert self.process.poll() is None, self.printed
            return re.search(r"ready at (\S+)", self.printed)

        return wait_until(look)[1]

    def child_pids(self) -> list[int]:
        """Its children that run."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if is_alive(int(pid))]

    def command_of(self, pid: int) -> str:
        """The command line of a child."""
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    running = Served(tmp_path / "printed", "--demo", "--executors", "2", "--drain-timeout", "2")
    yield running
    if running.process.poll() is None:
        running.process.kill()  # the children drain by themselves
    running.process.wait()


def test_serves_from_start_to_ctrl_c(served: Served):
    """What a newcomer sees: ready at an address, an answer, and a clean end."""
    address = served.address
    with Client(address) as client:
        output = client.generate("Once", max_output_tokens=8, stream=False)
    wait_until(lambda: "tokens/s" in served.printed)
    children = served.child_pids()
    served.process.send_signal(signal.SIGINT)
    exit_code = served.process.wait(60)

    assert len(output.token_ids) == 8
    assert exit_code == 0, served.printed
    assert len(children) == 3
    assert not any(is_alive(pid) for pid in children)
    assert served.printed.count("ready at") == 1
    assert "cache: 65,536 tokens each" in served.printed
    assert "96 tokens in" in served.printed
    assert "Traceback" not in served.printed


def test_a_killed_executor_comes_back_to_the_fleet(served: Served):
    """The scheduler finds it at the address it had."""
    with Client(served.address) as client:
        wait_until(lambda: client.model().executor_count == 2)
        victim = next(pid for pid in served.child_pids() if "executor-0" in served.command_of(pid))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "starting it again" in served.printed)
        wait_until(lambda: client.model().executor_count == 2)

        assert len(client.generate("Once", max_output_tokens=8, stream=False).token_ids) == 8
    assert victim not in served.child_pids()


def test_nothing_is_left_when_the_supervisor_is_killed(served: Served):
    """Servers without a supervisor would hold the port and the memory until somebody looks for them."""
    assert served.address
    children = served.child_pids()
    served.process.kill()

    assert len(children) == 3
    wait_until(lambda: not any(is_alive(pid) for pid in children))


def test_settings_that_contradict_each_other_end_it_at_once(tmp_path):
    """Restarting an executor that refuses its settings would hide the reason."""
    refused = Served(tmp_path / "printed", "--max-num-seqs", "64", "--max-num-batched-tokens", "8")

    assert refused.process.wait(60) == 2
    assert "max num batched tokens is 8 but max num seqs is 64" in refused.printed
    assert "starting it again" not in refused.printed
