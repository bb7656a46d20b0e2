"""A table of requests that tells which of them was slow, and at what."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from rich.text import Text

from paceline_cli.sight.drawing import Column, Stretch, table
from paceline_cli.sight.request_rows import OUTCOMES, executor_of, length_ms, time_bar
from paceline_cli.sight.words import NOTHING, duration, milliseconds, plain, shorten

if TYPE_CHECKING:
    from paceline.v1 import observation_pb2 as pb

_QUEUE, _DOOR = 1, 5  # stages
_ID_CELLS = 16  # of an id that is shortened: its two ends are enough for `paceline trace`
_WIDE = 110  # cells, from which on ids are whole
_MUCH = 0.5  # of its time, from which on a wait is coloured


class Sort(Enum):
    """What a request can be slow at."""

    DELAY = "delay"
    FIRST_TOKEN = "first-token"
    PER_TOKEN = "per-token"
    TOTAL = "total"


def listing(requests: Sequence[pb.RequestOverview], width: int, *, mono: bool = False) -> list[Text]:
    """Requests one below the other, with the columns that there is room for."""
    has_door = any(phase.stage == _DOOR for one in requests for phase in one.phases)
    columns = (
        Column("request", 0, most=max(_ID_CELLS, width // 2)),
        Column("took", 3, right=True),
        *([Column("door", 4, right=True)] if has_door else []),
        Column("queue", 5, right=True),
        Column("first", 1, right=True),
        Column("a token", 2, right=True),
        Column("executor", 7, most=12),
        Column("outcome", 6),
        Column("what went wrong", 8, most=50),
    )
    rows = [_cells(one, has_door=has_door, is_narrow=width < _WIDE) for one in requests]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    title, least, most = ("its time", 10, 40) if width >= _WIDE else ("", 0, 0)
    bars = Stretch(Text(title, style="dim"), lambda row, cells: time_bar(requests[row], cells, mono), least, most)
    return table(columns, rows, width, bars)


def _cells(one: pb.RequestOverview, *, has_door: bool, is_narrow: bool) -> tuple[Text, ...]:
    took = length_ms(one)
    outcome = Text(one.outcome or "goes on", style=OUTCOMES.get(one.outcome, "dim"))
    if one.recomputation_count:
        outcome.append(f" ↻{one.recomputation_count}", style="yellow")
    return (
        Text(shorten(one.request_id, _ID_CELLS) if is_narrow else plain(one.request_id)),
        Text(duration(took / 1000)),
        *([_wait(_spent(one, _DOOR), took)] if has_door else []),
        _wait(_spent(one, _QUEUE), took),
        Text(milliseconds(one.first_token_ms)),
        Text(milliseconds(per_token_ms(one))),
        Text(shorten(executor_of(one), 12), style="dim"),
        outcome,
        Text(plain(one.error), style="red"),
    )


def _wait(spent_ms: float, took_ms: float) -> Text:
    is_much = spent_ms > _MUCH * took_ms
    return Text(duration(spent_ms / 1000) if spent_ms else NOTHING, style="bold yellow" if is_much else "")


def _spent(one: pb.RequestOverview, stage: int) -> float:
    return sum(phase.end_ms - phase.begin_ms for phase in one.phases if phase.stage == stage)


# --- which was slow? ------------------------------------------------------------------------------------------------


def per_token_ms(one: pb.RequestOverview) -> float:
    """Mean time of the tokens after the first; of several choices, as if each had as many. 0: there are none."""
    count = _tokens(one) - 1
    return max(0.0, length_ms(one) - one.first_token_ms) / count if count > 0 and one.first_token_ms else 0.0


def usual_per_token_ms(requests: Sequence[pb.RequestOverview]) -> float:
    """What a token takes for half of these; 0: nobody has had two."""
    known = [each for one in requests if (each := per_token_ms(one))]
    return statistics.median(known) if known else 0.0


def slowest(requests: Sequence[pb.RequestOverview], sort: Sort) -> list[pb.RequestOverview]:
    """The slowest first. A delay is the time that its own tokens do not explain: long answers are not slow by that.

    Example: tokens usually take 20 ms. 100 of them in 2.5 s are a delay of 0.5 s, and 5 of them in 1.5 s one of 1.4 s.
    """
    usual = usual_per_token_ms(requests)
    keys: dict[Sort, Callable[[pb.RequestOverview], float]] = {
        Sort.DELAY: lambda one: length_ms(one) - usual * _tokens(one),
        Sort.FIRST_TOKEN: lambda one: one.first_token_ms or length_ms(one),  # it waits for it, or did in vain
        Sort.PER_TOKEN: per_token_ms,
        Sort.TOTAL: length_ms,
    }
    return sorted(requests, key=keys[sort], reverse=True)


def _tokens(one: pb.RequestOverview) -> float:
    return one.output_token_count / max(1, one.choice_count)
