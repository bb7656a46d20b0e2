"""What a decoding step is made of: the kernels that take most of it, by torch's profiler."""

from __future__ import annotations

from benchmarks.gpu.given import Given, Tell
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.steady import jobs_of
from benchmarks.workloads import Workload
from executor_svc.batch import Runner

_SHOWN = 12
_PROMPT_COUNT, _OUTPUT_COUNT = 2, 64  # short prompts, so that nearly all is decoding
_NAME_LENGTH = 70


def tell_kernels(given: Given, shape: Shape, runner: Runner, tell: Tell) -> None:
    """Tell them for one request and for many."""
    for count in given.batches[:1] if given.rehearse else (1, 64):
        for name, microseconds, call_count in _kernels(given, shape, runner, count)[:_SHOWN]:
            what = {"model": given.shape, "way": "step", "batch": count, "kernel": name[:_NAME_LENGTH]}
            tell(what | {"µs a step": round(microseconds, 2), "launches a step": round(call_count, 2)})


def _kernels(given: Given, shape: Shape, runner: Runner, count: int) -> list[tuple[str, float, float]]:
    """Name, time and launches a step of each kernel, the one that takes most first."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.offline import Engine

    output_count = given.output_count if given.rehearse else _OUTPUT_COUNT
    workload = Workload("", "", jobs_of(count, _PROMPT_COUNT, output_count, shape.vocabulary_size, "kernels"))
    is_cpu = given.device == "cpu"
    with Engine(runner) as engine:
        engine.run(workload)
        with profile(activities=[ProfilerActivity.CPU if is_cpu else ProfilerActivity.CUDA]) as profiler:
            engine.run(workload)
    found = [
        (event.key, event.self_cpu_time_total if is_cpu else event.self_device_time_total, event.count)
        for event in profiler.key_averages()
    ]
    return sorted(
        ((name, time / output_count, calls / output_count) for name, time, calls in found if time),
        key=lambda kernel: -kernel[1],
    )
