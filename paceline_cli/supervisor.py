"""Keeps child processes alive: starts them, restarts those that die, and ends them in order.

Knows nothing about schedulers and executors. A child is a command; it keeps its addresses because it is always started
with the same one. Some children are there from the start and belong together; others are added and ended on demand.
"""

from __future__ import annotations

import math
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
    is_vital: bool = True  # nothing works without it; one that is not is started again for ever, once all was ready
    end_within_s: float = 35.0  # how long it may take to leave when it is terminated; then it is killed


@dataclass(frozen=True, slots=True)
class AddedChild:
    """A child that was added on demand and is not forgotten, at one moment."""

    name: str
    age_s: float  # since it was added, deaths and restarts of its process included
    is_running: bool
    is_retired: bool
    last_failure: str  # how its process ended last, or why it is not started again; "": it never ended


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

    def gave_up(self, name: str, reason: str) -> None:
        """A child that was added on demand cannot be kept alive; it stays as it is until it is terminated."""


class DrainingError(Exception):
    """No child can be added any more: the supervisor ends those that it has."""


class ChildFailedError(CommandError):
    """A child cannot be kept alive."""

    def __init__(self, name: str, how_it_ended: str, last_lines: Sequence[str]) -> None:
        said = "\n".join(f"  {line}" for line in last_lines) if last_lines else "  (it said nothing)"
        super().__init__(f"{name} {how_it_ended}; its last lines:\n{said}")


