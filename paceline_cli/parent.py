"""What a child process does for the supervisor that started it: say how far it is, and end when the supervisor ends.

The supervisor holds the other end of two pipes. The child's output is one: most of its lines are logs, a report is a
line of JSON behind a marker that no log line begins with. The child's standard input is the other: nothing is ever
written to it, and its end means that the supervisor is gone, however it went.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

_MARKER = "\x1e"  # ASCII record separator
_STDIN, _STDOUT, _STDERR = 0, 1, 2


def send_report(**fields: Any) -> None:
    """Tell the supervisor something."""
    try:
        sys.stdout.write(f"{_MARKER}{json.dumps(fields)}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # nobody is left to tell; `exit_with_parent` takes it from here


def send_progress(phase: str, fraction: float) -> None:
    """Tell the supervisor what is being done and which share of it is over."""
    send_report(phase=phase, fraction=fraction)


def parse_report(line: str) -> dict[str, Any] | None:
    """The report in a line of a child's output; None for any other line."""
    if not line.startswith(_MARKER):
        return None
    try:
        report = json.loads(line[len(_MARKER) :])
    except ValueError:
        return None
    return report if isinstance(report, dict) else None


def exit_with_parent() -> None:
    """From now on, drain this process when its supervisor is gone."""
    threading.Thread(target=_wait_for_parent, name="exit-with-parent", daemon=True).start()


def _wait_for_parent() -> None:
    """Read standard input to its end, then ask this process to drain."""
    while os.read(_STDIN, 4096):
        pass
    # The pipe that carried the output is gone too: a log line must not be what ends the drain.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    os.dup2(nowhere, _STDERR)
    os.kill(os.getpid(), signal.SIGTERM)
