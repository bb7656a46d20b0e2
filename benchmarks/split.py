"""What the split costs: the whole system against the same executor in the scheduler's process.

Both sides have the same public API, the same clients in a process of their own, and the same threads; only the step
stream is replaced by a direct call. They run in turns; the table shows each side's median and their ratio.

    python benchmarks/split.py                        # the fake model, steps of 20 ms
    python benchmarks/split.py --model FOLDER         # a serving folder
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks.offline import capacity_of
from executor_svc.config import ExecutorConfig
from executor_svc.executor import Executor
from executor_svc.main import load_runner
from executor_svc.model_thread import Attachment, ModelThread
from paceline import AsyncClient
from paceline.internal.v1 import executor_pb2 as pb
from paceline.v1 import fleet_pb2, fleet_pb2_grpc
from scheduler_svc import wire
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.core.plan import Inventory, Plan
from scheduler_svc.fleet import ModelLimits
from scheduler_svc.main import SchedulerApp, load_model
from scheduler_svc.observation.step_meter import StepMeter

PROMPT = "Once upon a time there was a scheduler that "


class DirectLink:
    """An executor in the scheduler's process: plans go to its thread as they are, results come back as they are."""

    executor_id = "direct"
    incarnation = 1
    draining = False

    def __init__(self, app: SchedulerApp, config: ExecutorConfig) -> None:
        runner = load_runner(config, lambda _phase, _share: None)
        info = runner.info
        self._app = app
        self.steps = StepMeter()
        self._thread = ModelThread(Executor(runner), asyncio.get_running_loop())
        self._attachment = Attachment(1, "direct", resume=False)
        self._thread.begin(self._attachment)
        app.fleet.limits = ModelLimits(info.context_length, info.vocabulary_size, info.end_token_ids)
        app.engine.attached(self, capacity_of(runner), Inventory(0, ()))
        self._reading = asyncio.create_task(self._read())

    def send(self, plan: Plan) -> None:
        self._thread.submit(self._attachment, wire.encode_plan(plan))

    def acknowledge(self, step: int) -> None:
        """Nobody asks again here."""

    def detach(self) -> None:
        """Nobody drains here."""

    async def _read(self) -> None:
        while True:
            outcome = await self._attachment.outcomes.get()
            if isinstance(outcome, pb.Attached):
                continue
            self.steps.note(wire.decode_phases(outcome.timings), goes_on=True)
            self._app.engine.answered(self, wire.decode_result(outcome))


async def run_in_process(scheduler: SchedulerConfig, executor: ExecutorConfig) -> None:
    """Serve with the executor inside, until killed."""
    app = SchedulerApp(scheduler, *load_model(scheduler))
    await app.start()
    app.direct = DirectLink(app, executor)
    await app.run(asyncio.Event())


async def load(address: str, request_count: int, output_count: int) -> tuple[float, float]:
    """Run the requests at once; returns (tokens per second, median seconds to the first token)."""
    async with AsyncClient(address) as client:

        async def one(number: int) -> tuple[int, float]:
            started = time.perf_counter()
            first = None
            count = 0
            options = {"max_output_tokens": output_count, "ignore_eos": True, "temperature": 0.0}
            async for chunk in client.generate(f"{number} {PROMPT}", **options):
                first = first or time.perf_counter() - started
                count += len(chunk.token_ids)
            return count, first

        started = time.perf_counter()
        answers = await asyncio.gather(*(one(number) for number in range(request_count)))
        elapsed = time.perf_counter() - started
    return sum(count for count, _ in answers) / elapsed, statistics.median(first for _, first in answers)


