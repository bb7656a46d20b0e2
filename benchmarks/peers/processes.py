"""Servers as child processes: when they are ready, what they take, and that nothing of them is left."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from benchmarks import BenchmarkError

LAST_LINES = 12
_PAUSE_S = 0.05


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server in a process group of its own, which is gone, with all its children, when the `with` is left."""

    def __init__(self, command: list[str], port: int, log: Path, environment: dict[str, str] | None = None) -> None:
        self.port = port
        self._log = log
        self._started = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stop_group(self._process)

    def wait_until_ready(self, path: str, timeout_s: float = 600) -> float:
        """Seconds from the start until it answers a GET of this path."""
        while not _answers(self.port, path):
            if self._process.poll() is not None:
                raise BenchmarkError(f"the server ended with {self._process.returncode}:\n{last_lines(self._log)}")
            if time.perf_counter() - self._started > timeout_s:
                raise BenchmarkError(f"the server was not ready after {timeout_s:.0f} s:\n{last_lines(self._log)}")
            time.sleep(_PAUSE_S)
        return time.perf_counter() - self._started

    def peak_mib(self) -> float:
        """The most memory that the server and its children had resident, each at its own worst moment."""
        return peak_mib(self._process.pid)


def peak_mib(root: int) -> float:
    """The sum of the peaks of a process and of all that descend from it and still run."""
    return sum(peak_kib(pid) for pid in [root, *_descendants(root)]) / 1024


def stop_group(process: subprocess.Popen[bytes], patience_s: float = 10) -> None:
    """Ask a process that leads a group to end; then end the whole group, and wait until it is gone."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    while _members(process.pid, _GROUP):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.poll()
        time.sleep(_PAUSE_S)
    process.wait()


def end_session(leader: int) -> None:
    """Kill what is left of the session that this process led, whatever groups it is in, and wait until it is gone."""
    while members := _members(leader, _SESSION):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def leave_nothing_behind() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that the servers of this process end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def last_lines(log: Path, count: int = LAST_LINES) -> str:
    """The end of what a process wrote."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False  # not listening yet
    finally:
        connection.close()


_STATE, _PARENT, _GROUP, _SESSION = range(4)  # of what follows the name in /proc/PID/stat


def _processes() -> dict[int, list[str]]:
    """Every process that has not ended, and what its `stat` says after the name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[_STATE] != "Z":
                found[int(stat.parent.name)] = fields
    return found


def _members(leader: int, of: int) -> list[int]:
    return [pid for pid, fields in _processes().items() if int(fields[of]) == leader]


def _descendants(root: int) -> list[int]:
    parents = {pid: int(fields[_PARENT]) for pid, fields in _processes().items()}
    found = [root]
    for pid in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def peak_kib(pid: int | str) -> int:
    """The most memory that a process has had; 0 where that cannot be known."""
    with contextlib.suppress(OSError):  # ended meanwhile
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0
