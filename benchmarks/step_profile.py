"""Where the time of a step goes: in the scheduler, in messages, in the executor, and inside the forward pass.

Steps run one after the other through the scheduler's core, the real messages and the executor; where requests have to
be in the middle of their answer first, what leads there is planned and not computed.
"""

from __future__ import annotations

import os
import statistics
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.offline import EXECUTOR, capacity_of
from benchmarks.wanted import Report
from executor_svc.batch import IntArray, Runner, StepBatch, StepOutput
from executor_svc.executor import Executor
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc import wire
from scheduler_svc.core.request import Request
from scheduler_svc.core.scheduler import Scheduler

WARM_UP = 3  # steps before those that count
_TOKEN = 7  # what prompts are made of: which token it is makes no difference

_Seconds = dict[str, float]
_COLUMNS = ("plan", "wire", "step", "prepare", "forward", "sample", "apply")


@dataclass(frozen=True, slots=True)
class Case:
    """What a step computes."""

    decoding: int = 0  # requests that decode
    context: int = 0  # tokens that each of them has
    chunk: int = 0  # tokens of a prompt

    @property
    def name(self) -> str:
        """In words."""
        parts = [f"{self.decoding} decode at {self.context}"] if self.decoding else []
        return " + ".join(parts + ([f"prompt of {self.chunk}"] if self.chunk else []))


CASES = (
    *(Case(rows, context) for context in (128, 512) for rows in (1, 16, 64)),
    Case(chunk=128),
    Case(chunk=512),
    Case(16, 128, 256),
)


