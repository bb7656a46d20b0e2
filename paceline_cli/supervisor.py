"""Keeps child processes alive: starts them, restarts those that die, and ends them in order.

Knows nothing about schedulers and executors. A child is a command; it keeps its addresses because it is always started
with the same one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.parent import parse_report

_POLL_S = 0.05
_MOMENT_S = 1.0


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """What to start and under which name."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # added to the supervisor's own


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a dead child is started again, and when that is given up."""

    first_delay_s: float = 0.1
    """Delay before the first restart; doubles with each death that follows quickly."""

    longest_delay_s: float = 10.0

    settled_after_s: float = 10.0
    """A child that has lived this long has started well; its death is a first one again."""

    quick_death_limit: int = 5
    """Deaths in a row, each before the child had settled, after which it is not started again."""

    def delay_s(self, quick_death_count: int) -> float:
        """How long to wait before the next start.

        Example: deaths 1, 2, 3, 4 in a row wait 0.1, 0.2, 0.4, 0.8 s. A child that had settled has none: 0.1 s.
        """
        return float(min(self.longest_delay_s, self.first_delay_s * 2 ** max(0, quick_death_count - 1)))


class SupervisorObserver(Protocol):
    """Is told what the children say and what becomes of them. `said` and `reported` come from other threads."""

    def said(self, name: str, line: str) -> None:
        """A child wrote a line."""

    def reported(self, name: str, report: Mapping[str, Any]) -> None:
        """A child sent a report (`paceline_cli.parent`)."""

    def restarting(self, name: str, how_it_ended: str, delay_s: float) -> None:
        """A child died and will be started again."""


class ChildFailedError(CommandError):
    """A child cannot be kept alive."""

    def __init__(self, name: str, how_it_ended: str, last_lines: Sequence[str]) -> None:
        said = "\n".join(f"  {line}" for line in last_lines) if last_lines else "  (it said nothing)"
        super().__init__(f"{name} {how_it_ended}; its last lines:\n{said}")


class Child:
    """One child process, and after its death the next one in its place."""

    def __init__(self, command: ChildCommand, observer: SupervisorObserver) -> None:
        self.name = command.name
        self.quick_death_count = 0  # deaths in a row, each before it had settled
        self.start_at = 0.0  # when to start it again; meaningful while it does not run
        self.started_at = 0.0
        self.last_lines: deque[str] = deque(maxlen=12)
        self._command = command
        self._observer = observer
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None when no process is there."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process, in a session of its own: Ctrl-C at the terminal is the supervisor's to handle."""
        self.started_at = time.monotonic()
        self.last_lines.clear()
        self._process = subprocess.Popen(
            self._command.command,
            env={**os.environ, **self._command.environment},
            stdin=subprocess.PIPE,  # never written to: its end tells the child that the supervisor is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), name=f"read {self.name}", daemon=True)
        self._reader.start()

    def reap(self) -> int | None:
        """The exit code of a process that has ended since the last call, else None."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        if self._reader:
            self._reader.join(timeout=1.0)  # so that its last lines are in; a grandchild may hold the pipe open
        if self._process.stdin:
            self._process.stdin.close()
        self._process = None
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        if self._process:
            self._process.send_signal(number)

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Hand on what the process writes until it ends."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                text = line.rstrip("\n")
                if (report := parse_report(text)) is not None:
                    self._observer.reported(self.name, report)
                elif text.strip():
                    self.last_lines.append(text)
                    self._observer.said(self.name, text)


class Supervisor:
    """Child processes that belong together: they start, stay alive and end as one."""

    def __init__(
        self,
        commands: Sequence[ChildCommand],
        observer: SupervisorObserver,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.ready = False  # from then on neither a kill from outside nor a drain is a reason to give a child up
        self._policy = policy or RestartPolicy()
        self._observer = observer
        self._children = [Child(command, observer) for command in commands]

    @property
    def pids(self) -> dict[str, int | None]:
        """Process id of each child by name; None while it waits to be started again."""
        return {child.name: child.pid for child in self._children}

    def start(self) -> None:
        """Start every child."""
        for child in self._children:
            child.start()

    def watch(self) -> None:
        """Look at every child once: note who died, start whose time has come. Call it again and again.

        Raises `ChildFailedError` when a child cannot be kept alive.
        """
        now = time.monotonic()
        for child in self._children:
            if (code := child.reap()) is not None:
                self._note_death(child, code, now)
            elif child.pid is None and now >= child.start_at:
                child.start()

    def drain(self, timeout_s: float, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Ask the children to finish and wait until they have; kill what is left after `timeout_s`, or on `hurry`.

        The first child is asked first, because it needs the others to finish its work. When it is gone they have
        nothing left to do, and a moment to leave. Returns whether the first ended by itself.
        """
        first, others = self._children[:1], self._children[1:]
        finished = self._end(first, time.monotonic() + timeout_s, hurry)
        if finished:
            self._end(others, time.monotonic() + _MOMENT_S, hurry)
        self.kill()
        return finished

    def _end(self, children: Sequence[Child], deadline: float, hurry: Callable[[], bool]) -> bool:
        """Ask `children` to end; whether they did in time."""
        for child in children:
            child.signal(signal.SIGTERM)
        while any(self._is_alive(child) for child in children):
            if time.monotonic() >= deadline or hurry():
                return False
            time.sleep(_POLL_S)
        return True

    def kill(self) -> None:
        """End the children now."""
        for child in self._children:
            child.signal(signal.SIGKILL)
        while any(self._is_alive(child) for child in self._children):
            time.sleep(_POLL_S)

    @staticmethod
    def _is_alive(child: Child) -> bool:
        child.reap()
        return child.pid is not None

    def _note_death(self, child: Child, code: int, now: float) -> None:
        """Plan the restart of a child that died, or give it up."""
        settled = now - child.started_at >= self._policy.settled_after_s
        child.quick_death_count = 1 if settled else child.quick_death_count + 1
        ended = _how_it_ended(code)
        if code == ExitCode.USAGE:
            raise ChildFailedError(child.name, ended, list(child.last_lines))
        asked = code in (0, -signal.SIGKILL, -signal.SIGTERM) and self.ready  # drained, or killed from outside
        if child.quick_death_count >= self._policy.quick_death_limit and not asked:
            ended = f"died {child.quick_death_count} times in a row; the last time it {ended}"
            raise ChildFailedError(child.name, ended, list(child.last_lines))
        delay = self._policy.delay_s(child.quick_death_count)
        child.start_at = now + delay
        self._observer.restarting(child.name, ended, delay)


def _how_it_ended(code: int) -> str:
    """Words for an exit code of `subprocess`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
