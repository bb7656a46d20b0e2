"""Everything that needs a GPU: ceilings, kernels, models in process and as a whole system, transformers beside them.

    benchmarks/gpu_check.sh                           # on a machine with a GPU: 8 minutes at most
    benchmarks/gpu_check.sh --only ceilings models    # parts of it
    benchmarks/gpu_check.sh --rehearse                # on a CPU, with tiny models: tries the check itself

What it needs and Python does not find may lie as wheels in a folder that $WHEELS names; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.given import Given, Row
from benchmarks.gpu.jobs import JOBS, Job, run_jobs
from benchmarks.gpu.report import Results, goals, markdown
from benchmarks.peers.processes import leave_nothing_behind

_NOT_HERE = 2  # exit code: nothing could be measured
_MEMORY_DISK = Path("/dev/shm")
_WEIGHT_BYTES = 18 << 30  # of the largest model, which is deleted before others are made


def main() -> int:
    """Run the parts, print the tables and write them down; returns the exit code."""
    leave_nothing_behind()
    arguments = _arguments()
    ends_at = time.monotonic() + 60 * arguments.minutes
    jobs = [job for job in JOBS if job.part in arguments.only and job.shape in ("", *arguments.models)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "log.txt"
    log.write_bytes(b"")
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=_disk(arguments.rehearse)) as name:
        device, attention = ("cpu", "triton") if arguments.rehearse else ("cuda", "auto")
        given = Given(device, arguments.rehearse, arguments.attention or attention, Path(name))
        rows, setting = [], {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        environment = _environment(arguments.rehearse, Path(name) / "packages")
        for job, told in run_jobs([Job("setting"), *jobs], given, environment, log, ends_at):
            _say(job, told)
            if job.part == "setting":
                if "failure" in told[-1]:
                    return _NOT_HERE
                setting |= {key: value for key, value in told[-1].items() if key not in ("part", "took_s")}
                continue
            rows += told
            _write_json(arguments.output, rows, setting)  # whatever happens next
            _forget_weights(job, jobs, given.folder)
        _keep_logs(given.folder, log)
    _write_table(arguments.output, rows, setting)
    return 1 if Results(rows).failures() else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts, models = (
        list(dict.fromkeys(names)) for names in ([j.part for j in JOBS], [j.shape for j in JOBS if j.shape])
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder for tables, JSON and log")
    parser.add_argument("--minutes", type=float, default=8, help="parts that do not fit any more are left out")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL", help=", ".join(models))
    parser.add_argument("--attention", default="", help="as of executors; else auto, in a rehearsal triton")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny models and interpreted kernels")
    return parser.parse_args()


def _environment(rehearse: bool, packages: Path) -> dict[str, str]:
    """Of the parts' processes: what $WHEELS holds comes before what is installed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if folder := os.environ.get("WHEELS"):
        wheels = sorted(map(str, Path(folder).glob("*.whl")))
        words = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(packages)]
        subprocess.run([sys.executable, "-m", "pip", *words, *wheels], check=True)
        environment["PYTHONPATH"] = f"{packages}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return environment


def _disk(rehearse: bool) -> Path | None:
    """Memory, where it is large enough: weights are written once and read twice. None: the usual place."""
    roomy = _MEMORY_DISK.is_dir() and shutil.disk_usage(_MEMORY_DISK).free > _WEIGHT_BYTES
    return _MEMORY_DISK if roomy and not rehearse else None


def _forget_weights(done: Job, jobs: Sequence[Job], folder: Path) -> None:
    """Delete the weights of a model that no later part needs."""
    later = jobs[jobs.index(done) + 1 :]
    if done.shape and not any(job.shape == done.shape for job in later):
        shutil.rmtree(folder / done.shape, ignore_errors=True)


def _keep_logs(folder: Path, log: Path) -> None:
    """What schedulers and clients said goes behind what the parts said."""
    with log.open("ab") as kept:
        for said in sorted(folder.glob("*.log")):
            kept.write(f"\n{said.name}\n".encode() + said.read_bytes())


def _say(job: Job, rows: Sequence[Row]) -> None:
    failures = [f"\n  {row['failure']}" for row in rows if "failure" in row]
    took = f"{rows[-1]['took_s']:.0f} s" if rows and "took_s" in rows[-1] else ""
    print(f"{job.name}: {len(rows) - len(failures)} rows, {took}{''.join(failures)}", flush=True)


def _write_json(output: Path, rows: Sequence[Row], setting: dict[str, Any]) -> None:
    made = {"setting": setting, "goals": [asdict(goal) for goal in goals(Results(rows))], "rows": rows}
    (output / "results.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _write_table(output: Path, rows: Sequence[Row], setting: dict[str, Any]) -> None:
    table = markdown(Results(rows), setting)
    (output / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwritten to {output}/: table.md, results.json, log.txt")


if __name__ == "__main__":
    sys.exit(main())