class Skippable:
    """A runner whose steps can be left out."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.info = runner.info
        self.skips = False

    def run(self, batch: StepBatch) -> StepOutput:
        """Compute the step, or pretend to."""
        if self.skips:
            return StepOutput(np.full(len(batch.sampling), _TOKEN, dtype=np.int64), 0.0, 0.0)
        return self._runner.run(batch)

    def check_device(self) -> None:
        """As the runner does."""
        self._runner.check_device()

    def copy_blocks(self, sources: IntArray, destinations: IntArray) -> None:
        """As the runner does."""
        self._runner.copy_blocks(sources, destinations)


class Stage:
    """A scheduler and an executor on which one case is played again and again."""

    def __init__(self, runner: Runner, case: Case, step_count: int) -> None:
        """Bring the requests that decode to where they do."""
        self._case = case
        self._runner = Skippable(runner)
        self._executor = Executor(self._runner)
        self._scheduler = Scheduler(reuse=False)  # every prompt is computed, though all are alike
        capacity = capacity_of(runner)
        prompts_at_once = max(capacity.step_token_count, case.decoding * case.context)
        self._scheduler.join(EXECUTOR, replace(capacity, step_token_count=prompts_at_once))
        self._added = 0
        self._runner.skips = True
        for _ in range(case.decoding):
            self._add(case.context - 1, step_count + 2)
        if case.decoding:
            self._step(expected_tokens=case.decoding * (case.context - 1))
        self._runner.skips = False

    def step(self) -> _Seconds:
        """One step of the case; returns the seconds of its parts."""
        if self._case.chunk:
            self._add(self._case.chunk, 1)
        return self._step(expected_tokens=self._case.decoding + self._case.chunk)

    def _add(self, prompt_count: int, output_count: int) -> None:
        prompt = array("I", [_TOKEN]) * prompt_count
        self._scheduler.add(Request(str(self._added), prompt, prompt_count, output_count))
        self._added += 1

    def _step(self, expected_tokens: int) -> _Seconds:
        times = [perf_counter()]

        def lap() -> None:
            times.append(perf_counter())

        plan = self._scheduler.plan(EXECUTOR, times[0])
        lap()
        assert plan is not None, "there is work"
        assert plan.token_count == expected_tokens, f"the step has {plan.token_count} tokens"
        message = pb.Plan.FromString(wire.encode_plan(plan).SerializeToString())
        lap()
        result = self._executor.execute(message)
        lap()
        answer = wire.decode_result(pb.StepResult.FromString(result.SerializeToString()))
        lap()
        self._scheduler.apply(EXECUTOR, answer)
        lap()
        planned, there, executed, back, applied = (b - a for a, b in pairwise(times))
        phases = wire.decode_phases(result.timings)
        inside = {"prepare": phases.prepare, "forward": phases.forward, "sample": phases.sample}
        return {"plan": planned, "wire": there + back, "step": executed, **inside, "apply": applied}


def profile(runner: Runner, step_count: int, report: Report) -> list[dict[str, Any]]:
    """Play every case that the model has room for; medians in milliseconds, and what is known of the forward pass."""
    rows = []
    for case in fitting_cases(runner, step_count):
        report(case.name)
        stage = Stage(runner, case, WARM_UP + step_count + 1)
        for _ in range(WARM_UP):
            stage.step()
        phases_of = phase_source(runner)
        phases_of()  # from here on
        times = [stage.step() for _ in range(step_count)]
        phases = {name: 1000 * seconds / step_count for name, seconds in phases_of().items()}
        medians = {name: 1000 * statistics.median(one[name] for one in times) for name in _COLUMNS}
        if not phases and runner.info.mode == "packed":
            phases = torch_phases(stage, medians["forward"])
        rows.append({"name": case.name, **asdict(case), "ms": _rounded(medians), "phases_ms": _rounded(phases)})
    return rows


def fitting_cases(runner: Runner, step_count: int) -> list[Case]:
    """Those that fit into the context of the model, into a step and into the cache."""
    info = runner.info
    slack = WARM_UP + step_count + 2

    def fits(case: Case) -> bool:
        tokens = case.decoding * (case.context + slack) + 2 * case.chunk
        blocks = sum(-(-tokens // group.block_size) + 2 * info.slot_count for group in info.layer_groups)
        return (
            max(case.context + slack, case.chunk + 1) <= info.context_length
            and case.decoding + bool(case.chunk) <= info.slot_count
            and case.decoding + case.chunk <= info.step_token_count
            and blocks <= info.block_count
        )

    return [case for case in CASES if fits(case)]


def phase_source(runner: Runner) -> Callable[[], _Seconds]:
    """What tells the seconds of each phase of the forward passes since it was asked last, where the model can."""
    model = getattr(runner, "_model", None)
    phases: Callable[[], _Seconds] = getattr(model, "phases", dict)
    return phases


_KINDS = {  # of torch's operations, by a part of their name; the first that fits. Other operations are elementwise
    "attention": ("scaled_dot_product", "attention", "softmax", "bmm"),
    "matrix products": ("mm", "linear", "matmul", "mkldnn"),
    "copies": ("copy", "index", "cat", "gather", "scatter", "clone", "contiguous", "fill", "zero", "empty", "arange"),
    "views": ("view", "reshape", "slice", "select", "transpose", "expand", "strided", "permute", "::t", "squeeze"),
}


def torch_phases(stage: Stage, forward_ms: float) -> dict[str, float]:
    """What `forward_ms` is made of, by the shares that torch's profiler finds in one step."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("the step"):
        seconds = stage.step()
    spent = dict.fromkeys((*_KINDS, "elementwise"), 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            spent[_kind_of(event.key)] += event.self_cpu_time_total / 1e6
    forward_s = max(seconds["forward"], sum(spent.values()))  # sampling's few operations are among them
    spent["Python and the rest"] = forward_s - sum(spent.values())
    return {kind: forward_ms * one / forward_s for kind, one in spent.items()}


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep off the terminal what C++ writes there: the profiler reports each start and stop, at every log level."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _kind_of(operation: str) -> str:
    kinds = (kind for kind, parts in _KINDS.items() if any(part in operation for part in parts))
    return next(kinds, "elementwise")


def parts_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """A row for each case: what the scheduler, the messages and the executor take."""
    table = _table(title, [f"{name}, ms" if name == "step" else name for name in _COLUMNS])
    for row in rows:
        table.add_row(row["name"], *(_ms(row["ms"][name]) for name in _COLUMNS))
    return table


def phases_table(rows: Sequence[dict[str, Any]]) -> Table | None:
    """A row for each case: what the forward pass is made of; None where that is not known."""
    names = list(dict.fromkeys(name for row in rows for name in row["phases_ms"]))
    if not names:
        return None
    table = _table("inside the forward pass, ms", names)
    for row in rows:
        table.add_row(row["name"], *(_ms(row["phases_ms"].get(name, 0.0)) for name in names))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("a step of")
    for name in columns:
        table.add_column(name, justify="right", style="bold cyan" if name.startswith("step") else "")
    return table


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
