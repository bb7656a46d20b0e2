"""The requests in the picture of `paceline top`: those that run, those that wait, and those that ended last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from paceline_cli.sight.drawing import Column, Ink, Stretch, legend, spread, stacked_bar, table
from paceline_cli.sight.words import NOTHING, duration, milliseconds, plain, shorten

if TYPE_CHECKING:
    from paceline.v1 import observation_pb2 as pb

SORTS = ("stage", "slowest", "latest")
STAGES = (Ink("queue", "yellow", "·"), Ink("prefill", "magenta", "▒"), Ink("decode", "blue", "━"))
_AT_DOOR = Ink("door", "cyan", "-")
OUTCOMES = {
    "stop": "green",
    "length": "green",
    "cancelled": "bright_black",
    "deadline": "red",
    "error": "bold red",
    "cut off": "red",
}
_STAGE_NAMES = ("", "queue", "prefill", "decode", "ended", "door")
_STAGE_COLOURS = ("", "yellow", "magenta", "blue", "", "cyan")
_ENDED, _QUEUE, _DOOR = 4, 1, 5
_WAITING = (_QUEUE, _DOOR)
_INKS = {**dict(enumerate(STAGES, start=_QUEUE)), _DOOR: _AT_DOOR}  # by stage
_COLUMNS = (
    Column("request", 0),
    Column("tenant", 8, most=14),
    Column("stage", 1),
    Column("executor", 6, most=16),
    Column("prompt", 5, right=True),
    Column("→ output", 3),
    Column("first", 4, right=True),
    Column("time", 2, right=True),
    Column("what went wrong", 9, most=50),
)


def request_lines(
    overview: pb.GetOverviewResponse, width: int, height: int | None, mono: bool, sort: str
) -> list[Text]:
    """A title, then a line for each request that there is room for."""
    load = overview.load
    numbers = f" {load.running_request_count:,} running · {load.waiting_request_count:,} waiting"
    title = Text.assemble(("requests", "bold"), (numbers, "dim"))
    ended = Text(" · the last that ended", style="dim")
    if title.cell_len + ended.cell_len <= width:
        title.append_text(ended)
    has_door = any(phase.stage == _DOOR for one in overview.requests for phase in one.phases)
    title = spread(title, legend((_AT_DOOR, *STAGES) if has_door else STAGES, mono), width)
    if not overview.requests:
        return [title, Text('none yet: `paceline generate "Once upon a time"` makes one', style="dim")]
    room = len(overview.requests) if height is None else max(0, height - 2)
    shown = chosen(overview.requests, room, sort)
    rows = [
        _cells(one, overview.at_unix_ms, 11 if width < 90 else 14 if width < 110 else 20 if width < 150 else 38)
        for one in shown
    ]
    empty = [index for index in (1, 8) if not any(row[index] for row in rows)]
    columns = tuple(column for index, column in enumerate(_COLUMNS) if index not in empty)
    rows = [tuple(cell for index, cell in enumerate(row) if index not in empty) for row in rows]
    bars = Stretch(Text("its time", style="dim"), lambda row, cells: time_bar(shown[row], cells, mono), most=60)
    return [title, *table(columns, rows, width, bars)]


def chosen(requests: Sequence[pb.RequestOverview], room: int, sort: str) -> list[pb.RequestOverview]:
    """As many requests as there is room for: of those that run, wait and have ended, each its part."""
    if sort == "slowest":
        return sorted(requests, key=length_ms, reverse=True)[:room]
    if sort == "latest":
        return sorted(requests, key=lambda one: one.received_unix_ms, reverse=True)[:room]
    kinds: tuple[list[pb.RequestOverview], ...] = ([], [], [])
    for one in requests:
        kinds[2 if one.stage == _ENDED else 1 if one.stage in _WAITING else 0].append(one)
    counts = [0, 0, 0]
    for kind, share in zip((2, 1, 0), (4, 3, 1), strict=True):  # who ended may have a quarter, who waits a third of it
        counts[kind] = min(len(kinds[kind]), -(-(room - sum(counts)) // share))
    for kind in (0, 1, 2):
        counts[kind] = min(len(kinds[kind]), counts[kind] + room - sum(counts))
    return [one for kind, number in zip(kinds, counts, strict=True) for one in kind[:number]]


def length_ms(one: pb.RequestOverview) -> float:
    """How long it took, or takes so far."""
    return one.total_ms or (one.phases[-1].end_ms if one.phases else 0.0)


def _cells(one: pb.RequestOverview, at_unix_ms: int, id_width: int) -> tuple[Text, ...]:
    has_ended = one.stage == _ENDED
    length_ms = one.total_ms if has_ended else max(0.0, at_unix_ms - one.received_unix_ms)
    if has_ended:
        stage = Text(one.outcome or "ended", style=OUTCOMES.get(one.outcome, ""))
    else:
        stage = Text(_STAGE_NAMES[one.stage], style=_STAGE_COLOURS[one.stage])
    if one.recomputation_count:
        stage.append(f" ↻{one.recomputation_count}", style="yellow")
    reused = f" ({one.reused_token_count:,})" if one.reused_token_count else ""
    output = Text.assemble(("→ ", "dim"), f"{one.output_token_count:,}", (f"/{one.max_output_token_count:,}", "dim"))
    if one.choice_count > 1:
        output.append(f" x{one.choice_count}", style="dim")
    is_waiting = one.stage in _WAITING
    return (
        Text(shorten(one.request_id, id_width), style="dim" if has_ended else ""),
        Text(shorten(one.tenant, 14)),
        stage,
        Text(shorten(executor_of(one), 16), style="dim"),
        Text(f"{one.prompt_token_count:,}{reused}"),
        output,
        Text(milliseconds(one.first_token_ms), style="dim" if not one.first_token_ms else ""),
        Text(duration(length_ms / 1000), style="yellow" if is_waiting else ""),
        Text(plain(one.error), style="red"),
    )


def executor_of(one: pb.RequestOverview) -> str:
    """Where it runs, or ran last."""
    if one.stage in _WAITING:
        return NOTHING
    return next((phase.executor_id for phase in reversed(one.phases) if phase.executor_id), NOTHING)


def time_bar(one: pb.RequestOverview, width: int, mono: bool) -> Text:
    """Its time from its receipt to its end or until now, in order."""
    parts = [(_INKS[phase.stage], phase.end_ms - phase.begin_ms) for phase in one.phases if phase.stage in _INKS]
    return stacked_bar(parts, width, mono, block="━")
