"""How long users wait while executors come and go: from nothing to the first token, and through a wave of load.

    python benchmarks/scaling.py zero [--rounds 5] [--model fake] [--load-s 2]     first token after zero
    python benchmarks/scaling.py wave [--most 4] [--policy slo|threshold|concurrency]   from none to the most and back
    python benchmarks/scaling.py wave --kill-every 4      the same, and a process is killed again and again

Real processes: `paceline serve` with an autoscaler. Fake executors have steps of 20 ms + 0.2 ms a token and 8 slots;
`--load-s` is what loading their model would take.
"""

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import psutil
from rich.console import Console
from rich.table import Table

from paceline import AsyncClient

PATIENCE_S = 180.0
POLICIES = {
    "slo": "{kind: slo, down_window: 5s}",
    "threshold": "{kind: threshold, target: 6, down_window: 5s}",
    "concurrency": "{kind: concurrency, target: 8, stable_window: 5s, panic_window: 1s}",
}
SCALING = """
executors: {{min: 0, max: {most}}}
targets: {{first_token: 1s, per_token: 60ms}}
policies: [{policy}]
cooldowns: {{down: 3s, zero: 3s}}
times: {{finish: 5s}}
"""


class Served:
    """A running `paceline serve` with an autoscaler."""

    def __init__(self, folder: Path, model: str, scaling: str, load_s: float) -> None:
        file, self._printed = folder / "scaling.yaml", folder / "printed"
        file.write_text(scaling)
        words = ["serve", model, "--port", "0", "--scaling", str(file), "--log-level", "info"]
        fake = ["--fake-step-us", "20000", "--fake-token-us", "200", "--fake-load-us", str(round(load_s * 1e6))]
        words += [*fake, "--max-num-seqs", "8"] if model == "fake" else []
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        with self._printed.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "paceline_cli", *words], stdout=out, stderr=out, env=environment
            )

    @property
    def printed(self) -> str:
        return self._printed.read_text(errors="replace")

    async def address(self) -> str:
        """Where it is ready."""
        return (await self.wait_for(r"ready at (\S+)"))[-1]

    async def wait_for(self, pattern: str, count: int = 1) -> list[str]:
        """What was printed that matches, once it is there so often."""
        async with asyncio.timeout(PATIENCE_S):
            while len(found := re.findall(pattern, self.printed)) < count:
                await asyncio.sleep(0.02)
        return found

    def kill_one(self, random: Random) -> str:
        """Kill a child, whichever; returns what it was."""
        child = random.choice(sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.pid))
        words = child.cmdline()
        child.kill()
        return words[words.index("paceline_cli") + 1] if "paceline_cli" in words else "child"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


async def first_token_s(client: AsyncClient, text: str) -> float:
    """Seconds until the first text."""
    began_at = time.perf_counter()
    async for _ in client.generate(text, max_output_tokens=8):
        return time.perf_counter() - began_at
    raise AssertionError("an answer without a token")


async def zero(options: argparse.Namespace, folder: Path) -> Table:
    """Ask when nobody is there, again and again."""
    policy = POLICIES["slo"].replace("5s", "1s")
    scaling = SCALING.format(most=1, policy=policy).replace("zero: 3s", "zero: 1s").replace("down: 3s", "down: 1s")
    served, rows = Served(folder, options.model, scaling, options.load_s), []
    try:
        async with AsyncClient(await served.address()) as client:
            for turn in range(options.rounds):
                while (await client.model()).executor_count:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(1.0)
                waited_s = await first_token_s(client, f"Round {turn} of many")
                startup_s = float(
                    (await served.wait_for(r"executor ready executor_id=\S+ age_s=([0-9.]+)", turn + 1))[-1]
                )
                rows.append((waited_s, startup_s))
                print(f"round {turn + 1}: first token after {waited_s:.2f} s, executor ready after {startup_s:.1f} s")
    finally:
        served.stop()
    table = Table("", "median", "longest", box=None)
    for name, values in (
        ("first token", [waited for waited, _ in rows]),
        ("executor ready after its launch", [startup for _, startup in rows]),
        ("the difference", [waited - startup for waited, startup in rows]),
    ):
        table.add_row(name, f"{statistics.median(values):.2f} s", f"{max(values):.2f} s")
    return table


