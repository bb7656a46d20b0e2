"""The executors in the picture of `paceline top`: a line for each, with its time and its cache as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from paceline_cli.sight.drawing import Column, Ink, Stretch, block_map, legend, spread, stacked_bar, table
from paceline_cli.sight.words import NOTHING, amount, duration, percent, shorten

if TYPE_CHECKING:
    from paceline.v1 import observation_pb2 as pb

# Not "wait": while a plan waits, the step before it runs, and its time is counted there.
PHASES = (
    Ink("idle", "red", "i"),
    Ink("prepare", "magenta", "p"),
    Ink("forward", "blue", "f"),
    Ink("sample", "cyan", "s"),
)
_BLOCKS = (Ink("held", "blue", "█"), Ink("cached", "cyan", "▒"), Ink("free", "bright_black", "·"))
_MUCH_IDLE = 0.02  # of the time, from which on it is shown in red: the split costs too much
_ENOUGH_REQUESTS = 2  # who run there, below which a moment without a plan is a large share of little time
_STATES = {"ready": "green", "draining": "yellow", "connecting": "cyan"}
_COLUMNS = (
    Column("executor", 0, most=24),
    Column("state", 1),
    Column("requests", 2, right=True),
    Column("computed/s", 3, right=True),
    Column("steps/s", 8, right=True),
    Column("step", 5, right=True),
    Column("in a step", 4),
    Column("idle", 6, right=True),
    Column("held", 7, right=True),
    Column("reused", 9, right=True),
)


def executor_lines(overview: pb.GetOverviewResponse, width: int, height: int | None, mono: bool) -> list[Text]:
    """A title, then a line for each executor; if these are too many for `height`, the last one counts the rest."""
    executors = list(overview.executors)
    title = Text.assemble(("executors", "bold"), (f" {len(executors)}", "dim"))
    if not executors:
        return [title, Text(_none_means(overview), style="yellow")]
    room = len(executors) if height is None else max(1, height - 2)
    shown = executors if len(executors) <= room else executors[: max(1, room - 1)]
    bar_width = 10 if width < 100 else 16 if width < 160 else 24
    rows = [_cells(one, bar_width, mono) for one in shown]
    blocks = Stretch(
        Text("blocks", style="dim"),
        lambda row, cells: block_map(shown[row].block_cells, cells, mono),
        least=10,
        most=96,
    )
    lines = [spread(title, Text("   ").join([legend(PHASES, mono), legend(_BLOCKS, mono)]), width)]
    lines += table(_COLUMNS, rows, width, blocks)
    if len(shown) < len(executors):
        lines.append(Text(f"… and {len(executors) - len(shown)} more: `paceline fleet list`", style="dim"))
    return lines


def _cells(overview: pb.ExecutorOverview, bar_width: int, mono: bool) -> tuple[Text, ...]:
    executor = overview.executor
    state = _state_of(overview)
    blocks = executor.capacity.block_count
    held = (blocks - executor.free_block_count) / blocks if blocks else 0.0
    known = executor.known_token_count
    is_idle = overview.idle_share >= _MUCH_IDLE and executor.running_request_count >= _ENOUGH_REQUESTS
    phases = [(ink, getattr(overview.phases, f"{ink.name}_us")) for ink in PHASES]
    return (
        Text(shorten(executor.executor_id, 24)),
        Text(state, style=_STATES.get(state, "")),
        Text(f"{executor.running_request_count:,}/{executor.capacity.slot_count:,}"),
        Text(amount(max(0.0, overview.tokens_per_s))),
        Text(amount(max(0.0, overview.steps_per_s))),
        Text(duration(executor.step_us / 1e6) if executor.step_us else "–"),
        stacked_bar(phases, bar_width, mono),
        Text(percent(overview.idle_share), style="bold red" if is_idle else ""),
        Text(percent(held) if state != "connecting" else NOTHING),
        Text(percent(executor.reused_token_count / known) if known else "–"),
    )


def _state_of(overview: pb.ExecutorOverview) -> str:
    from paceline.v1 import fleet_pb2

    return fleet_pb2.ExecutorState.Name(overview.executor.state).removeprefix("EXECUTOR_STATE_").lower()


def _none_means(overview: pb.GetOverviewResponse) -> str:
    """What it means that there is no executor: a scheduler that has never seen one does not know what to let in."""
    had_some = overview.requests or any(sample.ready_executor_count for sample in overview.history)
    if had_some or overview.HasField("scaling"):
        return "no executor is there: requests wait for the next one"
    return "no executor has joined yet: `paceline executor` starts one"
