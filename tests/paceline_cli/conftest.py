"""Children and waiting, for the tests of the command."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from paceline_cli.supervisor import ChildCommand

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 60.0


def wait_until(condition: Callable[[], Any], poll: Callable[[], Any] = lambda: None) -> Any:
    """Call `poll` until `condition` holds; returns what it gave. Fails after a generous while."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        poll()
        time.sleep(0.01)
    return value


def python_child(name: str, script: str) -> ChildCommand:
    """A child process that runs `script`; it can import our packages."""
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "client")))
    return ChildCommand(name, (sys.executable, "-c", script), {"PYTHONPATH": path})


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.lines: list[tuple[str, str]] = []
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self.restarts: list[tuple[str, str, float]] = []
        self.given_up: list[tuple[str, str]] = []

    def said(self, name: str, line: str) -> None:
        with self._lock:
            self.lines.append((name, line))

    def reported(self, name: str, report: Mapping[str, Any]) -> None:
        with self._lock:
            self.reports.append((name, dict(report)))

    def restarting(self, name: str, how_it_ended: str, delay_s: float) -> None:
        self.restarts.append((name, how_it_ended, delay_s))

    def gave_up(self, name: str, reason: str) -> None:
        self.given_up.append((name, reason))


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    return Recorder()
