"""Bars, charts and columns of text, in exactly the cells that they are given.

Where there is no colour, other characters tell apart what colours would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len
from rich.text import Text

_LEVELS = " ▁▂▃▄▅▆▇█"
_GAP = "  "


@dataclass(frozen=True, slots=True)
class Ink:
    """How one kind of thing is drawn."""

    name: str
    colour: str
    letter: str  # stands for it where there are no colours


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; of two that do not both fit, the one with the smaller `rank` is shown."""

    title: str
    rank: int = 0
    right: bool = False
    most: int = 40  # cells; what is longer is cut


def stacked_bar(parts: Sequence[tuple[Ink, float]], width: int, mono: bool, block: str = "█") -> Text:
    """Parts of a whole side by side, each at least a cell if there is anything of it and room for it."""
    bar = Text()
    for (ink, _), cells in zip(parts, _shares([size for _, size in parts], width), strict=True):
        bar.append((ink.letter if mono else block) * cells, style="" if mono else ink.colour)
    bar.append(" " * (width - len(bar)))
    return bar


def _shares(sizes: Sequence[float], width: int) -> list[int]:
    """Whole cells in proportion to `sizes`, `width` in all; none if all of these are 0."""
    total = sum(sizes)
    if total <= 0 or width <= 0:
        return [0] * len(sizes)
    exact = [width * size / total for size in sizes]
    cells = [max(int(share), 1) if share > width / 50 else 0 for share in exact]
    while sum(cells) != width:
        step = 1 if sum(cells) < width else -1
        most = max(range(len(sizes)), key=lambda index: step * (exact[index] - cells[index]))
        cells[most] += step
    return cells


def chart(lower: Sequence[float], upper: Sequence[float], inks: tuple[str, str], size: tuple[int, int]) -> list[Text]:
    """Two amounts over time, the upper one on top of the lower one; the latest is at the right.

    `inks` are their colours, both "" where there are none. The scale ends at the largest sum.
    """
    width, height = size
    columns = list(zip(_resampled(lower, width), _resampled(upper, width), strict=True))
    top = max((one + other for one, other in columns), default=0.0) or 1.0
    lines = []
    for row in range(height - 1, -1, -1):
        line = Text(" " * (width - len(columns)))
        for one, other in columns:
            first = _eighths(one / top, row, height)
            line.append(*_stack(first, _eighths((one + other) / top, row, height), inks))
        lines.append(line)
    return lines


def _eighths(share: float, row: int, height: int) -> int:
    """Eighths of the cell in `row`, from below, that a column of that share fills; the least one shows something."""
    filled = share * height * 8
    if row == 0 and 0 < filled < 1:
        return 1
    return min(8, max(0, round(filled - 8 * row)))


def _stack(first: int, both: int, inks: tuple[str, str]) -> tuple[str, str]:
    lower, upper = inks
    if first == 0:
        return _LEVELS[both], upper
    if both == 8 and first < 8 and lower:
        return _LEVELS[first], f"{lower} on {upper}"
    return _LEVELS[first if lower else both], lower


def _resampled(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values: the largest of each stretch, because peaks are what one looks for."""
    if len(values) <= width:
        return list(values)
    edges = [index * len(values) // width for index in range(width + 1)]
    return [max(values[begin:end]) for begin, end in pairwise(edges)]


_FREE, _CACHED, _HELD = range(3)
_CELL_COLOURS = ("bright_black", "cyan", "blue")
_CELL_LETTERS = "·▒█"


def block_map(cells: bytes, width: int, mono: bool) -> Text:
    """A cache from its first block at the left to its last at the right: two stretches of it in each character."""
    if not cells:
        return Text(" " * width)
    kinds = _stretches(cells, width if mono else 2 * width)
    if mono:
        return Text("".join(_CELL_LETTERS[kind] for kind in kinds))
    line = Text()
    for upper, lower in zip(kinds[::2], kinds[1::2], strict=True):
        if upper == lower == _FREE:
            line.append("·", style=_CELL_COLOURS[_FREE])
        elif lower == _FREE:
            line.append("▀", style=_CELL_COLOURS[upper])
        elif upper == _FREE:
            line.append("▄", style=_CELL_COLOURS[lower])
        else:
            line.append("▀", style=f"{_CELL_COLOURS[upper]} on {_CELL_COLOURS[lower]}")
    return line


def _stretches(cells: bytes, count: int) -> list[int]:
    """What most of each of `count` stretches is; held things count before cached ones."""
    kinds = []
    for index in range(count):
        begin = index * len(cells) // count
        stretch = cells[begin : max(begin + 1, (index + 1) * len(cells) // count)]
        held, cached = stretch.count(_HELD), stretch.count(_CACHED)
        used = 2 * (held + cached) >= len(stretch)
        kinds.append(_FREE if not used else _HELD if held >= cached else _CACHED)
    return kinds


def legend(inks: Sequence[Ink], mono: bool, block: str = "■") -> Text:
    """What the colours stand for, or the letters."""
    text = Text()
    for ink in inks:
        text.append(" " if text else "")
        text.append(ink.letter if mono else block, style="" if mono else ink.colour)
        text.append(f" {ink.name} " if mono else f"{ink.name} ", style="dim")
    text.rstrip()
    return text


def spread(left: Text, right: Text, width: int) -> Text:
    """One line with something at either end; the right end gives way."""
    room = width - left.cell_len - right.cell_len
    if room < 1:
        return fitted(left, width)
    return Text.assemble(left, " " * room, right)


def fitted(text: Text, width: int, *, right: bool = False) -> Text:
    """A copy of exactly `width` cells."""
    text = text.copy()
    text.truncate(max(0, width), overflow="ellipsis")
    padding = max(0, width - text.cell_len)
    text.pad_left(padding) if right else text.pad_right(padding)
    return text


@dataclass(frozen=True, slots=True)
class Stretch:
    """A last column that is as wide as there is room for, `least` to `most` cells; `draw` makes the cell of a row."""

    title: Text
    draw: Callable[[int, int], Text]  # of the number of a row and the width
    least: int = 10
    most: int = 60


def table(columns: Sequence[Column], rows: Sequence[Sequence[Text]], width: int, last: Stretch) -> list[Text]:
    """A line of titles and one for each row, no wider than `width`: columns that do not fit are left out."""
    widths = [
        min(column.most, max([cell_len(column.title), *(row[index].cell_len for row in rows)]))
        for index, column in enumerate(columns)
    ]
    shown: list[int] = []
    room = width - last.least
    for index in sorted(range(len(columns)), key=lambda index: columns[index].rank):
        if room >= widths[index] + len(_GAP) or not shown:
            shown.append(index)
            room -= widths[index] + len(_GAP)
    shown.sort()
    drawn = max(0, min(last.most, last.least + room))
    titles = [Text(column.title, style="dim") for column in columns]
    lines = []
    for number, row in enumerate([titles, *rows]):
        cells = [fitted(row[index], widths[index], right=columns[index].right) for index in shown]
        lines.append(Text(_GAP).join([*cells, last.draw(number - 1, drawn) if number else fitted(last.title, drawn)]))
    return lines
