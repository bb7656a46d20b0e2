"""What keeps an executor running on a node of a Ray cluster. It needs nothing but Python there: its code goes along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_GOOD_RUN_S = 60.0
"""After a run as long as that the next pause is the first again, and not a longer one."""

_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which outlives exec
if os.getppid() != int(sys.argv[1]):
    os._exit(1)  # it was too late
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot start {sys.argv[2]}: {error}")
"""


class ExecutorHost:
    """An actor with one executor as a child process, which is started again when it ends, unless it is retired.

    The executor ends with the actor, however that goes: nobody would know of it any more.
    """

    def __init__(self, executor_id: str, command: Sequence[str], first_pause_s: float = _FIRST_PAUSE_S) -> None:
        """Start the executor; `{executor_id}` and `{node_ip}` in the words of the command stand for its own."""
        self._words = fill_in(command, executor_id, _node_ip())
        self._first_pause_s = first_pause_s
        self._lock = threading.Lock()  # for everything below
        self._child: subprocess.Popen[bytes] | None = None  # the last that was started
        self._is_retired = False  # what ends stays ended
        self._last_failure = ""
        self._woken = threading.Event()  # set when there is no sense in a pause any more
        # Its own thread, and one that lives as long as the process does: the kernel ends a child with the thread that
        # started it.
        threading.Thread(target=self._keep, name="keep-executor", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """How the executor is."""
        with self._lock:
            child = self._child
            return {
                "is_running": child is not None and child.poll() is None,
                "is_retired": self._is_retired,
                "last_failure": self._last_failure,
                "pid": child.pid if child is not None else 0,
            }

    def retire(self) -> None:
        """Leave the executor when it ends."""
        with self._lock:
            self._is_retired = True
        self._woken.set()

    def stop(self, grace_s: float) -> None:
        """End the executor, by force when it has not ended by itself within `grace_s`; returns when it has."""
        self.retire()
        with self._lock:
            child = self._child
        if child is None:
            return
        _send(child, signal.SIGTERM)
        try:
            child.wait(grace_s)
        except subprocess.TimeoutExpired:
            _send(child, signal.SIGKILL)
            child.wait()

    def _keep(self) -> None:
        pause_s = 0.0
        while not self._woken.wait(pause_s):
            started_at = time.monotonic()
            failure = self._run()
            is_good = time.monotonic() - started_at > _GOOD_RUN_S
            pause_s = self._first_pause_s if is_good else min(_LONGEST_PAUSE_S, max(self._first_pause_s, 2 * pause_s))
            with self._lock:
                self._last_failure = failure

    def _run(self) -> str:
        """Start the executor and wait until it has ended; returns how it has."""
        words = [sys.executable, "-c", _WITH_PARENT, str(os.getpid()), *self._words]
        with self._lock:
            if self._is_retired:
                return ""
            try:
                # In a session of its own, so that what it starts itself can be ended with it.
                child = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
            except OSError as error:
                return f"cannot be started: {error}"
            self._child = child
        return _how_it_ended(child.wait())


def fill_in(command: Sequence[str], executor_id: str, node_ip: str) -> list[str]:
    """The command of one executor. Other braces stay as they are: a word may be JSON."""
    return [word.replace("{executor_id}", executor_id).replace("{node_ip}", node_ip) for word in command]


def _node_ip() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _send(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if child.poll() is None:
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            pass  # it has just ended


def _how_it_ended(code: int) -> str:
    """Example: -9 is "ended by SIGKILL", 1 "ended with exit code 1"."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