class Child:
    """One child process, and after its death the next one in its place."""

    def __init__(self, command: ChildCommand, observer: SupervisorObserver, *, is_added: bool = False) -> None:
        self.name = command.name
        self.is_vital = command.is_vital
        self.is_added = is_added  # came on demand: the others go on when it cannot be kept alive
        self.is_retired = False  # not started again; forgotten when its process has ended
        self.is_given_up = False  # not started again; listed until somebody ends it
        self.kill_at = math.inf  # when its time to leave is over; finite once it was terminated
        self.last_failure = ""
        self.created_at = time.monotonic()
        self.end_within_s = command.end_within_s
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
    """Child processes that belong together: they start, stay alive and end as one.

    One thread starts, watches and drains. `add`, `retire`, `terminate` and `added` may be called from others.
    """

    def __init__(
        self,
        commands: Sequence[ChildCommand],
        observer: SupervisorObserver,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.ready = False  # from then on neither a kill from outside nor a drain is a reason to give a child up
        self._policy = policy or RestartPolicy()
        self._observer = observer
        self._lock = threading.Lock()  # held to look at the children or to change them, never to wait for one to end
        self._draining = False  # once true, no process is started any more
        self._children = [Child(command, observer) for command in commands]

    @property
    def pids(self) -> dict[str, int | None]:
        """Process id of each child by name; None while it waits to be started again."""
        with self._lock:
            return {child.name: child.pid for child in self._children}

    @property
    def added(self) -> list[AddedChild]:
        """The children that were added and are not forgotten, in the order in which they came."""
        now = time.monotonic()
        with self._lock:
            return [
                AddedChild(
                    child.name, now - child.created_at, child.pid is not None, child.is_retired, child.last_failure
                )
                for child in self._children
                if child.is_added
            ]

    def start(self) -> None:
        """Start every child."""
        for child in self._children:
            child.start()

    def add(self, command: ChildCommand) -> None:
        """Start one more child, whose name is free.

        It is kept alive like the others, but when that fails they go on without it: it is listed with its last failure
        until it is terminated. Raises `DrainingError`, and `OSError` when no process can be made.
        """
        child = Child(command, self._observer, is_added=True)
        with self._lock:
            if self._draining:
                raise DrainingError(f"{command.name} is not started: everything is about to end")
            assert all(other.name != command.name for other in self._children), f"{command.name} is there already"
            child.start()
            self._children.append(child)

    def retire(self, name: str) -> None:
        """Let an added child end in its own time: its process is not started again, and then the child is forgotten.

        A name that is gone changes nothing.
        """
        with self._lock:
            if child := self._find_added(name):
                child.is_retired = True
                self._forget_if_over(child)

    def terminate(self, name: str) -> None:
        """Ask an added child to end, and forget it when it has; one that stays too long is killed.

        A name that is gone, or a second call, changes nothing.
        """
        with self._lock:
            if (child := self._find_added(name)) and child.kill_at == math.inf:
                child.kill_at = time.monotonic() + child.end_within_s
                child.signal(signal.SIGTERM)
                self._forget_if_over(child)

    def watch(self) -> None:
        """Look at every child once: note who died, start whose time has come. Call it again and again.

        Raises `ChildFailedError` when a child that was there from the start cannot be kept alive.
        """
        now = time.monotonic()
        with self._lock:
            for child in [] if self._draining else list(self._children):
                if (code := child.reap()) is not None:
                    self._note_death(child, code, now)
                elif now >= child.kill_at:
                    child.signal(signal.SIGKILL)
                elif child.pid is None and not child.is_given_up and now >= child.start_at:
                    self._start_again(child, now)

    def drain(self, timeout_s: float, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Ask the children to finish and wait until they have; kill what is left after `timeout_s`, or on `hurry`.

        The first child is asked first, because it needs the others to finish its work. When it is gone they have
        nothing left to do, and a moment to leave. Returns whether the first ended by itself.
        """
        with self._lock:
            self._draining = True
            first, others = self._children[:1], self._children[1:]
        finished = self._end(first, time.monotonic() + timeout_s, hurry)
        if finished:
            self._end(others, time.monotonic() + _MOMENT_S, hurry)
        self.kill()
        return finished

    def _end(self, children: Sequence[Child], deadline: float, hurry: Callable[[], bool]) -> bool:
        """Ask `children` to end; whether they did in time."""
        self._signal(children, signal.SIGTERM)
        while self._any_alive(children):
            if time.monotonic() >= deadline or hurry():
                return False
            time.sleep(_POLL_S)
        return True

    def kill(self) -> None:
        """End the children now."""
        with self._lock:
            self._draining = True
            children = list(self._children)
        self._signal(children, signal.SIGKILL)
        while self._any_alive(children):
            time.sleep(_POLL_S)

    def _signal(self, children: Sequence[Child], number: signal.Signals) -> None:
        with self._lock:
            for child in children:
                child.signal(number)

    def _any_alive(self, children: Sequence[Child]) -> bool:
        with self._lock:
            for child in children:
                child.reap()
            return any(child.pid is not None for child in children)

    def _find_added(self, name: str) -> Child | None:
        """The child of that name; None when it is gone, or was there from the start and is not to be ended alone."""
        return next((child for child in self._children if child.is_added and child.name == name), None)

    def _forget_if_over(self, child: Child) -> bool:
        """Forget a child that has ended and was to; whether it was so."""
        over = child.pid is None and (child.is_retired or child.kill_at < math.inf)
        if over:
            self._children.remove(child)
        return over

    def _start_again(self, child: Child, now: float) -> None:
        """Start a child after its death."""
        try:
            child.start()
        except OSError as error:
            if not child.is_added:
                raise
            self._plan_restart(child, f"could not be started: {error}", now, may_give_up=True)

    def _note_death(self, child: Child, code: int, now: float) -> None:
        """Plan the restart of a child that died, give it up, or forget it."""
        if self._forget_if_over(child):
            return
        settled = now - child.started_at >= self._policy.settled_after_s
        if settled:
            child.quick_death_count = 0
        ended = _how_it_ended(code)
        can_do_without = self.ready and not child.is_vital
        if code == ExitCode.USAGE and not can_do_without:
            self._give_up(child, ended)
            return
        asked = code in (0, -signal.SIGKILL, -signal.SIGTERM) and self.ready  # drained, or killed from outside
        self._plan_restart(child, ended, now, may_give_up=not (asked or can_do_without))

    def _plan_restart(self, child: Child, ended: str, now: float, *, may_give_up: bool) -> None:
        child.quick_death_count += 1
        if child.quick_death_count >= self._policy.quick_death_limit and may_give_up:
            self._give_up(child, f"died {child.quick_death_count} times in a row; the last time it {ended}")
            return
        delay = self._policy.delay_s(child.quick_death_count)
        child.start_at = now + delay
        child.last_failure = ended
        self._observer.restarting(child.name, ended, delay)

    def _give_up(self, child: Child, ended: str) -> None:
        """Start a child no more. Raises `ChildFailedError` unless it was added: the others cannot do without it."""
        failure = ChildFailedError(child.name, ended, list(child.last_lines))
        if not child.is_added:
            raise failure
        child.is_given_up = True
        child.last_failure = failure.message
        self._observer.gave_up(child.name, failure.message)


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
