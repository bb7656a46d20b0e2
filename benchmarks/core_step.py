"""How long the scheduler needs for a step, by requests that run, requests that wait, and executors.

    python benchmarks/core_step.py                    # steady decoding: plan, apply, encode
    python benchmarks/core_step.py --growth           # ten times the queue, ten times the executors
    python benchmarks/core_step.py --memory           # bytes of a waiting request

Requests have prompts of their own, of different lengths, so that in each step some of them fill a block and need
another. Two plans are in flight. `--hybrid` gives the model a second layer group with a window.
"""

import argparse
import gc
import random
import statistics
import time
import tracemalloc
from array import array
from collections import deque
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from scheduler_svc import wire
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, Plan, Result
from scheduler_svc.core.request import Request
from scheduler_svc.core.scheduler import Scheduler

STEP_COUNT = 400
RUNNING = (16, 64, 256, 1024)
WAITING = (10, 1_000, 100_000)
FULL = (LayerGroup(16),)
HYBRID = (LayerGroup(96), LayerGroup(16, window=512))


def request(number: int, draw: random.Random, output_count: int = 3 * STEP_COUNT) -> Request:
    """A request with a prompt of 100 to 115 tokens that no other has."""
    prompt = array("I", [draw.randrange(50_000) for _ in range(100 + number % 16)])
    return Request(f"r{number}", prompt, len(prompt), output_count, stop_token_ids=frozenset({2}))


def decoding_scheduler(running_count: int, waiting_count: int, groups: tuple[LayerGroup, ...]) -> Scheduler:
    """A scheduler with one executor on which `running_count` requests decode, and `waiting_count` more in the queue."""
    scheduler, draw = Scheduler(), random.Random(1)
    scheduler.join("e", Capacity(groups, running_count * 200, running_count, 200 * running_count))
    for number in range(running_count + waiting_count):
        scheduler.add(request(number, draw))
    while len(scheduler.executors["e"].running) < running_count or scheduler.executors["e"].catching_up:
        plan = must_plan(scheduler)
        scheduler.apply("e", Result(plan.step, [7] * len(plan.rows)))
    return scheduler


def must_plan(scheduler: Scheduler) -> Plan:
    """The next plan where there is work."""
    plan = scheduler.plan("e", 0.0)
    assert plan is not None, "every request has tokens left"
    return plan


def measure(running_count: int, waiting_count: int, groups: tuple[LayerGroup, ...]) -> list[list[float]]:
    """Microseconds of every step's plan, encoding and apply."""
    scheduler = decoding_scheduler(running_count, waiting_count, groups)
    plans = deque([must_plan(scheduler)])
    times: list[list[float]] = [[], [], []]
    for number in range(STEP_COUNT):
        started = time.perf_counter()
        plan = must_plan(scheduler)
        planned = time.perf_counter()
        wire.encode_plan(plan).SerializeToString()
        encoded = time.perf_counter()
        plans.append(plan)
        answered = plans.popleft()
        result = Result(answered.step, [7 + number] * len(answered.rows), seconds=0.02)
        applying = time.perf_counter()
        scheduler.apply("e", result)
        applied = time.perf_counter()
        for column, seconds in zip(times, (planned - started, encoded - planned, applied - applying), strict=True):
            column.append(seconds * 1e6)
    return times


def steady(running_counts: Sequence[int], waiting_counts: Sequence[int], hybrid: bool = False) -> Table:
    """Plan and apply for each load."""
    table = Table("running", "waiting", "plan µs", "apply µs", "plan + apply µs", "p99 µs", "encode µs")
    groups = HYBRID if hybrid else FULL
    for running in running_counts:
        for waiting in waiting_counts:
            plan, encode, apply = measure(running, waiting, groups)
            both = sorted(map(sum, zip(plan, apply, strict=True)))
            medians = [statistics.median(column) for column in (plan, apply, both)]
            row = [*medians, both[int(0.99 * len(both))], statistics.median(encode)]
            table.add_row(f"{running:,}", f"{waiting:,}", *(f"{value:.0f}" for value in row))
    return table


def busy_fleet(executor_count: int, waiting_count: int, step_count: int) -> tuple[float, float]:
    """Microseconds of a plan, median and mean, where requests come and go: each has 20 tokens to generate.

    With nobody waiting, a request comes for each that ends, so that every executor runs half of what it could.
    """
    scheduler, draw = Scheduler(), random.Random(1)
    names = [f"e{number}" for number in range(executor_count)]
    for name in names:
        scheduler.join(name, Capacity(FULL, 400, 32, 2048))
    arrived = 0
    for _ in range(16 * executor_count + waiting_count + (16 * executor_count if waiting_count else 0)):
        scheduler.add(request(arrived, draw, 20))
        arrived += 1
    times: list[float] = []
    plans: dict[str, deque] = {name: deque() for name in names}
    for step in range(step_count):
        for name in names:
            started = time.perf_counter()
            plan = scheduler.plan(name, 0.0)
            if plan is not None:
                times.append((time.perf_counter() - started) * 1e6)
                plans[name].append(plan)
            if len(plans[name]) < 2 and plan is not None:
                continue
            answered = plans[name].popleft()
            outputs = scheduler.apply(name, Result(answered.step, [7 + step] * len(answered.rows), seconds=0.02))
            for _ in outputs.finished:
                scheduler.add(request(arrived, draw, 20))
                arrived += 1
    steady_times = times[len(times) // 3 :]
    return statistics.median(steady_times), statistics.fmean(steady_times)


def growth() -> Table:
    """Plan time where the queue, or the fleet, is ten times as large."""
    table = Table("executors", "waiting", "plan µs, median", "mean")
    for executor_count, waiting_count in ((10, 0), (100, 0), (10, 1_000), (10, 10_000), (100, 10_000), (10, 100_000)):
        median, mean = busy_fleet(executor_count, waiting_count, 80)
        table.add_row(f"{executor_count:,}", f"{waiting_count:,}", f"{median:.0f}", f"{mean:.0f}")
    return table


def memory(request_count: int = 10_000, prompt_count: int = 100) -> Table:
    """Bytes that the core holds for a waiting request, beyond 4 for each of its tokens."""
    scheduler = Scheduler()
    scheduler.join("e", Capacity(FULL, 64, 1, 512))
    gc.collect()
    tracemalloc.start()
    for number in range(request_count):
        prompt = array("I", range(number, number + prompt_count))
        scheduler.add(Request(f"req-{number:032x}", prompt, prompt_count, 100, stop_token_ids=frozenset({2})))
    scheduler.plan("e", 0.0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    table = Table("waiting", "bytes each", "beyond its tokens")
    each = held / request_count
    table.add_row(f"{request_count:,}", f"{each:,.0f}", f"{each - 4 * prompt_count:,.0f}")
    return table


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="*", default=RUNNING)
    parser.add_argument("--waiting", type=int, nargs="*", default=WAITING)
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.growth or arguments.memory:
        table = growth() if arguments.growth else memory()
    else:
        table = steady(arguments.running, arguments.waiting, arguments.hybrid)
    Console().print(table)


if __name__ == "__main__":
    main()
