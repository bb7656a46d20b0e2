"""What the journal costs: the whole system with it against the same without, in turns.

Clients stream from a process of their own, and every request outlives its call, so that each token is written down
before it is told.

    python benchmarks/journal.py                        # the fake model, steps of 20 ms
    python benchmarks/journal.py --fake-step-us 2000    # ten times the tokens
    python benchmarks/journal.py --model FOLDER         # a serving folder
"""

import argparse
import asyncio
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.split import Side, load, read_arguments, serve_if_asked
from executor_svc.config import ExecutorConfig


def size_of(folder: Path) -> int:
    """Bytes of the journal's files."""
    return sum(file.stat().st_size for file in folder.glob("journal.db*"))


async def compare(arguments: argparse.Namespace, executor: ExecutorConfig) -> None:
    """Run both sides in turns and print the table."""
    results: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    sizes = []
    for turn in range(arguments.turns):
        order = list(results) if turn % 2 == 0 else list(results)[::-1]
        for mode in order:
            with tempfile.TemporaryDirectory() as name:
                journal = Path(name) / "journal.db"
                side = Side("split", Path(name), asdict(executor), journal=str(journal) if mode == "on" else "off")
                try:
                    await side.ready()
                    results[mode].append(await load(side.address, arguments.requests, arguments.output_tokens))
                finally:
                    side.stop()
                if mode == "on":
                    sizes.append(size_of(Path(name)))
    title = f"{Path(executor.model).name}: {arguments.requests} requests, {arguments.output_tokens} tokens each"
    table = Table("journal", "tokens/s", "first token, ms", title=title)
    for mode, runs in results.items():
        speed, first = (statistics.median(column) for column in zip(*runs, strict=True))
        table.add_row(mode, f"{speed:,.0f}", f"{first * 1000:.0f}")
    ratios = [on[0] / off[0] for off, on in zip(results["off"], results["on"], strict=True)]
    table.add_row("on / off", f"{statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})", "")
    Console().print(table)
    Console().print(f"files of the journal afterwards: {statistics.median(sizes) / 2**20:.1f} MiB")


def main() -> None:
    """Compare, or be one of the processes of a comparison."""
    if serve_if_asked():
        return
    asyncio.run(compare(*read_arguments(__doc__)))


if __name__ == "__main__":
    main()
