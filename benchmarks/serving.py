"""A whole system as users start it, measured from outside: `paceline serve` in processes of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from benchmarks import BenchmarkError
from benchmarks.figures import Figures, run_json
from benchmarks.load import ask_all, warm_up
from benchmarks.peers.processes import peak_kib
from benchmarks.wanted import Report, Side, Work, thread_count
from benchmarks.workloads import Workload
from paceline import Client, PacelineError

PARTS = ("executor", "scheduler", "serve")  # the last is what keeps the others running
_START_LIMIT_S = 600.0  # a first start may fetch a model and build what runs it
_END_LIMIT_S = 60.0
_LOOK_EVERY_S = 0.02
_TELL_EVERY_S = 0.25


@dataclass(slots=True)
class System:
    """A server that answers."""

    address: str
    start_s: float | None = None  # from its first process until an executor was there; None: it ran already
    pids: dict[str, int] = field(default_factory=dict)  # of `PARTS`, where this machine runs them

    def peak_mib(self) -> dict[str, float | None]:
        """The most memory that each part has had so far."""
        return {name: peak_mib(self.pids.get(name)) for name in PARTS}

    def runner(self) -> tuple[str, str]:
        """Type of the weights and how steps run, by what the executor says: it may not have got what was asked for."""
        import grpc

        from paceline.v1.fleet_pb2 import ListExecutorsRequest
        from paceline.v1.fleet_pb2_grpc import FleetServiceStub

        with grpc.insecure_channel(self.address) as channel:
            executors = FleetServiceStub(channel).ListExecutors(ListExecutorsRequest(), timeout=10).executors
        if not executors:
            raise BenchmarkError(f"no executor has joined at {self.address}; start one and measure again")
        return executors[0].model.dtype, executors[0].model.mode


def measure(side: Side, work: Work, turn: int, report: Report, address: str = "") -> Iterator[dict[str, Any]]:
    """Start a system, or take the one at `address`, and give the JSON of each workload on it."""
    report(f"looking at {address}" if address else f"starting {side.model}")
    with found(address) if address else served(side) as system:
        with Client(system.address, max_retries=0) as client:
            vocabulary_size = client.model().vocabulary_size
        dtype, runner = system.runner()
        capacity = None
        for name in work.in_order():
            workload = work.of_turn(name, turn, vocabulary_size, capacity)
            asyncio.run(warm_up(system.address))
            figures = Figures.of(asyncio.run(ask_all(system.address, workload, Teller(workload, report))))
            if name == "W1":
                capacity = figures.request_count / figures.seconds
            yield run_json(
                figures,
                server="paceline",
                mode="serve",
                workload=name,
                dtype=dtype,
                runner=runner,
                threads=None if address else thread_count(side, runner),
                turn=turn,
                peak_mib=system.peak_mib(),
                start_s=system.start_s,
            )


class Teller:
    """Reports how far a workload is, now and then."""

    def __init__(self, workload: Workload, report: Report) -> None:
        self._workload = workload
        self._report = report
        self._count = 0
        self._began = self._told = time.perf_counter()
        report(f"{workload.name}: {workload.about}")

    def __call__(self, token_count: int) -> None:
        self._count += token_count
        now = time.perf_counter()
        if now - self._told > _TELL_EVERY_S:
            self._told = now
            speed = self._count / (now - self._began)
            done = f"{self._count:,} of {self._workload.output_count:,} tokens, {speed:,.0f}/s"
            self._report(f"{self._workload.name}: {done}")


@contextmanager
def found(address: str) -> Iterator[System]:
    """A system that runs already."""
    yield System(address)


@contextmanager
def served(side: Side) -> Iterator[System]:
    """Start a system with one executor; ended afterwards."""
    address = f"127.0.0.1:{_free_port()}"
    words = ["serve", side.model, "--executors", "1", "--port", address.rpartition(":")[2], "--http-port", "0"]
    command = [sys.executable, "-m", "paceline_cli", *words, *side.flags()]
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=child_environment(), start_new_session=True
        )
        try:
            _wait_for_executor(address, process, said)
            system = System(address, time.perf_counter() - began)
            system.pids = {"serve": process.pid, **_parts(process.pid)}
            yield system
        finally:
            _end(process)


def child_environment() -> dict[str, str]:
    """Where children find the packages that this process has found."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": paths}


def peak_mib(pid: int | str | None) -> float | None:
    """The most memory that a process has had; None where that cannot be known."""
    kib = peak_kib(pid) if pid is not None else 0
    return round(kib / 1024, 1) if kib else None


def last_lines(said: IO[bytes], count: int = 6) -> str:
    """What a child said last, for an error."""
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-count:])


def _wait_for_executor(address: str, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while not _has_executor(address):
        if (code := process.poll()) is not None:
            how = f"ended with exit code {code} before it answered"
        elif time.monotonic() > deadline:
            how = f"did not answer within {_START_LIMIT_S:.0f} s"
        else:
            time.sleep(_LOOK_EVERY_S)
            continue
        raise BenchmarkError(f"`paceline serve` {how}:\n{last_lines(said)}")


def _has_executor(address: str) -> bool:
    """Looked for with a new connection each time: one that has failed waits a second before it dials again."""
    with Client(address, timeout_s=1.0, max_retries=0) as client:
        try:
            return client.model().executor_count > 0
        except PacelineError:
            return False


def _parts(pid: int) -> dict[str, int]:
    """The processes of the system, by the verb that each was started with."""
    import psutil  # type: ignore[import-untyped]

    children = psutil.Process(pid).children(recursive=True)
    verbs = {child.pid: child.cmdline()[3:4] for child in children}
    return {verb[0]: pid for pid, verb in verbs.items() if verb in (["scheduler"], ["executor"])}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise BenchmarkError(f"`paceline serve` did not end within {_END_LIMIT_S:.0f} s of being asked to") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
