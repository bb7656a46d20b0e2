"""What was measured, as a table for people: medians over the turns."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import BenchmarkError

Run = dict[str, Any]
_SAME = ("server", "mode", "dtype", "runner", "threads")  # runs that differ in one of these are different servers


def results_table(runs: Sequence[Run], title: str) -> Table:
    """A row for each workload and server; where there are two servers, how many times as fast the first one is."""
    servers = list(dict.fromkeys(_server(run) for run in runs))
    table = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("workload")
    table.add_column("server", style="dim")
    names = ("tokens/s", "ratio") if len(servers) == 2 else ("tokens/s",)
    for name in (*names, "first token, ms\np50 · p99", "between, ms\np50 · p99", "seconds"):
        table.add_column(name, justify="right", style="bold cyan" if name == "tokens/s" else "")
    for name in ("executor\nMiB", "scheduler\nMiB", "start, s"):
        table.add_column(name, justify="right", style="dim")
    for workload in dict.fromkeys(run["workload"] for run in runs):
        for number, server in enumerate(servers):
            group = [run for run in runs if run["workload"] == workload and _server(run) == server]
            if not group:
                continue
            ratio = [_ratio(runs, workload, servers) if number == 0 else ""] if len(servers) == 2 else []
            table.add_row(workload if number == 0 else "", _in_words(server, servers), *_cells(group, ratio))
        if len(servers) > 1:
            table.add_section()
    return table


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write it for other tools."""
    try:
        path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror}; name another file with --json") from error


def _server(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in _SAME)


def _in_words(server: tuple[Any, ...], servers: Sequence[tuple[Any, ...]]) -> str:
    """How it runs, and before that what is not the same for all in the table."""
    *names, dtype, runner, threads = server
    parts = [name for number, name in enumerate(names) if len({other[number] for other in servers}) > 1]
    return " ".join([*parts, how_it_runs(runner, dtype, threads)])


def how_it_runs(runner: str, dtype: str, threads: int | None) -> str:
    """What runs the steps, in which type, with how many threads."""
    how = {"native": "C++", "packed": "torch"}.get(runner, runner)
    steps_in, _, weights = dtype.removesuffix(" weights").partition(" with ")
    kind = {"bfloat16": "bf16", "float32": "fp32", "none": ""}.get(steps_in, steps_in)
    kind = f"{weights} in {kind}" if weights else kind
    return " ".join(part for part in (how, kind, f"×{threads}" if threads else "") if part)


def _ratio(runs: Sequence[Run], workload: str, servers: Sequence[tuple[Any, ...]]) -> str:
    """The median of the turns' ratios: what the machine does to one turn it does to both servers."""
    speeds = [
        {run["turn"]: run["tokens_per_s"] for run in runs if run["workload"] == workload and _server(run) == server}
        for server in servers
    ]
    ratios = [speeds[0][turn] / speeds[1][turn] for turn in speeds[0] if turn in speeds[1]]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def _cells(group: Sequence[Run], ratio: Sequence[str]) -> list[str]:
    speed = _median([run["tokens_per_s"] for run in group])
    return [
        _figure(speed, ",.0f" if speed is None or speed >= 100 else ",.1f"),
        *ratio,
        *(_spread([run[name] for run in group]) for name in ("first_token_ms", "between_tokens_ms")),
        _figure(_median([run["seconds"] for run in group]), ",.1f"),
        *(_figure(_median([run["peak_mib"][part] for run in group]), ",.0f") for part in ("executor", "scheduler")),
        _figure(_median([run["start_s"] for run in group]), ",.1f"),
    ]


def _spread(spreads: Sequence[dict[str, float | None]]) -> str:
    return " · ".join(_figure(_median([spread[name] for spread in spreads]), ",.3g") for name in ("p50", "p99"))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _figure(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if form == ",.3g" and value >= 100 else format(value, form)
