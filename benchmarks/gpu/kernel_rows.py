"""Every kernel against plain torch in float64, or against what defines its result."""

from __future__ import annotations

from benchmarks.gpu import kernels, layer_checks
from benchmarks.gpu.given import Given, Tell


def run(given: Given, tell: Tell) -> None:
    """Check them; those of attention come last, because they are many."""
    layer_checks.check(given, tell)
    for row in kernels.check(given.device, given.rehearse):
        tell(row)
