"""What it costs to watch: timelines and histograms, which are always on, and traces, which are not.

    python benchmarks/observing.py step         # of the scheduler's thread, a step and a request; of the executor's
    python benchmarks/observing.py whole        # of the whole system: traces off and on in turns
    python benchmarks/observing.py overview     # of one look by `paceline top` or the status page

`whole` counts the processor time of the scheduler's process for each token, exporter included, because throughput on a
shared machine differs more from run to run than what is to be measured.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from dataclasses import asdict, replace
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.split import Side, load, serve_if_asked
from common.logs import configure_logs
from common.spans import Origin
from executor_svc.config import ExecutorConfig
from executor_svc.fake import FakeRunner
from executor_svc.metrics import ExecutorMetrics
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc.answers import Answer, Terms
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, Result
from scheduler_svc.core.request import FinishReason, Request
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.load_meter import LoadMeter
from scheduler_svc.observation.observer import Observer
from scheduler_svc.observation.step_meter import Phases, StepMeter
from scheduler_svc.observation.tracing import Tracing
from scheduler_svc.text_stream import TextStream
from scheduler_svc.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the receiver of the tests

BLOCKS = 100_000  # of an executor with a large device
RUNNING = 256
STEPS = 2000
REQUESTS = 2000


class Receiver:
    """A receiver of traces in a process of its own, which throws them away."""

    CODE = """
import sys, time
sys.path.insert(0, {root!r})
from tests.observability.otlp_receiver import OtlpReceiver
receiver = OtlpReceiver()
print(receiver.endpoint, flush=True)
while True:
    time.sleep(1)
    receiver.spans.clear()
