"""The whole system around a runner that has been loaded: a scheduler and users in processes of their own.

This process is the executor, as `paceline executor` would be: loading a model twice would take as long as measuring it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc

from benchmarks import BenchmarkError
from benchmarks.figures import Answer
from benchmarks.gpu.client import Clients
from benchmarks.workloads import Job
from common.processes import run_loop
from executor_svc.batch import Runner
from executor_svc.config import ExecutorConfig
from executor_svc.machine import usable_core_count
from executor_svc.main import ExecutorApp
from paceline.v1 import fleet_pb2, fleet_pb2_grpc

_LOOK_EVERY_S = 0.02
_END_LIMIT_S = 10.0
_MOST_CLIENTS = 4

Heard = Callable[[list[Answer], float], None]
"""Takes the answers of a workload, and the share of the time with work in which the executor had no plan."""


def serve(
    runner: Runner, config: ExecutorConfig, workloads: Sequence[Sequence[Job]], log: Path, on_answers: Heard
) -> None:
    """Serve the runner as an executor while users ask for one workload after the other."""
    run_loop(_serve(runner, config, workloads, log, on_answers))


async def _serve(
    runner: Runner, config: ExecutorConfig, workloads: Sequence[Sequence[Job]], log: Path, on_answers: Heard
) -> None:
    client_count = min(_MOST_CLIENTS, max(1, usable_core_count() // 4))
    config = replace(config, scheduler=f"unix:{log.parent}/scheduler.sock", listen=f"unix:{log.parent}/executor.sock")
    with _scheduler(config, log):
        async with Clients(client_count, log) as clients, grpc.aio.insecure_channel(config.scheduler) as channel:
            fleet = fleet_pb2_grpc.FleetServiceStub(channel)
            for jobs in workloads:
                # Each joins anew, because its idle share counts from when it joined.
                async with _executor(runner, config, fleet):
                    await clients.ask(config.scheduler, [Job(job.prompt[:1], 2) for job in jobs])  # connects
                    answers = await clients.ask(config.scheduler, jobs)
                    listed = await fleet.ListExecutors(fleet_pb2.ListExecutorsRequest())
                on_answers(answers, listed.executors[0].idle_share)


@contextmanager
def _scheduler(config: ExecutorConfig, log: Path) -> Iterator[None]:
    words = ["scheduler", config.model, "--listen", config.scheduler, "--log-level", "warning"]
    with log.open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "paceline_cli", *words], stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@asynccontextmanager
async def _executor(
    runner: Runner, config: ExecutorConfig, fleet: fleet_pb2_grpc.FleetServiceAsyncStub
) -> AsyncIterator[None]:
    """An executor that the scheduler has, until the `async with` is left."""
    stopping = asyncio.Event()
    app = ExecutorApp(config, runner)
    await app.start()
    running = asyncio.create_task(app.run(stopping))
    try:
        while not await _executor_count(fleet):
            if running.done():
                running.result()
                raise BenchmarkError("the executor ended before its scheduler had it")
            await asyncio.sleep(_LOOK_EVERY_S)
        yield
    finally:
        stopping.set()
        await running
        await asyncio.to_thread(app.join_thread)
    while await _executor_count(fleet):
        await asyncio.sleep(_LOOK_EVERY_S)


async def _executor_count(fleet: fleet_pb2_grpc.FleetServiceAsyncStub) -> int:
    request = fleet_pb2.ListExecutorsRequest()
    return len((await fleet.ListExecutors(request, wait_for_ready=True)).executors)
