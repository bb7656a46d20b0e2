"""The waterfall of one request: its spans on a common axis of time, what happened to it, and an account in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from paceline_cli.sight.drawing import fitted
from paceline_cli.sight.spans import Event, Span, folded
from paceline_cli.sight.words import NOTHING, count, duration, plain, shorten

_COLOURS = {
    "door": "cyan",
    "queue": "yellow",
    "prefill": "magenta",
    "decode": "blue",
    "wait": "bright_black",
    "idle": "red",
    "prepare": "magenta",
    "forward": "blue",
    "sample": "cyan",
}
_BAD_EVENTS = (
    "executor cut off",
    "executor did not come back",
    "executor came back without it",
    "executor lost",
    "preempted",
)
_LEAST_BAR, _SHORTEST_NAME, _LONGEST_NAME = 16, 8, 30
_TIME = 10  # cells of a time
_NARROW = 72  # cells, below which there is no column for the time at which something began


@dataclass(frozen=True, slots=True)
class _Axis:
    """The time of a request on so many cells."""

    begin_ns: int
    end_ns: int
    cells: int

    def cell(self, at_ns: int) -> int:
        """The cell that a moment is in."""
        share = (at_ns - self.begin_ns) / max(1, self.end_ns - self.begin_ns)
        return min(self.cells - 1, max(0, int(share * self.cells)))

    def bar(self, span: Span, depth: int) -> Text:
        """A span; a short one is a thin line, so that it is not taken for longer than it is."""
        first, last = self.cell(span.begin_ns), self.cell(max(span.begin_ns, span.end_ns - 1))
        cell_ns = max(1, (self.end_ns - self.begin_ns) / self.cells)
        is_thin = span.busy_ns < 0.35 * cell_ns
        colour = "red" if span.error is not None else _COLOURS.get(span.name, "bright_black")
        block = "▏" if is_thin else "▓" if span.count > 1 else "█" if depth else "━"
        return Text(" " * first).append(block * (1 if is_thin else last - first + 1), style=colour)

    def mark(self, event: Event) -> Text:
        """A moment."""
        cell = self.cell(event.at_ns)
        colour = _event_colour(event)
        return Text("╌" * cell, style="bright_black").append("◆", style=colour)

    def offset(self, at_ns: int) -> str:
        """When it was, from the beginning."""
        return f"+{duration((at_ns - self.begin_ns) / 1e9)}" if at_ns > self.begin_ns else "0"


def waterfall(request_id: str, roots: Sequence[Span], width: int) -> list[Text]:
    """The picture of a trace, in lines of `width` cells."""
    lines = []
    for root in roots:
        lines += _one(request_id, folded(root), root, width)
    return lines or [Text("the trace is empty", style="yellow")]


def _one(request_id: str, root: Span, whole: Span, width: int) -> list[Text]:
    rows = list(root.walk())
    names = [_name(depth, span) for depth, span in rows]
    events = sorted((event for _, span in rows for event in span.events), key=lambda event: event.at_ns)
    labels = [Text(f"◆ {plain(event.name)}{_of_choice(event)}", style=_event_colour(event)) for event in events]
    name_cells = min(_LONGEST_NAME, max(text.cell_len for text in [*names, *labels]))
    places = [shorten(span.executor_id or "scheduler", 14) for _, span in rows]
    place_cells = max(map(len, places))
    begun_cells = _TIME if width >= _NARROW else 0
    if name_cells + place_cells + begun_cells + _LEAST_BAR + _TIME + 6 > width:
        place_cells = begun_cells = 0  # the account below names the places
        name_cells = max(_SHORTEST_NAME, min(name_cells, width - _LEAST_BAR - _TIME - 4))
    spaces = 4 + (place_cells > 0) + (begun_cells > 0)  # with those beside the bar
    bar_cells = max(_LEAST_BAR, width - name_cells - place_cells - begun_cells - _TIME - spaces)
    axis = _Axis(root.begin_ns, root.end_ns, bar_cells)
    frame = _Frame(name_cells, place_cells, bar_cells, begun_cells)
    lines = [_title(request_id, root, width), Text(), frame.scale(axis)]
    for (depth, span), name, place in zip(rows, names, places, strict=True):
        taken = duration((span.end_ns - span.begin_ns if depth < 2 else span.busy_ns) / 1e9)  # chunks overlap
        lines.append(frame.row(name, place, axis.bar(span, depth), axis.offset(span.begin_ns), taken))
    for event, label in zip(events, labels, strict=True):
        about = shorten(str(event.facts.get("paceline.executor.id", "")), 14)
        lines.append(frame.row(label, about, axis.mark(event), axis.offset(event.at_ns), ""))
    lines = [fitted(line, min(width, line.cell_len)) for line in lines]
    return [*lines, Text(), *_told(whole, width)]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Columns: name, place, bar, when it began, how long it took. One without cells is left out."""

    name_cells: int
    place_cells: int
    bar_cells: int
    begun_cells: int

    def row(self, name: Text, place: str, bar: Text, begun: str, taken: str) -> Text:
        cells = [
            fitted(name, self.name_cells),
            *([fitted(Text(place, style="dim"), self.place_cells)] if self.place_cells else []),
            Text.assemble(("│", "bright_black"), fitted(bar, self.bar_cells), ("│", "bright_black")),
            *([fitted(Text(begun, style="dim"), self.begun_cells, right=True)] if self.begun_cells else []),
            fitted(Text(taken), _TIME, right=True),
        ]
        return Text(" ").join(cells)

    def scale(self, axis: _Axis) -> Text:
        """Times along the axis: at its beginning, at quarters if there is room, and at its end."""
        length_s = (axis.end_ns - axis.begin_ns) / 1e9
        parts = 4 if self.bar_cells >= 56 else 2 if self.bar_cells >= 30 else 1
        line = [" "] * self.bar_cells
        for part in range(parts + 1):
            label = duration(length_s * part / parts) if part else "0"
            at = min(
                self.bar_cells - len(label), max(0, self.bar_cells * part // parts - (len(label) // 2 if part else 0))
            )
            line[at : at + len(label)] = label
        row = self.row(Text(), "", Text("".join(line)), "began", "took")
        row.stylize("dim")
        return row


def _title(request_id: str, root: Span, width: int) -> Text:
    title = Text.assemble((shorten(request_id, max(20, width // 2)), "bold"), ("  ", ""), (plain(root.name), "dim"))
    tenant = plain(str(root.facts.get("paceline.tenant", "")))
    if tenant:
        title.append(f"  tenant {tenant}", style="dim")
    return fitted(title, min(width, title.cell_len))


def _name(depth: int, span: Span) -> Text:
    name = Text("  " * depth + plain(span.name), style="red" if span.error is not None else "")
    chunks = int(span.facts.get("paceline.chunks", span.count)) if span.name == "prefill" else span.count
    if chunks > 1:
        name.append(f" ×{chunks}", style="bold")
    if span.facts.get("paceline.choice"):
        name.append(f" #{span.choice + 1}", style="dim")
    if span.name == "prefill" and span.facts.get("paceline.tokens"):
        name.append(f" {count(span.facts['paceline.tokens'], 'token')}", style="dim")
    if span.name == "decode" and span.facts.get("paceline.steps"):
        name.append(f" {count(span.facts['paceline.steps'], 'step')}", style="dim")
    return name


def _of_choice(event: Event) -> str:
    """Which of several continuations it happened to, named as in the rows above."""
    choice = event.facts.get("paceline.choice")
    return f" #{choice + 1}" if choice else ""


def _event_colour(event: Event) -> str:
    return "red" if event.name in _BAD_EVENTS else "green"


def _told(root: Span, width: int) -> list[Text]:
    """The account below the picture; what went wrong is in red."""
    console = Console(width=width)
    outcome, *account = map(plain, root.facts.get("paceline.account") or ("no account comes with this trace",))
    lines = [Text(outcome, style="bold red" if root.error is not None else "bold")]
    if root.error is not None:
        lines.append(Text(f"error: {plain(root.error) or NOTHING}", style="red"))
    lines += [Text(sentence) for sentence in account]
    return [part for line in lines for part in line.wrap(console, width)]
