"""How long the scheduler needs for a step: `plan` and `apply` with steadily decoding requests, and wire encoding."""

import argparse
import statistics
import time
from array import array

from rich.console import Console
from rich.table import Table

from scheduler_svc import wire
from scheduler_svc.core.plan import Capacity, Result
from scheduler_svc.core.request import Request
from scheduler_svc.core.scheduler import Scheduler

STEP_COUNT = 400
PROMPT = array("I", range(100))


def decoding_scheduler(running_count: int, waiting_count: int) -> Scheduler:
    """A scheduler with one executor on which `running_count` requests decode, and `waiting_count` more in the queue."""
    scheduler = Scheduler()
    tokens = len(PROMPT) + 4 * STEP_COUNT
    scheduler.join("e", Capacity(16, running_count * (tokens // 16 + 1), running_count, 100 * running_count))
    for number in range(running_count + waiting_count):
        scheduler.add(Request(f"r{number}", PROMPT[:], len(PROMPT), 3 * STEP_COUNT, stop_token_ids=frozenset({2})))
    return scheduler


def measure(running_count: int, waiting_count: int) -> tuple[list[float], list[float], list[float]]:
    """Microseconds of every step's plan, encoding and apply, two plans in flight, once everybody decodes."""
    scheduler = decoding_scheduler(running_count, waiting_count)
    plans = [scheduler.plan("e", 0.0)]
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(STEP_COUNT):
        started = time.perf_counter()
        plan = scheduler.plan("e", 0.0)
        planned = time.perf_counter()
        wire.encode_plan(plan).SerializeToString()
        encoded = time.perf_counter()
        plans.append(plan)
        answered = plans.pop(0)
        result = Result(answered.step, [7] * len(answered.rows))
        applying = time.perf_counter()
        scheduler.apply("e", result)
        applied = time.perf_counter()
        for column, seconds in zip(times, (planned - started, encoded - planned, applied - applying), strict=True):
            column.append(seconds * 1e6)
    return times


def main() -> None:
    """Print one row for each load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, nargs="*", default=[16, 64, 256, 1024])
    parser.add_argument("--waiting", type=int, nargs="*", default=[0, 10_000])
    arguments = parser.parse_args()
    table = Table("running", "waiting", "plan µs", "apply µs", "plan + apply µs", "p99 µs", "encode µs")
    for running in arguments.running:
        for waiting in arguments.waiting:
            plan, encode, apply = measure(running, waiting)
            both = sorted(map(sum, zip(plan, apply, strict=True)))
            medians = [statistics.median(column) for column in (plan, apply, both)]
            row = [*medians, both[int(0.99 * len(both))], statistics.median(encode)]
            table.add_row(f"{running:,}", f"{waiting:,}", *(f"{value:.0f}" for value in row))
    Console().print(table)


if __name__ == "__main__":
    main()
