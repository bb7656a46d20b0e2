"""The scheduler's core and an executor in one process: what the parts give without gRPC, streams and text.

Plans and results are the real messages, and steps run on the executor's own threads: a plan is there before it is
needed, and the next one is made while its step runs.
"""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, cast

from benchmarks import BenchmarkError
from benchmarks.figures import Answer, Figures, run_json
from benchmarks.load import check_complete
from benchmarks.serving import Teller, child_environment, last_lines, peak_mib
from benchmarks.wanted import WARM_UP, Report, Side, Work, thread_count
from benchmarks.workloads import Job, Workload
from executor_svc.batch import Runner
from executor_svc.config import ExecutorConfig
from executor_svc.executor import Executor
from executor_svc.main import load_runner
from executor_svc.model_thread import PLANS_IN_FLIGHT, Attachment, ModelThread, Outcome
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc import wire
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, Outputs
from scheduler_svc.core.request import FinishReason, Request
from scheduler_svc.core.scheduler import Scheduler

EXECUTOR = "e"


def capacity_of(runner: Runner) -> Capacity:
    """What fits on this runner, as an executor tells a scheduler."""
    info = runner.info
    groups = tuple(LayerGroup(group.block_size, group.window, group.chunk) for group in info.layer_groups)
    return Capacity(groups, info.block_count, info.slot_count, info.step_token_count)


class _Calls:
    """Stands in for an event loop: what it is to call soon it calls at once."""

    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Call."""
        callback(*arguments)


class Engine:
    """Answers workloads with one runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._thread = ModelThread(Executor(runner), cast("asyncio.AbstractEventLoop", _Calls()))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.stop()
        self._thread.join()

    def run(
        self,
        workload: Workload,
        on_tokens: Callable[[int], None] = lambda _count: None,
        on_result: Callable[[pb.StepResult], None] = lambda _result: None,
    ) -> list[Answer]:
        """Give all prompts at once and go on until every token is there; nothing is kept from the run before."""
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        attachment = Attachment(1, "offline", resume=False, outcomes=cast("asyncio.Queue[Outcome | None]", outcomes))
        self._thread.begin(attachment)
        outcomes.get()
        scheduler = Scheduler()
        scheduler.join(EXECUTOR, capacity_of(self._runner))
        answers = [Answer(len(job.prompt), time.perf_counter()) for job in workload.jobs]
        for number, job in enumerate(workload.jobs):
            prompt = array("I", job.prompt)
            scheduler.add(Request(str(number), prompt, len(prompt), job.output_count, key=number))
        step_count = 0  # on their way
        while scheduler.request_count:
            step_count += self._plan_ahead(scheduler, attachment, step_count)
            result = _result(outcomes)
            on_result(result)
            outputs = scheduler.apply(EXECUTOR, wire.decode_result(result))
            step_count -= 1
            _check_ends(outputs)
            now = time.perf_counter()
            for request, _ in outputs.tokens:
                answers[request.key].note(now, 1)
            on_tokens(len(outputs.tokens))
        for _ in range(step_count):
            _result(outcomes)  # planned before it was known that nobody needs it
        for answer, job in zip(answers, workload.jobs, strict=True):
            check_complete(answer, job)
        return answers

    def _plan_ahead(self, scheduler: Scheduler, attachment: Attachment, step_count: int) -> int:
        """Submit as many plans as there may be; returns how many those are."""
        planned = 0
        while (
            step_count + planned < PLANS_IN_FLIGHT
            and (plan := scheduler.plan(EXECUTOR, time.perf_counter())) is not None
        ):
            self._thread.submit(attachment, wire.encode_plan(plan))
            planned += 1
        if not step_count + planned:
            raise BenchmarkError("requests wait and nothing can be planned; give the executor more cache or less work")
        return planned


def _result(outcomes: queue.SimpleQueue[Outcome]) -> pb.StepResult:
    outcome = outcomes.get()
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, pb.StepResult)
    return outcome


def _check_ends(outputs: Outputs) -> None:
    for request in outputs.finished:
        if request.finish_reason is FinishReason.ERROR:
            raise BenchmarkError(f"{request.error}; without it the figures would mean nothing")


def measure_here(side: Side, work: Work, turn: int, report: Report) -> Iterator[dict[str, Any]]:
    """Load the model into this process and give the JSON of each workload."""
    from executor_svc.machine import calm_openmp, process_age_s

    calm_openmp()
    report("loading the model")
    runner = load_runner(ExecutorConfig(side.model, **side.settings()), lambda phase, _share: report(phase))
    start_s, mode = process_age_s(), runner.info.mode
    with Engine(runner) as engine:
        for name in work.in_order():
            workload = work.of_turn(name, turn, runner.info.vocabulary_size)
            engine.run(Workload("warm-up", "", [Job(*WARM_UP)]))
            figures = Figures.of(engine.run(workload, Teller(workload, report)))
            yield run_json(
                figures,
                server="paceline",
                mode="offline",
                workload=name,
                dtype=runner.info.dtype,
                runner=mode,
                threads=thread_count(side, mode),
                turn=turn,
                peak_mib={"executor": peak_mib("self"), "scheduler": None},
                start_s=start_s,
            )


def measure(side: Side, work: Work, turn: int, report: Report) -> Iterator[dict[str, Any]]:
    """The same in a process of its own, so that every turn starts, and uses memory, as the first does."""
    wish = json.dumps({"side": asdict(side), "work": asdict(work), "turn": turn})
    command = [sys.executable, "-m", "benchmarks.offline", wish]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=child_environment(), text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                told = json.loads(line)
                if "run" in told:
                    yield told["run"]
                elif "error" in told:
                    raise BenchmarkError(told["error"])
                else:
                    report(told["doing"])
            if code := process.wait():
                raise BenchmarkError(f"the process that measures ended with exit code {code}:\n{last_lines(said)}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def main(wish: str) -> int:
    """Be that process: every line that is printed is JSON."""
    from common.logs import configure_logs

    configure_logs("benchmark", "error")

    def tell(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    asked = json.loads(wish)
    side, work = Side(**asked["side"]), Work(**asked["work"])
    try:
        for run in measure_here(side, work, asked["turn"], lambda doing: tell(doing=doing)):
            tell(run=run)
    except (BenchmarkError, ValueError) as error:  # what a user can do something about
        tell(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
