"""Models with random weights: decoding in process and through the whole system, and the memory that both take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from benchmarks.figures import Answer
from benchmarks.gpu.given import IN_PROCESS, SERVED, Given, Row, Tell
from benchmarks.gpu.served import serve
from benchmarks.gpu.shapes import Shape, serving_folder, shape_of
from benchmarks.gpu.steady import Steady, jobs_of
from benchmarks.gpu.step_kernels import tell_kernels
from benchmarks.offline import Engine
from benchmarks.workloads import Job, Workload
from executor_svc.batch import Runner
from executor_svc.config import ExecutorConfig
from executor_svc.main import load_runner
from paceline.internal.v1 import executor_pb2 as pb

_TAKEN_APART = "8B"  # the model whose steps are shown kernel by kernel


def run(given: Given, tell: Tell) -> None:
    """Load one model, and let it decode at every batch size, first without and then with everything around it."""
    shape = shape_of(given.shape, given.rehearse)
    began = time.perf_counter()
    folder = serving_folder(shape, given.folder, given.device)
    made = time.perf_counter()
    config = executor_config(given, str(folder))
    runner = load_runner(config, lambda _phase, _share: None)
    tell(_start_row(given, runner, made - began, time.perf_counter() - made))
    with Engine(runner) as engine:
        engine.run(Workload("", "", [Job([1, 2, 3], 4)]))
        for count in given.batches:
            meter = _IdleMeter()
            jobs = _jobs(given, shape, count, IN_PROCESS)
            answers = engine.run(Workload("", "", jobs), on_result=meter)
            steady = Steady.of(answers)
            tell(_decode_row(given, shape, IN_PROCESS, answers, meter.share(steady)))
    if given.device != "cpu":
        tell(_memory_row(given, config))
    workloads = [_jobs(given, shape, count, SERVED) for count in given.batches]
    log = given.folder / f"served-{shape.name}.log"

    def on_answers(answers: list[Answer], idle_share: float) -> None:
        tell(_decode_row(given, shape, SERVED, answers, idle_share))

    serve(runner, config, workloads, log, on_answers)
    if given.device != "cpu":
        tell(_memory_row(given, config))
    if given.shape == _TAKEN_APART:
        tell_kernels(given, shape, runner, tell)


def executor_config(given: Given, model: str) -> ExecutorConfig:
    """The settings of the executor that is measured."""
    return ExecutorConfig(
        model=model,
        executor_id="measured",
        device=given.device,
        dtype="float32" if given.rehearse else "bfloat16",
        attention=given.attention,
        native=given.device != "cpu" or given.attention == "triton",  # else a CPU would run steps in C++
        threads=1 if given.rehearse else 0,
        cache_memory_bytes=32 << 20 if given.rehearse else 0,
        max_model_len=64 if given.rehearse else 8192,
        max_num_seqs=max(given.batches),
        max_num_batched_tokens=given.step_token_count,
        keep_checks=False,
    )


@dataclass(slots=True)
class _IdleMeter:
    """Adds up in which time the device had nothing to compute, by its own clock where it has one."""

    noted: list[tuple[float, float]] = field(default_factory=list)  # (when a result came, seconds before its step)

    def __call__(self, result: pb.StepResult) -> None:
        timings = result.timings  # a device waits for plans, and for its host to prepare what they ask for
        self.noted.append((time.perf_counter(), (timings.idle_us + timings.prepare_us) / 1e6))

    def share(self, steady: Steady) -> float:
        idle_s = sum(idle for when, idle in self.noted if steady.began_s < when <= steady.ended_s)
        return idle_s / (steady.ended_s - steady.began_s)


def _jobs(given: Given, shape: Shape, count: int, seed: str) -> list[Job]:
    return jobs_of(count, given.prompt_count, given.output_count, shape.vocabulary_size, seed)


def _start_row(given: Given, runner: Runner, making_s: float, loading_s: float) -> Row:
    info = runner.info
    return {
        "model": given.shape,
        "way": "start",
        "mode": info.mode,
        "dtype": info.dtype,
        "attention": given.attention,
        "making_s": round(making_s, 1),
        "loading_s": round(loading_s, 1),
        "cache_tokens": info.block_count * min(group.block_size for group in info.layer_groups),
    }


def _decode_row(given: Given, shape: Shape, way: str, answers: list[Answer], idle_share: float) -> Row:
    steady = Steady.of(answers)
    step_bytes = shape.step_weight_bytes + len(answers) * steady.mean_context * shape.token_cache_bytes
    return {
        "model": given.shape,
        "way": way,
        "batch": len(answers),
        "tokens_per_s": round(steady.tokens_per_s, 2),
        "step_ms": round(1000 * len(answers) / steady.tokens_per_s, 4),
        "step_bytes": round(step_bytes),
        "context": round(steady.mean_context, 1),
        "idle_share": round(idle_share, 5),
        "steady_share": round(steady.share_of(answers), 3),
        "first_token_ms": round(1000 * max(one.arrivals[0][0] - one.asked_s for one in answers), 1),
    }


def _memory_row(given: Given, config: ExecutorConfig) -> Row:
    """The most that the device has held for this process.

    Torch's allocator keeps what it took, and knows its peak; what the device holds beside that, such as the driver's
    share and the graphs', only grows while steps run, so that the sum is no less than the peak of both.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    peak = total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
    budget = config.memory_utilization * total
    return {
        "model": given.shape,
        "way": "memory",
        "peak_gib": round(peak / 2**30, 2),
        "budget_gib": round(budget / 2**30, 2),
        "over_budget": round(peak / budget - 1, 4),
    }
