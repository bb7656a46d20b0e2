"""`paceline bench`: what this machine gives, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline_cli import terminal
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import flag, model_argument

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.wanted import Report, Side, Work

_PAINT_PER_S = 2  # pictures of the line that moves: painting takes time from what is measured

Model = Annotated[str, model_argument("Folder, GGUF file or hub id of a model; 'fake' needs none.", metavar="MODEL")]
Dtype = Annotated[str, flag("--dtype", "float32, bfloat16 or float16; auto suits the device.", metavar="TYPE")]
Weights = Annotated[str, flag("--weights", "int8: rounded to that, in C++ on a CPU.", metavar="TYPE")]
Threads = Annotated[int, flag("--threads", "CPU threads of the executor; 0 lets it choose.", metavar="N", min=0)]
Native = Annotated[bool, flag("--native/--no-native", "On a CPU: steps in C++ where possible, else in torch.")]
Against = Annotated[
    str, flag("--against", "'torch': steps in C++ and in torch by turns, and their ratio.", envvar=None, metavar="WHAT")
]
Workloads = Annotated[
    list[str], flag("--workload", "W1, W2, W3, W4; several with commas or again.", "-w", envvar=None, metavar="NAMES")
]
Turns = Annotated[
    int, flag("--turns", "Fresh starts; the table has medians.", envvar=None, metavar="N", min=1, max=100)
]
Seed = Annotated[int, flag("--seed", "Same seed, same prompts, lengths and arrivals.", envvar=None, metavar="N")]
Running = Annotated[
    list[int], flag("--running", "Requests that run; give it again for more.", envvar=None, metavar="N", min=1)
]
Json = Annotated[Path | None, flag("--json", "Write every run, the machine and the versions there.", envvar=None,
                                   metavar="FILE", dir_okay=False)]  # fmt: skip

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def bench() -> None:
    """Measure this machine: seeded workloads, and where a step's time goes.

    W1: 64 requests at once, prompts of 16 to 512 tokens, outputs of 16 to 128.

    W2: 64 requests at once that share 512 tokens, have 32 of their own, and generate 32.

    W3: requests like those of W1, at random moments, at 70 % of the rate that W1 went at.

    W4: one stream, 128 tokens in, 128 out.

    [dim]$[/] paceline bench serve
    [dim]$[/] paceline bench offline --workload W1 --turns 5 --json figures.json
    """


@app.command("serve")
def bench_serve(
    model: Model = "smollm2",
    workload: Workloads = ["W1", "W2", "W3", "W4"],  # noqa: B006  typer copies it
    rate: Annotated[
        float | None,
        flag("--rate", "Requests a second of W3, instead of 70 % of W1's.", envvar=None, metavar="RATE", min=0.01),
    ] = None,
    server: Annotated[
        str,
        flag(
            "--server",
            "Measure the one that runs there; starts none.",
            "-s",
            "--address",
            envvar=None,
            metavar="ADDRESS",
        ),
    ] = "",
    dtype: Dtype = "auto",
    weights: Weights = "",
    threads: Threads = 0,
    native: Native = True,
    against: Against = "",
    turns: Turns = 3,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Start the whole system, ask it as users do, and measure what they see.

    First token and between tokens are what a reader waits; memory is the most that a process has had, the start ends
    when an executor is there.

    [dim]$[/] paceline bench serve
    [dim]$[/] paceline bench serve --against torch --workload W1,W4     [dim]# is C++ faster here, and how much?[/]
    [dim]$[/] paceline bench serve --server 10.0.0.5:50051 --turns 1
    """
    work = _work(workload, seed, rate)
    if server and against:
        raise _wrong("--against starts two kinds of executors, --server starts none", "leave one of them out")
    sides = _sides(model, dtype, weights, threads, native, against)
    from benchmarks.serving import measure

    _measure(f"serve {server or model}", sides, work, turns, json, partial(measure, address=server))


