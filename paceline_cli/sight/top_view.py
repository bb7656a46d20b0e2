"""The picture of `paceline top`: an overview as lines of text for a terminal of a given size."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from paceline_cli.sight.drawing import chart, fitted, spread
from paceline_cli.sight.executor_rows import executor_lines
from paceline_cli.sight.request_rows import SORTS, request_lines
from paceline_cli.sight.words import age, amount, clock, duration, milliseconds, percent, plain
from paceline_cli.sizes import format_size

if TYPE_CHECKING:
    from paceline.v1 import observation_pb2 as pb

_ROOMY = 34  # lines of a terminal from which on there is room for air and higher charts
_CHART_GAP = 3
_CLOCK = 16  # cells at the right of the head


@dataclass(frozen=True, slots=True)
class Look:
    """How an overview is to be shown."""

    width: int = 100
    height: int | None = 24  # None: as high as it takes
    mono: bool = False  # letters tell apart what colours would
    sort: str = SORTS[0]
    is_paused: bool = False
    has_keys: bool = False
    trouble: str = ""  # why the overview is not of now


def picture(overview: pb.GetOverviewResponse, look: Look) -> list[Text]:
    """Everything at a glance: lines of at most `look.width` cells, and as many as the terminal has."""
    is_roomy = look.height is None or look.height >= _ROOMY
    lines = [_head(overview, look)]
    if look.trouble:
        lines.append(fitted(Text(f" {look.trouble} ", style="bold white on red"), look.width))
    air = [Text()] if is_roomy else []
    lines += [*air, *_figures(overview, look, is_roomy), *air]
    lines += [*_charts(overview, look, 3 if is_roomy else 1), *air]
    if overview.HasField("scaling"):
        lines += [*_autoscaler(overview, look, 2 if is_roomy else 1), *air]
    footer = [_footer(look)] if look.has_keys else []
    room = None if look.height is None else look.height - len(lines) - len(footer) - len(air)
    lines += executor_lines(overview, look.width, None if room is None else max(3, room // 2), look.mono)
    lines += air
    room = None if look.height is None else look.height - len(lines) - len(footer)
    lines += request_lines(overview, look.width, room, look.mono, look.sort)
    if look.height is not None:
        lines = lines[: look.height - len(footer)]
        lines += [Text()] * (look.height - len(footer) - len(lines))
    lines = [*lines, *footer]
    return [_greyed(line) for line in lines] if look.trouble else lines


def nothing_yet(look: Look, address: str) -> list[Text]:
    """The picture before the first answer."""
    text = look.trouble or f"asking {address} …"
    lines = [Text("paceline top", style="bold"), Text(), Text(plain(text), style="red" if look.trouble else "dim")]
    if look.trouble:
        lines.append(Text("it goes on by itself when a scheduler answers there: `paceline serve` starts one", "dim"))
    lines += [Text()] * ((look.height or 0) - len(lines) - 1)
    return [fitted(line, look.width) for line in [*lines, _footer(look) if look.has_keys else Text()]][: look.height]


def _greyed(line: Text) -> Text:
    """A line of a picture that is no longer true; what says so stays as it is."""
    return line if "on red" in str(line.style) else Text(line.plain, style="bright_black")


# --- the head -------------------------------------------------------------------------------------------------------


def _head(overview: pb.GetOverviewResponse, look: Look) -> Text:
    load = overview.load
    up_s = max(0, overview.at_unix_ms - overview.started_unix_ms) / 1000
    release = plain(overview.release)
    model = Text.assemble(("paceline ", "dim"), (plain(load.model) or "(no model)", "bold"))
    durability = Text(*_durability(overview, with_size=look.width >= 100))
    left = Text.assemble(model, (f"  {release} · up {age(up_s)} · ", "dim"), durability)
    if left.cell_len > look.width - _CLOCK:  # what may be bad news stays
        left = Text.assemble(model, ("  ", ""), durability)
    if left.cell_len > look.width - _CLOCK:
        left = left[len("paceline ") :]
    state = ("paused", "bold yellow") if look.is_paused else ("live", "green")
    at = (f" {clock(overview.at_unix_ms)}", "dim")
    if look.trouble:
        state, at = ("of", "dim"), at
    return spread(fitted(left, min(left.cell_len, look.width - _CLOCK)), Text.assemble(state, at), look.width)


def _durability(overview: pb.GetOverviewResponse, *, with_size: bool) -> tuple[str, str]:
    """Whether what users were told survives the scheduler."""
    from paceline.v1 import fleet_pb2

    size = f", journal {format_size(overview.journal_bytes)}" if with_size else ""
    return {
        fleet_pb2.DURABILITY_ON: (f"durable{size}", "green"),
        fleet_pb2.DURABILITY_OFF: ("no journal", "dim"),
        fleet_pb2.DURABILITY_LOST: ("JOURNAL LOST: nothing survives a restart", "bold red"),
    }.get(overview.durability, ("durability unknown", "dim"))


def _footer(look: Look) -> Text:
    pause = "go on" if look.is_paused else "pause"
    keys = (("q", "quit"), ("p", pause), ("s", f"sort: {look.sort}"))
    return Text("  ").join(Text.assemble((key, "bold"), " ", (what, "dim")) for key, what in keys)


# --- is it fine? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Figure:
    """One of the figures that tell whether all is well."""

    name: str
    value: Text
    aside: Text  # beside it where there is a single line
    more: str  # below it where there are two


def _figures(overview: pb.GetOverviewResponse, look: Look, is_roomy: bool) -> list[Text]:
    """The figures, with more about each below it if there is room."""
    figures = _figures_of(overview)
    tops = [Text.assemble(one.value, (f" {one.name}", "dim")) for one in figures]
    mores = [Text(one.more, style="dim") for one in figures]
    widths = [max(top.cell_len, more.cell_len) for top, more in zip(tops, mores, strict=True)]
    air = min(6, (look.width - sum(widths)) // max(1, len(figures) - 1))
    if not is_roomy or air < 2:
        names = [one.name.removesuffix(" token") for one in figures]
        parts = [
            Text.assemble((f"{name} ", "dim"), one.value, one.aside) for name, one in zip(names, figures, strict=True)
        ]
        while len(parts) > 1 and Text("  ").join(parts).cell_len > look.width:
            parts.pop()
        return [fitted(Text("  ").join(parts), look.width)]
    rows = [
        Text(" " * air).join(fitted(cell, width) for cell, width in zip(row, widths, strict=True))
        for row in (tops, mores)
    ]
    return [fitted(row, look.width) for row in rows]


def _figures_of(overview: pb.GetOverviewResponse) -> list[_Figure]:
    load = overview.load
    p50, p95 = load.first_token.p50_us / 1000, load.first_token.p95_us / 1000
    held_share = load.held_block_count / load.block_count if load.block_count else 0.0
    has_waiting = load.waiting_request_count > 0
    oldest = duration(load.oldest_waiting_ms / 1000)
    held = overview.at_door_request_count
    at_door = f", {held:,} at the door for {duration(overview.oldest_at_door_ms / 1000)}" if held else ""
    rate = overview.history[-1].tokens_per_s if overview.history else 0.0
    backlog = f"backlog {duration(load.backlog_ms / 1000)}" if load.backlog_ms else "no backlog"
    lately = overview.refused_in_last_minute_count
    refused = f", {lately:,} refused in the last minute" if lately else ""
    each = f", then {milliseconds(load.per_token.p50_us / 1000)} a token" if load.per_token.p50_us else ""
    return [
        _Figure(
            "running", _bold(load.running_request_count), Text(), f"{amount(load.running_token_count)} tokens held"
        ),
        _Figure(
            "waiting",
            Text(amount(load.waiting_request_count), style="bold yellow" if has_waiting else "bold"),
            Text((f" ({oldest}{at_door})" if has_waiting else at_door) + refused, style="yellow"),
            (f"oldest {oldest}" if has_waiting else f"nobody{refused}") + at_door,
        ),
        _Figure("tokens/s", _bold(rate), Text(), backlog + (refused if has_waiting else "")),
        _Figure(
            "first token",
            Text(milliseconds(p50), style="bold"),
            Text(f" p95 {milliseconds(p95)}", style="dim"),
            f"95 % within {milliseconds(p95)}{each}" if p95 else "none in the last minute",
        ),
        _Figure(
            "held",
            Text(percent(held_share), style="bold"),
            Text(),
            f"{load.held_block_count:,} of {load.block_count:,} blocks" if load.block_count else "no cache is there",
        ),
    ]


def _bold(value: float) -> Text:
    return Text(amount(value), style="bold")


# --- the last ten minutes -------------------------------------------------------------------------------------------


def _charts(overview: pb.GetOverviewResponse, look: Look, height: int) -> list[Text]:
    """How it went: charts side by side, each under a line that names it."""
    history = overview.history
    if not history:
        return [Text("no history yet: a sample is taken every two seconds", style="dim")]
    shown = _chart_series(history)[: 4 if look.width >= 100 else 3 if look.width >= 60 else 1]
    width = (look.width - _CHART_GAP * (len(shown) - 1)) // len(shown)
    gap = " " * _CHART_GAP
    titles = [fitted(_without_name(title, width), width) for title, *_ in shown]
    drawn = [chart(lower, upper, ("", "") if look.mono else inks, (width, height)) for _, lower, upper, inks in shown]
    return [Text(gap).join(row) for row in [titles, *zip(*drawn, strict=True)]]


_Series = tuple[Text, list[float], list[float], tuple[str, str]]


def _chart_series(history: Sequence[pb.FleetSample]) -> list[_Series]:
    last = history[-1]
    running = [float(sample.running_request_count) for sample in history]
    waiting = [float(sample.waiting_request_count) for sample in history]
    ready = [float(sample.ready_executor_count) for sample in history]
    missing = [float(max(0, sample.wanted_executor_count - sample.ready_executor_count)) for sample in history]
    median = [sample.first_token_p50_ms for sample in history]
    beyond = [max(0.0, sample.first_token_p95_ms - sample.first_token_p50_ms) for sample in history]
    wanted = [f" wanted {last.wanted_executor_count}"] if last.HasField("wanted_executor_count") else []
    is_short = last.wanted_executor_count > last.ready_executor_count
    rates, none = [sample.tokens_per_s for sample in history], [0.0] * len(history)
    return [
        (
            _title("", _scale(running, waiting), ("running", "blue"), ("waiting", "yellow")),
            running,
            waiting,
            ("blue", "yellow"),
        ),
        (
            _title("tokens/s", _scale(rates, none)),
            rates,
            none,
            ("cyan", "cyan"),
        ),
        (
            _title(
                "executors",
                (f"ready {last.ready_executor_count}", "green"),
                *((text, "red" if is_short else "dim") for text in wanted),
            ),
            ready,
            missing,
            ("green", "red"),
        ),
        (
            _title("first token", _scale(median, beyond, milliseconds), ("p50", "magenta"), ("p95", "bright_black")),
            median,
            beyond,
            ("magenta", "bright_black"),
        ),
    ]


def _scale(lower: list[float], upper: list[float], words: Callable[[float], str] = amount) -> tuple[str, str]:
    """What the top of a chart stands for."""
    return f"≤{words(max(map(sum, zip(lower, upper, strict=True))))}", "dim"


def _without_name(title: Text, width: int) -> Text:
    """A title that has no room without its first word: what it names says enough, and `wante…` does not."""
    return title if title.cell_len <= width else title[title.plain.find(" ") + 1 :]


def _title(name: str, *parts: tuple[str, str]) -> Text:
    words = [(name, ""), *((text.strip(), colour) for text, colour in parts)]
    return Text(" ").join(Text(*word) for word in words if word[0])


# --- the autoscaler -------------------------------------------------------------------------------------------------


def _autoscaler(overview: pb.GetOverviewResponse, look: Look, height: int) -> list[Text]:
    """What it decided last and since when, in at most `height` lines."""
    scaling, decision = overview.scaling, overview.scaling.decision
    text = Text.assemble(("autoscaler ", "dim"))
    if not scaling.HasField("decision"):
        text.append(f"{plain(scaling.holder_id)} has not said what it wants")
        return _wrapped(text, look.width, height)
    policy, reason = _reason(decision.reason, decision.wanted_executor_count)
    text.append(f"wants {decision.wanted_executor_count}", style="bold")
    text.append(f" ({plain(policy)})" if policy else "", style="dim")
    if scaling.starting_executor_count:
        text.append(f", {scaling.starting_executor_count} starting", style="yellow")
    if decision.changed_unix_ms:
        since_s = max(0, overview.at_unix_ms - decision.changed_unix_ms) / 1000
        text.append(f", for {age(since_s)}", style="dim")
    text.append(f": {plain(reason)}")
    if decision.cost_per_hour:
        text.append(f" · {decision.cost_per_hour:.2f} per hour", style="dim")
    return _wrapped(text, look.width, height)


def _reason(reason: str, wanted_count: int) -> tuple[str, str]:
    """The policy that decided and why, without how much it wants where that is what came of it."""
    match = re.match(rf"(?:(\S+) )?wants {wanted_count}: ", reason)
    return (match[1] or "", reason[match.end() :]) if match else ("", reason)


def _wrapped(text: Text, width: int, height: int) -> list[Text]:
    from rich.console import Console

    lines = list(text.wrap(Console(width=width), width))
    if len(lines) <= height:
        return lines
    for line in lines:
        line.rstrip()
    rest = Text(" ").join(lines[height - 1 :])
    return [*lines[: height - 1], fitted(rest, width)]
