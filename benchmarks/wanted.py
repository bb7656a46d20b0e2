"""What is to be measured: how the model is served, and with what work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.workloads import Workload, poisson, workload

Report = Callable[[str], None]  # is told what runs now

SHARE_OF_CAPACITY = 0.7  # W3's rate, of what the server gets through W1 at
WARM_UP = ([1, 2, 3], 8)  # prompt and output of a request whose time does not count


@dataclass(frozen=True, slots=True)
class Side:
    """How a model is served."""

    model: str = "smollm2"  # what `paceline serve` takes
    dtype: str = "auto"
    weights: str = ""  # int8: rounded to that; empty: of the type
    threads: int = 0  # 0: the executor chooses
    native: bool = True  # steps in C++ where possible

    def settings(self) -> dict[str, Any]:
        """Those settings of an executor that are chosen here, but for the model."""
        return {"dtype": self.dtype, "weights": self.weights, "threads": self.threads, "native": self.native}

    def flags(self) -> list[str]:
        """The same for `paceline serve`."""
        native = "--native" if self.native else "--no-native"
        weights = ["--weights", self.weights] if self.weights else []
        return ["--dtype", self.dtype, *weights, "--threads", str(self.threads), native]


@dataclass(frozen=True, slots=True)
class Work:
    """What the server is asked in each turn."""

    names: tuple[str, ...] = ("W1", "W2", "W4")
    seed: int = 0
    rate: float | None = None  # of W3, requests a second; None: a share of what W1 went at

    def of_turn(self, name: str, turn: int, vocabulary_size: int, capacity: float | None = None) -> Workload:
        """The workload of this name in a turn: each turn has prompts of its own, so that no cache knows them.

        `capacity` is the requests a second that the server got through W1 at.
        """
        seed = self.seed + turn
        if name != "W3":
            return workload(name, seed).within(vocabulary_size)
        rate = self.rate or (capacity and SHARE_OF_CAPACITY * capacity)
        if not rate:
            raise BenchmarkError("W3 comes at a share of what W1 goes at, and W1 did not run; run both, or give a rate")
        return poisson(rate, seed).within(vocabulary_size)

    def in_order(self) -> tuple[str, ...]:
        """Their names as they run: W1 before W3, which comes at a share of its speed, also where only W3 is wanted."""
        if "W3" in self.names and self.rate is None and "W1" not in self.names:
            return tuple(sorted({*self.names, "W1"}))
        return tuple(sorted(set(self.names)))


def thread_count(side: Side, runner: str) -> int | None:
    """Threads of a model that runs in this mode where it was started with `side`; None: it has no threads."""
    from executor_svc.machine import usable_core_count

    if runner == "fake":
        return None
    cores = usable_core_count()
    return side.threads or (cores if runner == "native" else max(1, cores - 1))
