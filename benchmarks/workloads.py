"""The same work for a model's steps in C++ and in torch: the whole system, one executor, clients in this process.

    python benchmarks/workloads.py [MODEL] --turns 3         # a serving folder, or what `paceline serve` takes

W1: 64 requests at once, prompts log-uniform from 16 to 512 tokens, outputs uniform from 16 to 128. W2: 64 requests that
share 512 tokens and have 32 of their own, 32 to generate. W4: one stream, 128 in, 128 out. Prompts are random tokens,
the same in every run; nothing ends early. Both sides run in turns.
"""

import argparse
import asyncio
import math
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.table import Table

from paceline import AsyncClient, Client

_VOCABULARY = 40_000  # ids below it are ordinary tokens of every model that this is for
_START_LIMIT_S = 120


@dataclass(frozen=True)
class Job:
    """One request."""

    prompt: list[int]
    output_count: int


def w1(draw: random.Random) -> list[Job]:
    """Many different requests at once."""
    lengths = [round(math.exp(draw.uniform(math.log(16), math.log(512)))) for _ in range(64)]
    return [Job(_tokens(draw, length), draw.randint(16, 128)) for length in lengths]


def w2(draw: random.Random) -> list[Job]:
    """Many requests that begin alike."""
    shared = _tokens(draw, 512)
    return [Job(shared + _tokens(draw, 32), 32) for _ in range(64)]


def w4(draw: random.Random) -> list[Job]:
    """One stream."""
    return [Job(_tokens(draw, 128), 128)]


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(_VOCABULARY) for _ in range(count)]


WORKLOADS: dict[str, Callable[[random.Random], list[Job]]] = {"W1": w1, "W2": w2, "W4": w4}


@contextmanager
def served(model: str, port: int, flags: list[str]) -> Iterator[tuple[str, float, psutil.Process]]:
    """A whole system; gives its address, the seconds until it was ready, and the executor's process."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "paceline_cli", "serve", model, "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"127.0.0.1:{port}"
        with Client(address) as client:
            while not _is_ready(client):
                if process.poll() is not None or time.perf_counter() - began > _START_LIMIT_S:
                    raise SystemExit(f"it did not start: {' '.join(command)}")
                time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        executor = next(child for child in children if re.search(r"\bexecutor\b", " ".join(child.cmdline())))
        yield address, time.perf_counter() - began, executor
    finally:
        process.terminate()
        process.wait()


def _is_ready(client: Client) -> bool:
    try:
        return client.model().executor_count == 1
    except Exception:  # noqa: BLE001  not there yet
        return False


async def run(address: str, jobs: list[Job]) -> float:
    """Output tokens per second."""
    async with AsyncClient(address) as client:

        async def ask(job: Job) -> None:
            await client.generate(job.prompt, max_output_tokens=job.output_count, ignore_eos=True, stream=False)

        began = time.perf_counter()
        await asyncio.gather(*map(ask, jobs))
        return sum(job.output_count for job in jobs) / (time.perf_counter() - began)


def measure(model: str, port: int, flags: list[str]) -> dict[str, float]:
    """One start of one side, and all workloads on it."""
    with served(model, port, flags) as (address, start_s, executor):
        asyncio.run(run(address, [Job([1, 2, 3], 8)]))
        figures = {"start, s": start_s}
        for name, make in WORKLOADS.items():
            figures[f"{name}, tokens/s"] = asyncio.run(run(address, make(random.Random(name))))
        figures["executor, MiB"] = executor.memory_info().rss / 2**20
        return figures


def main() -> None:
    """Measure both sides in turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--port", type=int, default=50151)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", default="0")
    arguments = parser.parse_args()
    common = ["--executors", "1", "--dtype", arguments.dtype, "--threads", arguments.threads, "--max-num-seqs", "64"]
    sides: dict[str, list[dict[str, float]]] = {"--no-native": [], "--native": []}
    for _ in range(arguments.turns):
        for flag, figures in sides.items():
            figures.append(measure(arguments.model, arguments.port, [*common, flag]))
    table = Table("", "in torch", "in C++", "C++ / torch", title=f"{arguments.model}, {arguments.dtype}")
    for name in sides["--native"][0]:
        torch, native = (statistics.median(one[name] for one in sides[flag]) for flag in sides)
        table.add_row(name, f"{torch:,.1f}", f"{native:,.1f}", f"{native / torch:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
