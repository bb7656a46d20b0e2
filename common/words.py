"""Times and counts as people read them."""

from __future__ import annotations

_LARGE_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def duration(seconds: float) -> str:
    """A time in few digits: `8.2 ms`, `1.35 s`, `2 min 5 s`, `3 h 10 min`."""
    if seconds < 0.9995:
        thousandths = 1000 * max(0.0, seconds)
        digits = 0 if thousandths >= 9.95 or not thousandths else 1 if thousandths >= 0.095 else 2
        return f"{thousandths:.{digits}f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, smaller, smaller_name in _LARGE_UNITS:
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name} {rest} {smaller_name}" if rest else f"{whole // size} {name}"
    raise AssertionError(seconds)


def count(number: int, thing: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
