"""Whether memory grows with the requests that were served: a scheduler and an executor that computes nothing.

    python benchmarks/growth.py --requests 200000 --journal off

Rounds of equally many requests, 64 at a time, each with a prompt of its own; after each round what both processes hold.
The least squares line over the second half of the rounds says how many bytes stay for each request: ended ones are kept
for a while, so the first half must last longer than that.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from benchmarks.serving import served
from benchmarks.wanted import Side
from paceline import AsyncClient

CLIENTS = 64
PROMPT_COUNT, OUTPUT_COUNT = 20, 4


async def ask(address: str, first: int, count: int) -> None:
    """Make `count` requests, `CLIENTS` at a time."""
    numbers = iter(range(first, first + count))

    async def one(client: AsyncClient) -> None:
        for number in numbers:
            prompt = [3 + number // 30**digit % 30 for digit in range(PROMPT_COUNT)]
            await client.generate(prompt, max_output_tokens=OUTPUT_COUNT, ignore_eos=True, stream=False)

    async with AsyncClient(address, max_retries=0) as client:
        await asyncio.gather(*(one(client) for _ in range(CLIENTS)))


def slope(counts: list[int], held: list[int]) -> float:
    """Bytes for each request, over the second half: caches and pools fill in the first."""
    half = len(counts) // 2
    return statistics.linear_regression(counts[half:], held[half:]).slope if len(counts) - half > 1 else float("nan")


@dataclass(frozen=True, slots=True)
class Fake(Side):
    """Steps of 2 ms that compute nothing."""

    model: str = "fake"
    journal: str = "off"  # or a folder

    def flags(self) -> list[str]:
        """What `paceline serve` gets."""
        return ["--fake-step-us", "2000", "--max-num-seqs", str(CLIENTS), "--journal", self.journal]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--journal", default="on", choices=["on", "off"])
    arguments = parser.parse_args()
    each = arguments.requests // arguments.rounds
    table = Table("requests", "scheduler, MiB", "executor, MiB", "requests/s")
    counts: list[int] = []
    held: dict[str, list[int]] = {"scheduler": [], "executor": []}
    with tempfile.TemporaryDirectory() as folder:
        journal = "off" if arguments.journal == "off" else f"{folder}/journal"
        with served(Fake(journal=journal)) as system:
            for number in range(arguments.rounds):
                began = time.perf_counter()
                asyncio.run(ask(system.address, number * each, each))
                speed = each / (time.perf_counter() - began)
                counts.append((number + 1) * each)
                for name, values in held.items():
                    values.append(psutil.Process(system.pids[name]).memory_info().rss)
                table.add_row(
                    f"{counts[-1]:,}", *(f"{values[-1] / 2**20:.1f}" for values in held.values()), f"{speed:,.0f}"
                )
    table.add_row("bytes a request", *(f"{slope(counts, values):.1f}" for values in held.values()), "")
    Console().print(table)


if __name__ == "__main__":
    main()
