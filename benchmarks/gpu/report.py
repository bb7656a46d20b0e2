"""What was found, as Markdown: a table for each part, then the goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.given import IN_PROCESS, PEER, SERVED, Row

NOTHING = "–"
_DECODING = (
    *("model", "batch", "tokens/s in process", "step, ms", "of the bound", "idle"),
    *("tokens/s, whole system", "of the bound", "idle", "of in process", "transformers", "times it"),
)
_UNSHOWN = ("part", "way", "took_s")
_BOUND, _AGAINST, _IDLE, _OVER = 0.8, 1.5, 0.02, 0.02
_MODEL, _LARGEST_BATCH = "8B", 64  # what the goals of decoding are about


@dataclass(frozen=True, slots=True)
class Goal:
    """One of them, and how it went; `is_met` None: not measured."""

    what: str
    found: str
    is_met: bool | None


class Results:
    """The rows of all parts."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        speeds = [row["GB/s"] for row in self.of("ceilings") if "GB/s" in row]
        self.bandwidth = max(speeds, default=None)  # GB/s

    def of(self, *parts: str) -> list[Row]:
        """The rows of these parts that hold figures."""
        return [row for row in self.rows if row["part"] in parts and "failure" not in row]

    def failures(self) -> list[Row]:
        """What failed or was left out."""
        return [row for row in self.rows if "failure" in row]

    def decoding(self, way: str, model: str, batch: int) -> Row | None:
        """How a model decoded in one way; of several runs of a way the fastest one counts."""
        named = [
            row
            for row in self.of("models", "transformers")
            if (row.get("way"), row.get("model"), row.get("batch")) == (way, model, batch)
        ]
        return max(named, key=lambda row: row["tokens_per_s"], default=None)

    def bound_share(self, row: Row | None) -> float | None:
        """How near a step comes to reading weights, keys and values at the bandwidth that was measured."""
        if row is None or self.bandwidth is None:
            return None
        least_ms = row["step_bytes"] / (self.bandwidth * 1e6)
        return least_ms / row["step_ms"]

    def ratio(self, one: str, other: str, model: str, batch: int) -> float | None:
        """How many times as many tokens one way gives as the other."""
        pair = [self.decoding(way, model, batch) for way in (one, other)]
        return pair[0]["tokens_per_s"] / pair[1]["tokens_per_s"] if pair[0] and pair[1] else None

    def batches(self) -> list[tuple[str, int]]:
        """Models and batch sizes that decoded."""
        return sorted(
            {(row["model"], row["batch"]) for row in self.of("models", "transformers") if "tokens_per_s" in row},
            key=lambda pair: (-float(pair[0].rstrip("B")), pair[1]),
        )


