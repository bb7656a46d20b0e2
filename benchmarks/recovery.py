"""How long a user waits when a process dies: from the kill to the next token, and what happened meanwhile.

A few streams run on fake executors with steps of 20 ms, in real processes over unix sockets. Times are in milliseconds
after the kill, medians over the rounds; what the services saw comes from their logs.

    python benchmarks/recovery.py [--rounds 5] [--model FOLDER]
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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paceline import AsyncClient

STREAMS = 8
PATIENCE_S = 60.0


class Process:
    """A service that can be killed and started again; its log is kept."""

    def __init__(self, log: Path, *words: str) -> None:
        self._log, self._words = log, words
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "paceline_cli", *self._words], stdout=log, stderr=log, env=environment
            )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def first_after(self, event: str, at: float) -> float | None:
        """When an event was logged for the first time after a moment."""
        for line in self._log.read_text().splitlines():
            try:
                entry = json.loads(line)
                logged_at = datetime.fromisoformat(entry["timestamp"]).timestamp()
            except (ValueError, KeyError):
                continue
            if entry["event"] == event and logged_at >= at:
                return logged_at
        return None


@dataclass
class House:
    """A scheduler with a journal, and executors."""

    folder: Path
    model: str
    processes: dict[str, Process] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"unix:{self.folder}/s"

    def start(self, executor_count: int) -> None:
        words = ("--listen", self.address, "--journal", f"{self.folder}/journal.db")
        self.processes["s"] = Process(self.folder / "s.log", "scheduler", self.model, *words)
        for number in range(executor_count):
            self.start_executor(f"e{number}")

    def start_executor(self, name: str) -> None:
        words = ("--scheduler", self.address, "--listen", f"unix:{self.folder}/{name}", "--executor-id", name)
        settings = ("--fake-step-us", "20000", "--threads", "1", "--dtype", "float32", "--cache-memory", "256MiB")
        log = self.folder / f"{name}.log"
        self.processes[name] = Process(log, "executor", self.model, *words, *settings)

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()


async def watch(client: AsyncClient, number: int, arrivals: list[float]) -> None:
    """Read one answer and note when its tokens came."""
    async for chunk in client.generate(f"{number} Once upon a time", max_output_tokens=400, ignore_eos=True):
        if chunk.token_ids:
            arrivals.append(time.time())


async def measure(
    executor_count: int, model: str, harm: Callable[[House], Awaitable[None]], events: list[tuple[str, str, str]]
) -> dict[str, float]:
    """Do harm to running streams; returns milliseconds after it by what is measured."""
    with tempfile.TemporaryDirectory(prefix="paceline-") as name:
        house = House(Path(name), model)
        house.start(executor_count)
        try:
            async with AsyncClient(house.address, timeout_s=PATIENCE_S) as client:
                while True:
                    try:
                        if (await client.model()).executor_count == executor_count:
                            break
                    except Exception:  # noqa: BLE001  not up yet
                        await asyncio.sleep(0.1)
                arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
                readers = [asyncio.create_task(watch(client, n, arrivals[n])) for n in range(STREAMS)]
                while any(len(times) < 20 for times in arrivals):
                    await asyncio.sleep(0.02)
                at = time.time()
                await harm(house)
                while not all(any(moment > at + 0.15 for moment in times) for times in arrivals):
                    await asyncio.sleep(0.05)
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
        finally:
            house.stop()
        gaps = [_pause_after(times, at) for times in arrivals]
        found = {"longest pause of a stream": max(gaps) * 1000, "median pause": statistics.median(gaps) * 1000}
        for label, process, event in events:
            moment = house.processes[process].first_after(event, at)
            if moment is not None:
                found[label] = (moment - at) * 1000
    return found


def _pause_after(times: list[float], at: float) -> float:
    """The longest time without a token around or after a moment."""
    moments = [max(moment for moment in times if moment <= at), *(moment for moment in times if moment > at)]
    return max(later - earlier for earlier, later in pairwise(moments))


async def kill_executor(house: House) -> None:
    """One of two executors vanishes."""
    house.processes["e0"].kill()


async def kill_scheduler(house: House) -> None:
    """The scheduler vanishes and is started again at once, as a supervisor would."""
    house.processes["s"].kill()
    house.processes["s"].start()


async def kill_both(house: House) -> None:
    """Nothing is left but the journal and the clients."""
    for process in house.processes.values():
        process.kill()
    for process in house.processes.values():
        process.start()


LOST = ("executor noticed as lost", "s", "executor detached")
BACK = ("scheduler is back", "s", "scheduler ready")
ATTACHED = ("executor attached again", "s", "executor attached")
CASES = {
    "executor killed, a second one there": (2, kill_executor, [LOST]),
    "scheduler killed and started again": (1, kill_scheduler, [BACK, ATTACHED]),
    "scheduler and the only executor killed and started again": (1, kill_both, [BACK, ATTACHED]),
}


async def run(rounds: int, model: str) -> None:
    """Measure every case and print the table."""
    table = Table("", "what", "median, ms", "range", title=f"{STREAMS} streams, {Path(model).name}, {rounds} rounds")
    for name, (executor_count, harm, events) in CASES.items():
        results = [await measure(executor_count, model, harm, events) for _ in range(rounds)]
        for label in results[0]:
            values = [result[label] for result in results if label in result]
            table.add_row(name, label, f"{statistics.median(values):,.0f}", f"{min(values):,.0f} to {max(values):,.0f}")
            name = ""
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="fake")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.rounds, arguments.model))
