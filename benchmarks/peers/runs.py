"""Runs of one start of a server: the work it is given, and the line of JSON that is left of each.

What this imports needs only the standard library: every server runs it in an environment of its own.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Answer, Figures, run_json
from benchmarks.wanted import WARM_UP, Work
from benchmarks.workloads import NAMES, Job, Workload

Ask = Callable[[list[Job]], list[Answer]]
NO_TIMES: dict[str, float | None] = {"p50": None, "p99": None}
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Start:
    """One start of a server, and what all its runs have in common."""

    server: str
    version: str
    mode: str  # "serve" or "offline"
    way: str  # how it is used, where there are several ways; else empty
    given: argparse.Namespace
    start_s: float
    tells_times: bool = True  # whether it tells when tokens come; else only when all have come

    def run_all(self, ask: Ask, peak_mib: Callable[[], float]) -> None:
        """Run every workload that is wanted, each after a short request that does not count, and print what it gave."""
        given, capacity = self.given, None
        vocabulary_size = json.loads((given.model / "config.json").read_text())["vocab_size"]
        work = Work(tuple(given.workloads), given.seed, given.rate)
        for name in work.in_order():
            workload = shortened(work.of_turn(name, given.turn, vocabulary_size, capacity), given.limit)
            ask([Job(*WARM_UP)])
            figures = Figures.of(ask(workload.jobs))
            if name == "W1":
                capacity = figures.request_count / figures.seconds
            print(json.dumps(self._line(name, figures, peak_mib())), flush=True)

    def _line(self, workload: str, figures: Figures, peak_mib: float) -> dict[str, Any]:
        line = run_json(
            figures,
            server=self.server,
            mode=self.mode,
            workload=workload,
            dtype=self.given.dtype,
            runner=None,
            threads=self.given.threads,
            turn=self.given.turn,
            peak_mib={"server": round(peak_mib, 1)},
            start_s=self.start_s,
        )
        if not self.tells_times:
            line |= {"first_token_ms": NO_TIMES, "between_tokens_ms": NO_TIMES}
        return line | {"way": self.way, "version": self.version, "limit": self.given.limit}


def shortened(workload: Workload, limit: int | None) -> Workload:
    """Only the first requests of it; all without a limit."""
    return Workload(workload.name, workload.about, workload.jobs[:limit])


def answered_at_once(jobs: list[Job], asked_s: float) -> list[Answer]:
    """Answers of which is only known that all have their tokens now."""
    now_s = time.perf_counter()
    return [Answer(len(job.prompt), asked_s, [(now_s, job.output_count)]) for job in jobs]


def flags(about: str, ways: dict[str, str]) -> argparse.ArgumentParser:
    """The flags that all scripts here have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a prepared model's folder")
    parser.add_argument(
        "--way", choices=list(ways), required=True, help="; ".join(f"{k}: {v}" for k, v in ways.items())
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=["W1", "W2", "W4"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turn", type=int, default=0, help="is added to the seed")
    parser.add_argument("--limit", type=int, help="only the first requests of each workload: for ways that are slow")
    parser.add_argument("--rate", type=float, help="requests a second of W3; else 70 %% of those of W1 in this run")
    return parser


def process_age_s() -> float:
    """Seconds since this process was started, the start of the interpreter included."""
    started_in_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_in_ticks / _TICKS_PER_S