def goals(results: Results) -> list[Goal]:
    """What is wanted on a GPU, over the model and the batch sizes that the goals name."""
    batches = [batch for model, batch in results.batches() if model == _MODEL and batch <= _LARGEST_BATCH]
    rows = {way: [results.decoding(way, _MODEL, batch) for batch in batches] for way in (IN_PROCESS, SERVED)}
    least = f"{_MODEL}, batch 1 to {_LARGEST_BATCH}"
    found = [
        _least(f"{least}: share of the bandwidth bound, {way}", [results.bound_share(row) for row in rows[way]], _BOUND)
        for way in (IN_PROCESS, SERVED)
    ]
    for way in (IN_PROCESS, SERVED):
        ratios = [results.ratio(way, PEER, _MODEL, batch) for batch in batches]
        found.append(_least(f"{least}: times transformers' continuous batching, {way}", ratios, _AGAINST, _number))
    idle = [row["idle_share"] for way in rows for row in rows[way] if row]
    found.append(_most(f"{least}: executor idle", idle, _IDLE))
    over = [row["over_budget"] for row in results.of("models") if row.get("way") == "memory"]
    found.append(_most("peak memory over its budget", over, _OVER))
    checked = results.of("kernels")
    wrong = [str(row.get("name")) for row in checked if not row.get("is_right", True)]
    said = f"{len(checked) - len(wrong)} of {len(checked)}" + (f", not {', '.join(wrong)}" if wrong else "")
    found.append(Goal("kernels right against float64", said if checked else NOTHING, not wrong if checked else None))
    tests = results.of("tests")
    counts = ", ".join(f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped" for row in tests)
    is_met = all(row["passed"] and not row["failed"] for row in tests) if tests else None
    return [*found, Goal("tests that need a GPU", counts or NOTHING, is_met)]


def markdown(results: Results, setting: dict[str, Any]) -> str:
    """All of it; what matters most comes last, where a terminal and a log that is cut off show it."""
    head = "Rehearsal of the GPU check: no figure means anything" if setting.get("rehearsal") else "GPU check"
    parts = [f"# {head}, {setting['date'][:10]}", _in_words(setting)]
    for title, rows in (
        ("Ceilings", results.of("ceilings")),
        ("Kernels", results.of("kernels")),
        ("Kernel speed", [_with_share(row, results.bandwidth) for row in results.of("kernel speed")]),
        ("Starts", [row for row in results.of("models") if row.get("way") == "start"]),
        ("Where a step goes", [row for row in results.of("models") if row.get("way") == "step"]),
        ("Memory", [row for row in results.of("models") if row.get("way") == "memory"]),
    ):
        if rows:
            parts += [f"## {title}", _plain_tables(rows)]
    parts += ["## Decoding", _decoding_table(results)]
    if failures := results.failures():
        lines = [_line("part", "what happened"), _line("---", "---")]
        lines += [_line(f"{row['part']} {row.get('model', '')}".strip(), _one_line(row["failure"])) for row in failures]
        parts += ["## Failed or left out", "\n".join(lines)]
    return "\n\n".join([*parts, "## Goals", _goals_table(goals(results), setting)]) + "\n"


def _with_share(row: Row, bandwidth: float | None) -> Row:
    """With the share of the bandwidth that was measured, where a kernel tells its own."""
    if bandwidth is None or "GB/s" not in row:
        return row
    return row | {"of the bandwidth": _percent(row["GB/s"] / bandwidth)}


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _number(value: float) -> str:
    return f"{value:.2f}"


def _least(what: str, values: Sequence[float | None], limit: float, say: Callable[[float], str] = _percent) -> Goal:
    return _judged(f"{what} ≥ {say(limit)}", values, min, lambda value: value >= limit, say)


def _most(what: str, values: Sequence[float | None], limit: float) -> Goal:
    return _judged(f"{what} ≤ {_percent(limit)}", values, max, lambda value: value <= limit, _percent)


def _judged(
    what: str,
    values: Sequence[float | None],
    worst: Callable[[Sequence[float]], float],
    is_good: Callable[[float], bool],
    say: Callable[[float], str],
) -> Goal:
    """By the worst of the values; without all of them a goal can be missed, but not met."""
    known = [value for value in values if value is not None]
    if not known:
        return Goal(what, NOTHING, None)
    is_met = is_good(worst(known))
    is_whole = len(known) == len(values)
    return Goal(
        what, " · ".join(NOTHING if v is None else say(v) for v in values), is_met if is_whole else is_met and None
    )


def _in_words(setting: dict[str, Any]) -> str:
    return " · ".join(f"{name} {value}" for name, value in setting.items() if value not in (None, ""))


def _goals_table(found: Sequence[Goal], setting: dict[str, Any]) -> str:
    words = {True: "met", False: "**missed**", None: "not measured"}
    if setting.get("rehearsal"):
        words = dict.fromkeys(words, "rehearsed")
    lines = [_line("goal", "found", ""), _line("---", "---:", "---")]
    return "\n".join(lines + [_line(goal.what, goal.found, words[goal.is_met]) for goal in found])


def _decoding_table(results: Results) -> str:
    lines = [_line(*_DECODING), _line(*["---"] + ["---:"] * (len(_DECODING) - 1))]
    for model, batch in results.batches():
        here, served, peer = (results.decoding(way, model, batch) for way in (IN_PROCESS, SERVED, PEER))
        lines.append(
            _line(
                model,
                str(batch),
                _cell(here, "tokens_per_s", ",.0f"),
                _cell(here, "step_ms", ".2f"),
                _shown(results.bound_share(here), ".1%"),
                _cell(here, "idle_share", ".1%"),
                _cell(served, "tokens_per_s", ",.0f"),
                _shown(results.bound_share(served), ".1%"),
                _cell(served, "idle_share", ".1%"),
                _shown(results.ratio(SERVED, IN_PROCESS, model, batch), ".1%"),
                f"{_cell(peer, 'tokens_per_s', ',.0f')} ({peer['how']})" if peer else NOTHING,
                _shown(results.ratio(IN_PROCESS, PEER, model, batch), ".2f"),
            )
        )
    return "\n".join(lines)


def _cell(row: Row | None, name: str, form: str) -> str:
    return NOTHING if row is None else format(row[name], form)


def _shown(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _plain_tables(rows: Sequence[Row]) -> str:
    """Rows as they are, a table for each set of columns."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(name for name in row if name not in _UNSHOWN), []).append(row)
    tables = []
    for names, group in groups.items():
        lines = [_line(*names), _line(*["---"] * len(names))]
        tables.append("\n".join(lines + [_line(*(_plain(row[name]) for name in names)) for row in group]))
    return "\n\n".join(tables)


def _plain(value: Any) -> str:
    if not isinstance(value, float):
        return _one_line(str(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