@app.command("offline")
def bench_offline(
    model: Model = "smollm2",
    workload: Workloads = ["W1", "W2", "W4"],  # noqa: B006
    dtype: Dtype = "auto",
    weights: Weights = "",
    threads: Threads = 0,
    native: Native = True,
    against: Against = "",
    turns: Turns = 3,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Measure the scheduler's core and an executor in one process, all prompts at once: no gRPC, no streams, no text.

    [dim]$[/] paceline bench offline
    [dim]$[/] paceline bench offline ./my-model --threads 2 --dtype float32 --workload W2
    """
    if "W3" in (work := _work(workload, seed, None)).names:
        raise _wrong("W3 comes over time, and offline all prompts are there at once", "paceline bench serve -w W3")
    sides = _sides(_folder(model), dtype, weights, threads, native, against)
    from benchmarks.offline import measure

    _measure(f"offline {model}", sides, work, turns, json, measure)


@app.command("profile")
def bench_profile(
    model: Model = "smollm2",
    steps: Annotated[
        int, flag("--steps", "Steps that each figure is the median of.", envvar=None, metavar="N", min=1, max=1000)
    ] = 20,
    dtype: Dtype = "auto",
    weights: Weights = "",
    threads: Threads = 0,
    native: Native = True,
    json: Json = None,
) -> None:
    """Show where the time of a step goes: scheduler, messages, executor, and inside the forward pass.

    Executor: prepare, forward and sample make up the step. Scheduler: plan and apply; messages: wire. In service the
    next plan is made while a step runs.

    [dim]$[/] paceline bench profile
    [dim]$[/] paceline bench profile ./my-model --threads 2 --no-native
    """
    (side,) = _sides(_folder(model), dtype, weights, threads, native, against="")
    from benchmarks.setting import setting
    from benchmarks.step_profile import CASES, parts_table, phases_table, profile
    from benchmarks.tables import how_it_runs, write_json
    from benchmarks.wanted import thread_count

    where = setting()
    with _moving_line() as report:
        runner = _runner(side, report)
        rows = profile(runner, steps, report)
    if not rows:
        raise _wrong(
            f"{model} has no room for any of the steps that are profiled",
            "take one with more context, or fewer --steps",
        )
    used = {"dtype": runner.info.dtype, "runner": runner.info.mode, "threads": thread_count(side, runner.info.mode)}
    inside, left_out = phases_table(rows), len(CASES) - len(rows)
    _show([parts_table(rows, f"profile {model} · {how_it_runs(**used)}"), *([inside] if inside else [])], where)
    if left_out:
        terminal.stdout().print(
            f"{left_out} kinds of step left out: they exceed context, cache or slots", style="yellow"
        )
    if json:
        write_json(json, {"setting": where, "model": model, **used, "steps": steps, "profile": rows})


def _runner(side: Side, report: Report) -> Any:
    """Load the model into this process, as an executor does."""
    from executor_svc.machine import calm_openmp

    calm_openmp()  # before torch is imported
    from executor_svc.config import ExecutorConfig
    from executor_svc.main import load_runner

    return load_runner(ExecutorConfig(side.model, **side.settings()), lambda phase, _share: report(phase))


@app.command("core")
def bench_core(
    running: Running = [16, 64, 256, 1024],  # noqa: B006
    waiting: Annotated[
        list[int], flag("--waiting", "Requests that wait; give it again for more.", envvar=None, metavar="N", min=0)
    ] = [10, 1_000, 100_000],  # noqa: B006
    hybrid: Annotated[
        bool, flag("--hybrid", "A model with a second group of layers, with a window.", envvar=None)
    ] = False,
    growth: Annotated[
        bool, flag("--growth", "Instead: ten times the queue, ten times the executors.", envvar=None)
    ] = False,
    memory: Annotated[bool, flag("--memory", "Instead: bytes of a waiting request.", envvar=None)] = False,
) -> None:
    """Measure the scheduler alone: how long it takes to plan a step and to take in its result.

    [dim]$[/] paceline bench core --running 256 --waiting 1000
    [dim]$[/] paceline bench core --growth
    """
    if growth and memory:
        raise _wrong("--growth and --memory are two measurements", "make one after the other")
    from benchmarks import core_step

    with _moving_line() as report:
        report("planning")
        if growth or memory:
            table = core_step.growth() if growth else core_step.memory()
        else:
            table = core_step.steady(running, waiting, hybrid)
    terminal.stdout().print(table)


@app.command("wire")
def bench_wire(running: Running = [16, 64, 256]) -> None:  # noqa: B006
    """Count the bytes of a step on the stream between scheduler and executor, by the real messages.

    [dim]$[/] paceline bench wire
    """
    from benchmarks.wire_bytes import bytes_table

    with _moving_line() as report:
        report("counting")
        table = bytes_table(running)
    terminal.stdout().print(table)


# --- what is wanted -------------------------------------------------------------------------------------------------


def _work(names: list[str], seed: int, rate: float | None) -> Work:
    from benchmarks.wanted import Work
    from benchmarks.workloads import NAMES

    wanted = [name.strip().upper() for part in names for name in part.split(",") if name.strip()]
    for name in wanted:
        if name not in NAMES:
            raise _wrong(f"there is no workload {name!r}", f"choose of {', '.join(NAMES)}")
    if not wanted:
        raise _wrong("--workload names none", f"choose of {', '.join(NAMES)}")
    return Work(tuple(wanted), seed, rate)


def _sides(model: str, dtype: str, weights: str, threads: int, native: bool, against: str) -> list[Side]:
    """How the model is served: once, or in both ways that are to be compared."""
    from benchmarks.wanted import Side

    if against not in ("", "torch"):
        raise _wrong(f"--against compares with 'torch', got {against!r}", "paceline bench serve --against torch")
    if against and model == "fake":
        raise _wrong("--against compares steps of a model, and 'fake' has none", "name a model, or leave --against out")
    if against and not native:
        raise _wrong("--against torch compares steps in C++ with it, and --no-native asks for none", "leave one out")
    if against and weights:
        raise _wrong(f"steps in torch have no {weights} weights to compare with", "leave --against or --weights out")
    side = Side(model, dtype, weights, threads, native)
    return [side, replace(side, native=False)] if against else [side]


def _folder(model: str) -> str:
    """The serving folder of what the user named."""
    if model == "fake":
        return model
    with terminal.activity(terminal.stderr(), f"Preparing {model}") as report:
        from executor_svc.prepare import prepare

        return str(prepare(model, progress=report).path)


def _wrong(message: str, what_to_do: str) -> CommandError:
    return CommandError(message, what_to_do, exit_code=ExitCode.USAGE)


# --- measuring and showing ------------------------------------------------------------------------------------------


def _measure(
    title: str,
    sides: list[Side],
    work: Work,
    turns: int,
    json: Path | None,
    measure: Callable[[Side, Work, int, Report], Iterator[dict[str, Any]]],
) -> None:
    """Measure all sides in turns, show the table, and write every run. What was measured before an error is shown."""
    from benchmarks.setting import setting
    from benchmarks.tables import results_table, write_json

    where = setting()  # before anything runs
    runs: list[dict[str, Any]] = []
    try:
        with _moving_line() as report:
            for turn in range(turns):
                for side in sides if turn % 2 == 0 else sides[::-1]:  # neither is always the first
                    runs += measure(side, work, turn, partial(_report_turn, report, turn, turns))
    finally:
        if runs:
            if len(sides) > 1 and "native" not in {run["runner"] for run in runs}:
                note = "steps in C++ are not possible here: both sides ran in torch; the executor's log says why"
                terminal.stderr().print(note, style="yellow")
            _show([results_table(_by_side(runs, sides), title)], where)
            if json:
                write_json(json, {"setting": where, "runs": runs})


def _report_turn(report: Report, turn: int, turns: int, doing: str) -> None:
    report(f"turn {turn + 1} of {turns} · {doing}" if turns > 1 else doing)


def _by_side(runs: list[dict[str, Any]], sides: list[Side]) -> list[dict[str, Any]]:
    """Turns begin with either side, the table always with the first: what is compared with comes second."""
    return sorted(runs, key=lambda run: (run["workload"], run["runner"] == "packed" and len(sides) > 1))


def _show(tables: list[Table], where: dict[str, Any]) -> None:
    from benchmarks.setting import in_words

    console = terminal.stdout()
    console.width = max(console.width, 132)  # a cell that is cut loses more than a line that wraps
    for table in tables:
        console.print(table)
    console.print(in_words(where), style="dim", markup=False)


@contextmanager
def _moving_line() -> Iterator[Report]:
    """A line on the terminal that says what runs; nothing where nobody looks."""
    console = terminal.stderr()
    if not console.is_terminal:
        yield lambda _doing: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(style=terminal.ACCENT), TextColumn("{task.description}", markup=False))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, refresh_per_second=_PAINT_PER_S
    ) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda doing: progress.update(task, description=doing)
