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
    words = [*("-m", "gpu", "-c", os.devnull, f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-v", "--tb=short")]
    words += ["--continue-on-collection-errors"]  # of files without a test that is wanted here
    said = []
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", _FOLDER, *words],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)  # the log has it, should there be no time for all of them
            said.append(line)
    counts = {
        word: int(count)
        for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", said[-1] if said else "")
    }
    tell({"passed": counts.get("passed", 0), "failed": counts.get("failed", 0), "skipped": counts.get("skipped", 0)})
    if process.returncode not in (0, _NONE_COLLECTED):
        wrong = [line.strip() for line in said if line.startswith(("FAILED", "ERROR"))]
        raise BenchmarkError(f"pytest ended with {process.returncode}: {'; '.join(wrong or said[-1:])}")