async def person(client: AsyncClient, until: float, waits: list[float], tokens: list[int]) -> None:
    """Somebody who asks, reads, and asks again."""
    number = 0
    while time.perf_counter() < until:
        began_at, first_s, count = time.perf_counter(), None, 0
        async for chunk in client.generate(f"Question {number} of {id(waits)}", max_output_tokens=60):
            first_s = first_s if first_s is not None else time.perf_counter() - began_at
            count += len(chunk.token_ids)
        waits.append(first_s or 0.0)
        tokens.append(count)
        number += 1


async def killer(served: Served, every_s: float, until: float, killed: list[str]) -> None:
    """Kill one of the processes, whichever, again and again."""
    random = Random(7)
    while time.perf_counter() + every_s < until:
        await asyncio.sleep(every_s)
        killed.append(served.kill_one(random))


async def wave(options: argparse.Namespace, folder: Path) -> Table:
    """People come in three lots, and leave."""
    scaling = SCALING.format(most=options.most, policy=POLICIES[options.policy])
    served = Served(folder, options.model, scaling, options.load_s)
    waits: list[float] = []
    tokens: list[int] = []
    killed: list[str] = []
    try:
        async with AsyncClient(await served.address()) as client:
            began_at = time.perf_counter()
            people = []
            for start_s, count in ((0, 2), (15, 10), (30, 14), (60, -1)):
                await asyncio.sleep(max(0.0, began_at + start_s - time.perf_counter()))
                until = began_at + (60 if start_s else 75)
                people += [asyncio.create_task(person(client, until, waits, tokens)) for _ in range(count)]
                if not start_s and options.kill_every:
                    people.append(asyncio.create_task(killer(served, options.kill_every, began_at + 70, killed)))
            await asyncio.gather(*people)
            while (await client.model()).executor_count:
                await asyncio.sleep(0.1)
            seconds = time.perf_counter() - began_at
    finally:
        served.stop()
    wanted = [int(count) for count in re.findall(r"decided wanted=(\d+)", served.printed)]
    path = " ".join(str(count) for count, before in zip(wanted, [None, *wanted], strict=False) if count != before)
    table = Table("", options.policy, box=None)
    quantiles = statistics.quantiles(waits, n=100)
    for name, value in (
        ("requests, failed", f"{len(waits)}, 0"),
        ("whole answers", f"{sum(count == 60 for count in tokens)} of {len(tokens)}"),
        ("first token p50, p95, longest", f"{quantiles[49]:.2f}, {quantiles[94]:.2f}, {max(waits):.2f} s"),
        ("killed", ", ".join(f"{killed.count(name)} {name}" for name in sorted(set(killed))) or "nobody"),
        ("wanted, in turn", path),
        (
            "launches, drains",
            f"{len(re.findall(r' launch node_type', served.printed))}, "
            f"{len(re.findall(r' drain executor_id', served.printed))}",
        ),
        ("until nobody was there", f"{seconds:.0f} s"),
    ):
        table.add_row(name, value)
    return table


def main() -> None:
    """Run what the command line says and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["zero", "wave"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--load-s", type=float, default=2.0)
    parser.add_argument("--most", type=int, default=4)
    parser.add_argument("--policy", choices=POLICIES, default="slo")
    parser.add_argument("--kill-every", type=float, default=0.0, metavar="SECONDS")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = asyncio.run({"zero": zero, "wave": wave}[options.what](options, Path(folder)))
    Console().print(table)


if __name__ == "__main__":
    main()
