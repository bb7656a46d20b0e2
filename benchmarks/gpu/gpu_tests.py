"""The tests that need a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from benchmarks import BenchmarkError
from benchmarks.gpu.given import Given, Tell
from benchmarks.setting import ROOT

_FOLDER = "tests/executor_svc/gpu"
_NONE_COLLECTED = 5  # pytest's exit code


def run(given: Given, tell: Tell) -> None:
    """Run them; fails when one of them does.

    The settings of the other tests are left out: they name plugins that a machine with a GPU may not have.
    """
    words = [
        "-m",
        "gpu",
        "-c",
        os.devnull,
        f"--rootdir={ROOT}",
        "-p",
        "no:cacheprovider",
        "-q",
        "--tb=short",
        "--continue-on-collection-errors",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", _FOLDER, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr, flush=True)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    tell({"passed": counts.get("passed", 0), "failed": counts.get("failed", 0), "skipped": counts.get("skipped", 0)})
    if done.returncode not in (0, _NONE_COLLECTED):
        said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise BenchmarkError(f"pytest ended with {done.returncode}: {'; '.join(said) or done.stderr.strip()[-200:]}")