class Side:
    """One of the two systems, started and ready."""

    def __init__(self, mode: str, folder: Path, executor: dict, **scheduler: object) -> None:
        self.address = f"unix:{folder}/{mode}.sock"
        scheduler |= {"model": executor["model"], "listen": [self.address]}
        settings = {"scheduler": scheduler, "executor": executor | {"scheduler": self.address}}
        settings["executor"]["listen"] = f"unix:{folder}/{mode}-executor.sock"
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        parts = ["in-process"] if mode == "in-process" else ["scheduler", "executor"]
        self._processes = [
            subprocess.Popen([sys.executable, __file__, "--serve", part, json.dumps(settings)], env=environment)
            for part in parts
        ]

    async def ready(self) -> None:
        async with AsyncClient(self.address, max_retries=0) as client:
            while True:
                try:
                    if (await client.model()).context_length:
                        await client.generate("warm", max_output_tokens=4, stream=False)
                        return
                except Exception:  # noqa: BLE001  not up yet
                    await asyncio.sleep(0.2)

    async def idle_share(self) -> float | None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            fleet = fleet_pb2_grpc.FleetServiceStub(channel)
            listed = (await fleet.ListExecutors(fleet_pb2.ListExecutorsRequest())).executors
            return listed[0].idle_share if listed else None

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


async def compare(arguments: argparse.Namespace, executor: ExecutorConfig) -> None:
    """Run both sides in turns and print the table."""
    results: dict[str, list[tuple[float, float]]] = {"in-process": [], "split": []}
    idle: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for turn in range(arguments.turns):
            order = list(results) if turn % 2 == 0 else list(results)[::-1]
            for mode in order:
                side = Side(mode, Path(name), asdict(executor))
                try:
                    await side.ready()
                    results[mode].append(await load(side.address, arguments.requests, arguments.output_tokens))
                    share = await side.idle_share()
                    idle += [] if share is None else [share]
                finally:
                    side.stop()
    title = f"{Path(executor.model).name}: {arguments.requests} requests, {arguments.output_tokens} tokens each"
    table = Table("", "tokens/s", "first token, ms", title=title)
    for mode, runs in results.items():
        speed, first = (statistics.median(column) for column in zip(*runs, strict=True))
        table.add_row(mode, f"{speed:,.0f}", f"{first * 1000:.0f}")
    ratios = [split[0] / whole[0] for whole, split in zip(results["in-process"], results["split"], strict=True)]
    spread = f"{min(ratios):.1%} to {max(ratios):.1%}"
    table.add_row("split / in process", f"{statistics.median(ratios):.1%} ({spread})", "")
    Console().print(table)
    Console().print(f"executor idle with work queued: {statistics.median(idle):.2%} of the time")


def serve(part: str, settings: dict) -> None:
    """Be one of the processes."""
    scheduler = SchedulerConfig(**(settings["scheduler"] | {"listen": tuple(settings["scheduler"]["listen"])}))
    executor = ExecutorConfig(**settings["executor"])
    if part == "in-process":
        from common.processes import run_loop

        run_loop(run_in_process(scheduler, executor))
    elif part == "scheduler":
        from scheduler_svc.main import serve as serve_scheduler

        serve_scheduler(scheduler)
    else:
        from executor_svc.main import serve as serve_executor

        serve_executor(executor)


def serve_if_asked() -> bool:
    """Be one of the processes of a comparison, if this was started as one."""
    if sys.argv[1:2] != ["--serve"]:
        return False
    from common.logs import configure_logs

    configure_logs("benchmark", "error")
    serve(sys.argv[2], json.loads(sys.argv[3]))
    return True


def read_arguments(description: str) -> tuple[argparse.Namespace, ExecutorConfig]:
    """What is compared, from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of the model, so that the rest of the cores stay free")
    parser.add_argument("--fake-step-us", type=float, default=20_000)
    arguments = parser.parse_args()
    executor = ExecutorConfig(
        model=arguments.model, executor_id="e", threads=arguments.threads, fake_step_us=arguments.fake_step_us
    )
    return arguments, executor


def main() -> None:
    """Compare, or be one of the processes of a comparison."""
    if serve_if_asked():
        return
    asyncio.run(compare(*read_arguments(__doc__)))


if __name__ == "__main__":
    main()