"""

    def __init__(self) -> None:
        code = self.CODE.format(root=str(ROOT))
        self._process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        self.endpoint = self._process.stdout.readline().strip()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Null:
    """Takes spans and does nothing."""

    def send(self, spans: object) -> None:
        """Nothing."""


def observed(sink: object, requests_per_s: float = 10.0) -> Observer:
    return Observer(LoadMeter(), Tracing(sink, requests_per_s), Origin("paceline-scheduler", "here"), "model")


def answer_of(observer: Observer, number: int, tokenizer: Tokenizer) -> Answer:
    trace = observer.tracing.accept(None)
    request = Request(f"r{number}", array("I", range(100)), 100, 10_000, trace=trace)
    return Answer(request, [TextStream(tokenizer, ())], Terms(is_named=True), time.monotonic())


def step_cost(sink: object) -> float:
    """Microseconds of what is noted in a step in which all of `RUNNING` requests decode."""
    observer, tokenizer = observed(sink), Tokenizer.bytes()
    scheduler, steps = Scheduler(), StepMeter()
    scheduler.join("e", Capacity((LayerGroup(16),), RUNNING * 700, RUNNING, 200 * RUNNING))
    observer.on_attached(scheduler.executors["e"], steps, time.monotonic())
    answers = [answer_of(observer, number, tokenizer) for number in range(RUNNING)]
    for answer in answers:
        observer.on_accepted(answer)
        scheduler.add(answer.request)
    times = []
    for _ in range(STEPS):
        plan = scheduler.plan("e", 0.0)
        released = {time.monotonic(): len(plan.rows)}
        steps.note(Phases(forward=0.02), goes_on=True)
        began = time.perf_counter()
        observer.on_planned("e", plan, time.monotonic())
        observer.on_answered("e", plan.step, time.monotonic())
        observer.on_released(time.monotonic(), released)
        times.append(time.perf_counter() - began)
        scheduler.apply("e", Result(plan.step, [7] * len(plan.rows)))
    return 1e6 * statistics.mean(times[10:])


def request_cost(sink: object, requests_per_s: float) -> float:
    """Microseconds of what is noted of a request with one chunk, from its acceptance to its end."""
    observer, tokenizer = observed(sink, requests_per_s), Tokenizer.bytes()
    scheduler, steps = Scheduler(), StepMeter()
    scheduler.join("e", Capacity((LayerGroup(16),), 1000, 4, 1000))
    observer.on_attached(scheduler.executors["e"], steps, time.monotonic())
    spent = 0.0
    for number in range(REQUESTS):
        answer = answer_of(observer, number, tokenizer)
        answer.request.max_output_count = 1
        scheduler.add(answer.request)
        plan = scheduler.plan("e", 0.0)
        began = time.perf_counter()
        observer.on_accepted(answer)
        observer.on_planned("e", plan, time.monotonic())
        spent += time.perf_counter() - began
        steps.note(Phases(0, 0.001, 0.001, 0.02, 0.001), goes_on=True)
        began = time.perf_counter()
        observer.on_answered("e", plan.step, time.monotonic())
        spent += time.perf_counter() - began
        scheduler.apply("e", Result(plan.step, [7]))
        began = time.perf_counter()
        answer.streams[0].push(7, time.monotonic())
        answer.streams[0].end(FinishReason.LENGTH, time.monotonic())
        observer.on_ended(answer, time.monotonic())
        spent += time.perf_counter() - began
    return 1e6 * spent / REQUESTS


def executor_step_cost() -> float:
    """Microseconds of what an executor counts of a step, on the thread of its model, after the result was told."""
    metrics = ExecutorMetrics("e", FakeRunner(ExecutorConfig(model="fake", fake_block_count=64)))
    plan = pb.Plan(step=1, chunk_token_counts=array("I", [100]).tobytes())
    timings = pb.Timings(queued_us=100, idle_us=0, prepare_us=200, forward_us=20_000, sample_us=300)
    result = pb.StepResult(step=1, token_ids=array("i", [7] * RUNNING).tobytes(), timings=timings)
    began = time.perf_counter()
    for _ in range(STEPS):
        metrics.note_step(plan, result)
    return 1e6 * (time.perf_counter() - began) / STEPS


def steps_and_requests() -> None:
    """Print what the scheduler's thread pays, and the executor's."""
    from common.span_exporter import OtlpSink

    receiver = Receiver()
    sink = OtlpSink(receiver.endpoint)
    table = Table("", "µs", title="What is noted, on the scheduler's thread and on the executor's")
    table.add_row(f"step, {RUNNING} decode, traces off", f"{step_cost(None):.1f}")
    table.add_row(f"step, {RUNNING} decode, 1 in 100 traced", f"{step_cost(sink):.1f}")
    table.add_row("request, traces off", f"{request_cost(None, 0):.1f}")
    table.add_row("request, traces on, this one not traced", f"{request_cost(Null(), 0):.1f}")
    table.add_row("request, traced", f"{request_cost(sink, 1e9):.1f}")
    table.add_row(f"executor: step, {RUNNING} rows and a chunk", f"{executor_step_cost():.1f}")
    Console().print(table)
    sink.close()
    receiver.stop()


async def whole(turns: int, request_count: int, output_count: int, step_us: float) -> None:
    """Run the whole system with traces off and on in turns and print the table."""
    receiver = Receiver()
    executor = ExecutorConfig(model="fake", executor_id="e", fake_step_us=step_us, fake_block_count=16384)
    results: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(turns):
            for mode in list(results) if turn % 2 == 0 else list(results)[::-1]:
                endpoint = receiver.endpoint if mode == "on" else ""
                side = Side(mode, Path(name), asdict(executor), otlp_endpoint=endpoint)
                try:
                    await side.ready()
                    scheduler = psutil.Process(side._processes[0].pid)
                    await load(side.address, 64, 16)
                    before = sum(scheduler.cpu_times()[:2])
                    speed, _ = await load(side.address, request_count, output_count)
                    spent_s = sum(scheduler.cpu_times()[:2]) - before
                    results[mode].append((speed, 1e6 * spent_s / (request_count * output_count)))
                finally:
                    side.stop()
    receiver.stop()
    table = Table("traces", "tokens/s", "scheduler, µs a token", title=f"{request_count} requests of {output_count}")
    for mode, runs in results.items():
        table.add_row(mode, *(f"{statistics.median(column):,.1f}" for column in zip(*runs, strict=True)))
    ratios = [on[1] / off[1] for off, on in zip(results["off"], results["on"], strict=True)]
    speeds = [on[0] / off[0] for off, on in zip(results["off"], results["on"], strict=True)]
    speed = f"{statistics.median(speeds):.3f} ({min(speeds):.3f} to {max(speeds):.3f})"
    table.add_row("on / off", speed, f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    Console().print(table)


async def overview() -> None:
    """Print what one look costs the event loop."""
    from google.protobuf.json_format import MessageToJson

    from tests.system import FAST, request, started

    async with started(2, executor=replace(FAST, fake_block_count=BLOCKS)) as system:
        for number in range(100):
            assert [one async for one in system.generate(request("hello", 4, request_id=f"r{number}"))]
        look = system.app._overview
        for _ in range(300):
            look.sample()
        times = []
        for _ in range(200):
            look._made = None  # else it is shown once more
            began = time.perf_counter()
            made = look.make(100)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        text = MessageToJson(made, indent=None)
        json_s = time.perf_counter() - began
    Console().print(f"two executors of {BLOCKS:,} blocks each; {len(made.requests)} requests")
    Console().print(f"a look: {1e3 * statistics.median(times):.2f} ms, {made.ByteSize():,} bytes")
    Console().print(f"as JSON, beside the event loop: {1e3 * json_s:.2f} ms more, {len(text):,} bytes")


def main() -> None:
    """Measure what is asked for."""
    if serve_if_asked():
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "whole", "overview"))
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--step-us", type=float, default=2000, help="of the fake model")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    arguments = parser.parse_args()
    configure_logs("benchmark", "error")
    if arguments.what == "step":
        steps_and_requests()
    elif arguments.what == "whole":
        asyncio.run(whole(arguments.turns, arguments.requests, arguments.output_tokens, arguments.step_us))
    else:
        asyncio.run(overview())


if __name__ == "__main__":
    main()
