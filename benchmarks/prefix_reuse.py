"""What prefix reuse costs and saves.

    python benchmarks/prefix_reuse.py                     # lookups; the shared-prefix workload, by the scheduler alone
    python benchmarks/prefix_reuse.py --model FOLDER      # the same workload on a real model, with and without reuse

The workload: 64 requests at once that share 512 tokens, each with 32 of its own, 32 tokens of output.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from array import array
from collections import deque
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.split import Side
from executor_svc.config import ExecutorConfig
from paceline import AsyncClient
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, Result
from scheduler_svc.core.request import Request
from scheduler_svc.core.scheduler import Scheduler

LOOKUP_TOKENS = 32 * 1024
SHARED, OWN, OUTPUT = 512, 32, 32
GROUPS = {
    "full attention": (LayerGroup(16),),
    "hybrid, 5 of 6 layers with a window of 512": (LayerGroup(80), LayerGroup(16, window=512)),
}


def prompts(count: int) -> list[list[int]]:
    """Prompts that begin alike."""
    draw = random.Random(3)
    shared = [draw.randrange(40_000) for _ in range(SHARED)]
    return [[*shared, *(draw.randrange(40_000) for _ in range(OWN))] for _ in range(count)]


def lookups(groups: tuple[LayerGroup, ...]) -> list[float]:
    """Milliseconds to look a prompt of 32k tokens up: nothing there, all there, all there and hashed before."""
    scheduler = Scheduler()
    scheduler.join("e", Capacity(groups, 3 * LOOKUP_TOKENS // 16, 4, LOOKUP_TOKENS))
    cache = scheduler.executors["e"].cache
    token_ids = array("I", random.Random(1).choices(range(50_000), k=LOOKUP_TOKENS))

    def find(request: Request) -> float:
        started = time.perf_counter()
        cache.find_prefix(request)
        return (time.perf_counter() - started) * 1000

    def fresh() -> Request:
        return Request("r", token_ids[:], LOOKUP_TOKENS, 1)

    missing = statistics.median(find(fresh()) for _ in range(20))
    scheduler.add(Request("first", token_ids[:], LOOKUP_TOKENS, 1))
    while scheduler.request_count:
        plan = scheduler.plan("e", 0.0)
        scheduler.apply("e", Result(plan.step, [7] * len(plan.rows)))
    there = statistics.median(find(fresh()) for _ in range(20))
    request = fresh()
    find(request)
    return [missing, there, statistics.median(find(request) for _ in range(20))]


def computed_tokens(groups: tuple[LayerGroup, ...], reuse: bool, count: int) -> tuple[int, int, int]:
    """Prompt tokens that the executor computes for the workload, those that it is spared, and its steps."""
    scheduler = Scheduler(reuse=reuse)
    scheduler.join("e", Capacity(groups, 4096, 64, 512))
    for number, prompt in enumerate(prompts(count)):
        scheduler.add(Request(f"r{number}", array("I", prompt), len(prompt), OUTPUT))
    computed = step_count = 0
    plans: deque = deque()
    while scheduler.request_count:
        while (plan := scheduler.plan("e", 0.0)) is not None:
            plans.append(plan)
            computed += sum(chunk.count for chunk in plan.chunks)
        plan = plans.popleft()
        scheduler.apply("e", Result(plan.step, [step_count * 64 + row for row in range(len(plan.rows))]))
        step_count += 1
    return computed, scheduler.executors["e"].reused_count, step_count


async def run_model(folder: str, reuse: bool, count: int, threads: int) -> tuple[float, float, float]:
    """Seconds for the workload on a real model, output tokens a second, and the share of prompts from the cache."""
    executor = ExecutorConfig(model=folder, executor_id="e", threads=threads)
    with tempfile.TemporaryDirectory() as name:
        side = Side("split", Path(name), asdict(executor), prefix_reuse=reuse)
        try:
            await side.ready()
            async with AsyncClient(side.address) as client:
                options = {"max_output_tokens": OUTPUT, "ignore_eos": True, "temperature": 0.0, "stream": False}
                started = time.perf_counter()
                outputs = await asyncio.gather(*(client.generate(prompt, **options) for prompt in prompts(count)))
                seconds = time.perf_counter() - started
        finally:
            side.stop()
    cached = sum(output.usage.cached_prompt_token_count for output in outputs)
    return seconds, count * OUTPUT / seconds, cached / (count * (SHARED + OWN))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a serving folder")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    console = Console()
    if arguments.model:
        table = Table("", "seconds", "output tokens/s", "prompt tokens from the cache")
        for reuse in (False, True):
            seconds, speed, cached = asyncio.run(
                run_model(arguments.model, reuse, arguments.requests, arguments.threads)
            )
            table.add_row("reuse" if reuse else "no reuse", f"{seconds:.1f}", f"{speed:.0f}", f"{cached:.1%}")
        console.print(table)
        return
    table = Table("lookup of 32k tokens, ms", "nothing there", "all there", "... and hashed before")
    for name, groups in GROUPS.items():
        table.add_row(name, *(f"{value:.2f}" for value in lookups(groups)))
    console.print(table)
    table = Table(
        "64 requests, 512 shared tokens", "prompt tokens computed", "without reuse", "hit rate", "saved", "steps"
    )
    for name, groups in GROUPS.items():
        computed, reused, steps = computed_tokens(groups, True, arguments.requests)
        without, _, steps_without = computed_tokens(groups, False, arguments.requests)
        rates = (reused / without, 1 - computed / without)
        table.add_row(
            name, f"{computed:,}", f"{without:,}", *(f"{rate:.1%}" for rate in rates), f"{steps} / {steps_without}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
