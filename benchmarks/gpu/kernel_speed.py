"""How fast each kernel is by itself."""

from __future__ import annotations

from benchmarks.gpu import kernels, layer_checks
from benchmarks.gpu.given import Given, Tell


def run(given: Given, tell: Tell) -> None:
    """Time them; those of attention first, because they are what long contexts cost."""
    for row in kernels.speed(given.device, given.rehearse):
        tell(row)
    layer_checks.speed(given, tell)
