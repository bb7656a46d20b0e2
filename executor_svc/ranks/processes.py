"""The processes of the other ranks, seen from rank 0: started, told, listened to, watched, and ended as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import structlog

from executor_svc.ranks.messages import describe, kind_of, read_answer

log = structlog.get_logger()

RANK_COMMAND = (sys.executable, "-m", "executor_svc.ranks")
_TICK_S = 0.1
_ENDING_S = 5.0
_ROOT = Path(__file__).parents[2]


class RanksError(RuntimeError):
    """The ranks do not do the same any more."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long rank 0 waits for the others."""

    step_s: float = 300.0
    """Until a step has ended somewhere. The scheduler gives a stuck executor up long before, but may be gone."""

    lag_s: float = 30.0
    """Until all have ended what one of them has ended: they end a step within milliseconds."""


@dataclass(eq=False, slots=True)
class _Other:
    """Another rank."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection

    @property
    def how_it_ended(self) -> str:
        code = self.process.poll()
        return "" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"


@dataclass(eq=False, slots=True)
class _Wait:
    """A call that waits for other ranks, wherever in torch it does."""

    limit_s: float
    so_far: str  # what has become of it
    waited_s: float = 0.0


def end_process(exit_code: int) -> None:
    """End this process from any thread, though another one waits for a rank that is gone."""
    sys.stderr.flush()
    os._exit(exit_code)


class Ranks:
    """Ranks 1 to N - 1. What ends or stands still among them ends all of them, and this process."""

    def __init__(
        self,
        count: int,
        command: Sequence[str] = RANK_COMMAND,
        limits: Limits = Limits(),
        end: Callable[[int], None] = end_process,
    ) -> None:
        """Start them. `command` gets the number of its end of the line as its last word."""
        self._limits = limits
        self._end = end
        self._others: list[_Other] = []
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._waits: list[_Wait] = []
        self._heard_count = 0  # answers
        started: Future[None] = Future()
        # On Linux a process can end with the thread that started it: so the one that watches them does.
        watching = threading.Thread(target=self._start_and_watch, args=(count, command, started), daemon=True)
        watching.name = "ranks"
        watching.start()
        started.result()

    @property
    def process_ids(self) -> list[int]:
        """Of the other ranks."""
        return [other.process.pid for other in self._others]

    def introduce(self, facts: dict[str, Any]) -> None:
        """Tell each of the others who it is: `facts` and its rank."""
        for other in self._others:
            other.connection.send_bytes(json.dumps(facts | {"rank": other.rank}).encode())

    def tell(self, message: bytes) -> None:
        """Send all of them an order."""
        for other in self._others:
            try:
                other.connection.send_bytes(message)
            except OSError:
                self.fail(f"rank {other.rank} does not listen any more")

    def agree(self, number: int, error: Exception | None) -> None:
        """Wait until the others have done order `number`, which this rank has done, or failed at with `error`.

        Returns when it went alike everywhere, be it good or bad. Else some have computed what others have not.
        """
        own = describe(error)
        with self.waiting(self._limits.lag_s, f"rank 0 is through with a step ({own or 'done'}), not all others are"):
            for other in self._others:
                theirs = self._answer(other, number)
                if kind_of(theirs) != kind_of(own):
                    did = "; ".join(f"rank {rank}: {how or 'done'}" for rank, how in ((0, own), (other.rank, theirs)))
                    self.fail(f"they did not do the same ({did})")

    @contextmanager
    def waiting(self, limit_s: float | None = None, so_far: str = "no rank is through with a step") -> Iterator[None]:
        """While it is entered, others may have to do something for this thread to go on; by default a step."""
        wait = _Wait(self._limits.step_s if limit_s is None else limit_s, so_far)
        with self._lock:
            self._waits.append(wait)
        try:
            yield
        finally:
            with self._lock:
                self._waits.remove(wait)

    def fail(self, reason: str) -> None:
        """End all ranks and this process; raises `RanksError` where the process stays, in a test."""
        if not self._is_over.is_set():
            log.error("the executor ends, as its ranks do not work together any more", reason=reason)
        self._kill()
        self._end(1)
        raise RanksError(f"the ranks do not work together any more: {reason}; start this executor again")

    def close(self) -> None:
        """End the other ranks."""
        self._kill()
        for other in self._others:
            with suppress(subprocess.TimeoutExpired):  # a device may keep it for longer
                other.process.wait(_ENDING_S)

    def _kill(self) -> None:
        self._is_over.set()
        for other in self._others:
            other.process.kill()

    def _answer(self, other: _Other, number: int) -> str:
        """What it says of an order; answers before that are of steps that nobody asks for any more."""
        try:
            while True:
                answered, how = read_answer(other.connection.recv_bytes())
                self._heard_count += 1
                if answered == number:
                    return how
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):  # its line ends a moment before it does
                other.process.wait(1.0)
            self.fail(f"rank {other.rank} ended with {other.how_it_ended or 'its line closed'}")
            raise

    def _start_and_watch(self, count: int, command: Sequence[str], started: Future[None]) -> None:
        try:
            for rank in range(1, count):
                self._others.append(_start(rank, command))
        except OSError as error:
            self.close()
            started.set_exception(error)
            return
        started.set_result(None)
        with suppress(RanksError):  # the process stays: whoever asks next is told
            try:
                self._watch()
            except (EOFError, OSError) as error:
                self.fail(f"their lines are broken ({describe(error)})")

    def _watch(self) -> None:
        """Look at the others until they are to end.

        Time counts only while this process runs: it may be suspended, and must not take that for others' silence.
        """
        unheard_s, heard_count = 0.0, 0  # since when answers are there and this rank comes to hear none of them
        while not self._is_over.wait(_TICK_S):
            for other in self._others:
                if other.how_it_ended and not self._is_over.is_set():
                    self.fail(f"rank {other.rank} ended with {other.how_it_ended}")
            with self._lock:
                for wait in self._waits:
                    wait.waited_s += _TICK_S
                late = [wait for wait in self._waits if wait.waited_s > wait.limit_s]
                is_unheard = bool(self._waits) and any(other.connection.poll() for other in self._others)
            if late:
                self.fail(f"{late[0].so_far} after {late[0].limit_s:g} s")
            unheard_s = unheard_s + _TICK_S if is_unheard and heard_count == self._heard_count else 0.0
            heard_count = self._heard_count
            if unheard_s > self._limits.lag_s:
                self.fail(
                    f"rank 0 is not through with a step {self._limits.lag_s:g} s after others ({self._unheard()})"
                )

    def _unheard(self) -> str:
        """What the others have to say before all is ended."""
        answers = [(o.rank, read_answer(o.connection.recv_bytes())[1]) for o in self._others if o.connection.poll()]
        return "; ".join(f"rank {rank}: {how or 'done'}" for rank, how in answers)


def _start(rank: int, command: Sequence[str]) -> _Other:
    ours, theirs = Pipe()
    places = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        )
    finally:
        theirs.close()
    return _Other(rank, process, ours)
