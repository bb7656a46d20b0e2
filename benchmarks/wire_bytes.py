"""How many bytes a step of steady decoding costs on the step stream, both ways, by the real messages."""

import argparse
import statistics
from array import array
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from executor_svc.config import ExecutorConfig
from executor_svc.executor import Executor
from executor_svc.fake import FakeRunner
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc import wire
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity
from scheduler_svc.core.request import Request
from scheduler_svc.core.scheduler import Scheduler

RUNNING = (16, 64, 256)
WARM_UP, STEP_COUNT = 16, 128  # the first steps read the prompts
EPOCH, INCARNATION = 1_795_000_000_000, 2**63


def measure(running_count: int, block_size: int) -> tuple[list[int], list[int]]:
    """Bytes down and up of each of `STEP_COUNT` steps in which `running_count` requests decode."""
    blocks = running_count * (512 // block_size)
    config = ExecutorConfig(
        model="fake",
        block_size=block_size,
        fake_block_count=blocks,
        max_num_seqs=running_count,
        max_num_batched_tokens=running_count * 100,
        max_model_len=512,
        fake_step_us=0,
        fake_token_us=0,
    )
    scheduler, executor = Scheduler(), Executor(FakeRunner(config))
    scheduler.join("e", Capacity((LayerGroup(block_size),), blocks, running_count, running_count * 100))
    for number in range(running_count):
        prompt = array("I", [65] * (20 + number % 64))  # lengths differ, so that blocks fill up at different steps
        scheduler.add(Request(f"request-{number}", prompt, len(prompt), 300))
    down, up = [], []
    for _ in range(WARM_UP + STEP_COUNT):
        plan = scheduler.plan("e", 0.0)
        assert plan is not None, "every request has tokens left"
        request = pb.SchedulerMessage(epoch=EPOCH, incarnation=INCARNATION, plan=wire.encode_plan(plan))
        result = executor.execute(request.plan)
        down.append(request.ByteSize())
        up.append(pb.ExecutorMessage(epoch=EPOCH, incarnation=INCARNATION, result=result).ByteSize())
        scheduler.apply("e", wire.decode_result(result))
    return down[WARM_UP:], up[WARM_UP:]


def main() -> None:
    """Print one row for each load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, nargs="*", default=RUNNING)
    Console().print(bytes_table(parser.parse_args().running))


def bytes_table(running_counts: Sequence[int]) -> Table:
    """A row for each load and block size."""
    table = Table("running", "block size", "down, bytes", "up, bytes", "both, bytes", "largest step, bytes")
    for running in running_counts:
        for block_size in (16, 256):
            down, up = measure(running, block_size)
            both = [a + b for a, b in zip(down, up, strict=True)]
            figures = (statistics.mean(down), statistics.mean(up), statistics.mean(both), max(both))
            table.add_row(str(running), str(block_size), *(f"{figure:,.0f}" for figure in figures))
    return table


if __name__ == "__main__":
    main()
