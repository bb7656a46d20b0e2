"""What a comparison says: a table of all servers, and how Paceline stands to the best of them."""

import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]
NOTHING = "–"

# What a run says, and of which type; Paceline's own runs and those of the others are alike.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "server": str,
    "mode": str,
    "workload": str,
    "dtype": str,
    "threads": int,
    "turn": int,
    "requests": int,
    "prompt_tokens": int,
    "output_tokens": int,
    "seconds": (int, float),
    "tokens_per_s": (int, float),
    "first_token_ms": dict,
    "between_tokens_ms": dict,
    "peak_mib": dict,
    "start_s": (int, float),
}
TITLES = {"paceline": "Paceline", "vllm": "vLLM", "llama.cpp": "llama.cpp", "transformers": "transformers"}
MODES = {"serve": "server", "offline": "offline"}
HEAD = ("", "W1, tokens/s", "W2", "W4", "W3: first token, ms", "W3: between tokens, ms", "peak MiB", "start, s")

# Which of Paceline's runs stand against whose, and by which workloads.
AGAINST = (
    ("offline", "vllm", "offline", ("W1", "W2", "W4")),
    ("serve", "vllm", "serve", ("W1", "W2", "W4")),
    ("serve", "llama.cpp", "serve", ("W4",)),
)


def problems(run: Run) -> list[str]:
    """What is missing in a run, or of another type than is read here."""
    found = [f"{name} is missing" for name in FIELDS if name not in run]
    for name, kinds in FIELDS.items():
        if name in run and not isinstance(run[name], kinds):
            found.append(f"{name} is {run[name]!r}")
    return found


def table(runs: Sequence[Run]) -> str:
    """A row of Markdown for each server and way, medians over the turns."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    for name in dict.fromkeys(_name(run) for run in runs):
        mine = [run for run in runs if _name(run) == name]
        lines.append("| " + " | ".join([name, *_cells(mine)]) + " |")
    limits = sorted({run["limit"] for run in runs if run.get("limit")})
    if limits:
        lines += ["", f"\\* only the first {' or '.join(map(str, limits))} requests: all of them would take minutes."]
    return "\n".join(lines)


def ratios(runs: Sequence[Run]) -> str:
    """How many times as fast Paceline is: the median of the turns, and their range."""
    lines = []
    for mode, peer, peer_mode, workloads in AGAINST:
        parts = [f"{w} {said}" for w in workloads if (said := _ratio(runs, mode, peer, peer_mode, w)) is not None]
        if parts:
            lines.append(f"Paceline {MODES[mode]} / {TITLES[peer]} {MODES[peer_mode]}: {', '.join(parts)}")
    return "\n".join(lines)


def _ratio(runs: Sequence[Run], mode: str, peer: str, peer_mode: str, workload: str) -> str | None:
    """By turns, because what the machine does to one turn it does to both; of several ways the fastest one counts."""
    ours, theirs = _speeds(runs, "paceline", mode, workload), _speeds(runs, peer, peer_mode, workload)
    found = [ours[turn] / theirs[turn] for turn in ours if turn in theirs]
    if not found:
        return None
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"**{statistics.median(found):.2f}**{spread}"


def _speeds(runs: Sequence[Run], server: str, mode: str, workload: str) -> dict[int, float]:
    speeds: dict[int, float] = {}
    for run in runs:
        if not _is_part(run) and (run["server"], run["mode"], run["workload"]) == (server, mode, workload):
            speeds[run["turn"]] = max(run["tokens_per_s"], speeds.get(run["turn"], 0.0))
    return speeds


def _is_part(run: Run) -> bool:
    """Whether only some of the requests were made: fewer at once say nothing about all of them."""
    return bool(run.get("limit")) and run["requests"] >= run["limit"]


def _name(run: Run) -> str:
    parts = [TITLES.get(run["server"], run["server"]), MODES[run["mode"]], run.get("way")]
    return ", ".join(part for part in parts if part)


def _cells(runs: Sequence[Run]) -> list[str]:
    speeds = [_speed([run for run in runs if run["workload"] == name]) for name in ("W1", "W2", "W4")]
    over_time = [run for run in runs if run["workload"] == "W3"]
    peaks = {turn: max(_peak(run) for run in runs if run["turn"] == turn) for turn in {run["turn"] for run in runs}}
    return [
        *speeds,
        _spread(over_time, "first_token_ms"),
        _spread(over_time, "between_tokens_ms"),
        f"{statistics.median(peaks.values()):,.0f}",
        f"{statistics.median(run['start_s'] for run in runs):,.1f}",
    ]


def _speed(runs: Sequence[Run]) -> str:
    if not runs:
        return NOTHING
    mark = "\\*" if any(map(_is_part, runs)) else ""
    return f"{statistics.median(run['tokens_per_s'] for run in runs):,.0f}{mark}"


def _spread(runs: Sequence[Run], name: str) -> str:
    """Both percentiles, each the median of the turns: `50th / 99th`."""
    medians = [_median([run[name][p] for run in runs if run[name][p] is not None]) for p in ("p50", "p99")]
    return " / ".join(medians) if runs else NOTHING


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f}" if values else NOTHING


def _peak(run: Run) -> float:
    """Of all its processes together."""
    return sum(value for value in run["peak_mib"].values() if value is not None)
