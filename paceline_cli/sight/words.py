"""Amounts, times and names as the pictures write them: short, and safe to print."""

from __future__ import annotations

import time

from common.words import count, duration

__all__ = ["age", "amount", "clock", "count", "duration", "milliseconds", "percent", "plain", "shorten"]

ELLIPSIS = "…"
NOTHING = "–"


def plain(text: str) -> str:
    """`text` of somebody else without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters: its beginning, and enough of its end to tell it from others."""
    text = plain(text)
    if len(text) <= width:
        return text
    tail = min(4, (width - 1) // 3)
    return text[: width - 1 - tail] + ELLIPSIS + (text[-tail:] if tail else "")


def age(seconds: float) -> str:
    """How long something has been so: nobody wants to know the fractions of a second."""
    return f"{max(0, seconds):.0f} s" if seconds < 59.5 else duration(seconds)


def milliseconds(amount: float) -> str:
    """Milliseconds as a time; a dash for 0, which stands for "not yet" in messages."""
    return duration(amount / 1000) if amount else NOTHING


def amount(value: float) -> str:
    """A count or a rate in few characters: `7.3`, `541`, `12.3k`, `4.6M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{value:,.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}"


def percent(share: float) -> str:
    """A share of 0 to 1; small ones are not rounded to nothing."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{max(value, 0.1):.1f} %"


def clock(unix_ms: float) -> str:
    """The time of day, here."""
    return time.strftime("%H:%M:%S", time.localtime(unix_ms / 1000))
