"""Amounts of memory as people write them."""

from __future__ import annotations

import re

import typer

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes for `2GiB`, `512MiB`, `1.5 GB` or `1048576`.

    `GB` is a power of ten and `GiB` of two, as everywhere; a bare `G` is read as `GiB`, as vLLM and the JVM do.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(text).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise typer.BadParameter(f"a size such as 2GiB, 512MiB or a number of bytes is wanted, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(byte_count: int) -> str:
    """`byte_count` as people read it, for example `1.5 GiB`."""
    size = float(byte_count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
