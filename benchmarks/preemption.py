"""What a cache that is too small costs: tokens computed again after preemptions, with and without prefix reuse.

What is computed again is all that swapping blocks to host memory could save, so this also says what that would be
worth; `--swap` measures both on this machine: copying a request's blocks out and back against computing them again.

    python benchmarks/preemption.py
    python benchmarks/preemption.py --swap FOLDER         # a serving folder
"""

import argparse
import random
import statistics
import time
from array import array
from collections import deque

import numpy as np
from rich.console import Console
from rich.table import Table

from executor_svc.batch import SamplingBatch, StepBatch
from scheduler_svc.core.executor import Executor
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, Result
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.request import Request
from scheduler_svc.core.scheduler import Scheduler

SWAPPED, CHUNK = 2048, 512
LOOKS_AHEAD = Executor.will_have_room_for
# policy, reuse, whether a request starts by the outlook, or wherever it fits
CASES = [
    ("fifo", True, True),
    ("fifo", False, True),
    ("fifo", True, False),
    ("fifo", False, False),
    ("prefill_first", True, True),
    ("priority", True, True),
]
FULL = (LayerGroup(16),)
HYBRID = (LayerGroup(16), LayerGroup(16, window=128))
# name, layer groups, blocks, requests, prompt tokens, output tokens
WORKLOADS = [
    ("five times the pool at once", FULL, 256, 96, (50, 200), (100, 400)),
    ("... hybrid model", HYBRID, 400, 96, (50, 200), (100, 400)),
    ("outputs of half the pool", FULL, 64, 96, (16, 64), (400, 800)),
]


def run(policy: str, reuse: bool, workload: tuple, looks_ahead: bool = True) -> tuple[float, int, int, float]:
    """(recomputed over useful tokens, preemptions, steps, mean share of the pool in use)."""
    Executor.will_have_room_for = LOOKS_AHEAD if looks_ahead else lambda *_: True
    _, groups, block_count, count, prompt_range, output_range = workload
    scheduler, draw = Scheduler(make_policy(policy), reuse=reuse), random.Random(1)
    scheduler.join("e", Capacity(groups, block_count, 64, 512))
    requests = []
    for number in range(count):
        prompt = array("I", [draw.randrange(50_000) for _ in range(draw.randint(*prompt_range))])
        requests.append(Request(f"r{number}", prompt, len(prompt), draw.randint(*output_range), priority=number % 3))
        scheduler.add(requests[-1])
    computed = step_count = 0
    used: list[float] = []
    plans: deque = deque()
    while scheduler.request_count:
        while (plan := scheduler.plan("e", float(step_count))) is not None:
            plans.append(plan)
            computed += plan.token_count
        plan = plans.popleft()
        scheduler.apply("e", Result(plan.step, [step_count * 64 + row for row in range(len(plan.rows))], seconds=0.02))
        step_count += 1
        used.append(1 - scheduler.executors["e"].cache.pool.free_count / block_count)
    useful = sum(request.prompt_count + request.output_count - 1 for request in requests)
    preemptions = sum(request.placement_count - 1 for request in requests)
    return computed / useful - 1, preemptions, step_count, statistics.fmean(used)


def swap(folder: str) -> Table:
    """Tokens a second by computing them in chunks of 512, and by copying their keys and values out and back."""
    from executor_svc.config import ExecutorConfig
    from executor_svc.torch_runner import TorchRunner

    runner = TorchRunner.load(ExecutorConfig(model=folder, device="cpu"), lambda _phase, _share: None)
    groups = runner.info.layer_groups
    tables = tuple(np.arange(-(-SWAPPED // group.block_size), dtype=np.int32)[None] for group in groups)
    started = time.perf_counter()
    for start in range(0, SWAPPED, CHUNK):
        runner.run(_chunk(start, tables))
    computed = SWAPPED / (time.perf_counter() - started)
    block_count = max(table.shape[1] for table in tables)
    started = time.perf_counter()
    copies = [plane[:block_count].clone() for plane in runner._pool.planes]
    for plane, copy in zip(runner._pool.planes, copies, strict=True):
        plane[:block_count] = copy
    copied = SWAPPED / (time.perf_counter() - started)
    table = Table(f"{runner.info.name}, {runner.info.dtype}", "tokens/s")
    table.add_row(f"computed again, chunks of {CHUNK}", f"{computed:,.0f}")
    table.add_row("copied out and back", f"{copied:,.0f}")
    return table


def _chunk(start: int, tables: tuple) -> StepBatch:
    """The step that computes tokens [start, start + CHUNK) of one request and samples none."""
    none = np.zeros(0, dtype=np.int64)
    sampling = SamplingBatch(none, none, none, none, none, none, none, none)
    return StepBatch(
        slots=np.zeros(1, dtype=np.int64),
        token_ids=np.arange(start, start + CHUNK) % 40_000,
        query_lengths=np.array([CHUNK]),
        context_lengths=np.array([start + CHUNK]),
        block_tables=tables,
        sampling=sampling,
    )


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swap", help="a serving folder", metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.swap:
        Console().print(swap(arguments.swap))
        return
    table = Table(
        "workload", "policy", "reuse", "starts who", "recomputed / useful", "preemptions", "steps", "pool in use"
    )
    for workload in WORKLOADS:
        for policy, reuse, looks_ahead in CASES:
            share, preemptions, steps, used = run(policy, reuse, workload, looks_ahead)
            figures = (f"{share:.1%}", str(preemptions), f"{steps:,}", f"{used:.0%}")
            table.add_row(workload[0], policy, "yes" if reuse else "no", "outlook" if looks_ahead else "fits", *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
