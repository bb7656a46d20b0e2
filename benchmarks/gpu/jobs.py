"""The parts of the check as jobs: each in a process, each with a limit, all of them within the time that there is."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.gpu.given import Given, Row
from benchmarks.peers.processes import end_session

_LEAST_S = 15.0  # less is not worth beginning with


@dataclass(frozen=True, slots=True)
class Job:
    """One part, for one model where it needs one."""

    part: str
    shape: str = ""
    limit_s: float = 60.0

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.part} {self.shape}".strip()


JOBS = (  # what the goals are about comes first, what may be left out last
    Job("ceilings"),
    Job("kernels", limit_s=120),
    Job("models", "8B", limit_s=200),
    Job("transformers", "8B", limit_s=90),
    Job("tests", limit_s=75),
    Job("models", "0.5B", limit_s=75),
    Job("models", "3B", limit_s=75),
    Job("kernel speed", limit_s=45),
    Job("transformers", "3B", limit_s=45),
    Job("transformers", "0.5B", limit_s=45),
)


class _Child:
    """A job's process, which waits for its turn."""

    def __init__(self, job: Job, given: Given, environment: dict[str, str], log: Path) -> None:
        self.job = job
        self._rows = given.folder / f"rows-{job.name.replace(' ', '-')}.jsonl"
        given = replace(given, shape=job.shape)
        words = {"part": job.part, "given": asdict(given) | {"folder": str(given.folder)}, "rows": str(self._rows)}
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.part", json.dumps(words)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env=environment,
                start_new_session=True,
            )

    def run(self, limit_s: float) -> list[Row]:
        """Let it begin; returns its rows, and why there are no more if it did not come to its end."""
        began = time.monotonic()
        try:
            reason = self._wait(limit_s)
        finally:
            self.end()
        rows = [json.loads(line) for line in self._lines()]
        if reason and not any("failure" in row for row in rows):  # else it has told more itself
            rows.append({"part": self.job.part, "model": self.job.shape, "failure": reason})
        if rows:
            rows[-1]["took_s"] = round(time.monotonic() - began, 1)
        return rows

    def _wait(self, limit_s: float) -> str:
        """Why it did not come to its end; empty if it did."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and its rows say why
            self._process.stdin.write(b"now\n")
            self._process.stdin.flush()
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"it had {limit_s:.0f} s and was not done"
        return f"its process ended with {code}" if code else ""

    def end(self) -> None:
        """Leave nothing of it running."""
        assert self._process.stdin is not None
        end_session(self._process.pid)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # nobody has read the line
            self._process.stdin.close()

    def _lines(self) -> list[str]:
        """Whole lines only: the last one may have been cut off."""
        text = self._rows.read_text(encoding="utf-8") if self._rows.exists() else ""
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run_jobs(
    jobs: Sequence[Job], given: Given, environment: dict[str, str], log: Path, ends_at: float
) -> Iterator[tuple[Job, list[Row]]]:
    """Run one after the other and give the rows of each; whatever time is too short for is left out, with a word.

    The next one's process is started with the one before, so that it has imported everything when its turn comes.
    """
    following = _Child(jobs[0], given, environment, log)
    try:
        for number, job in enumerate(jobs):
            child = following
            left_s = ends_at - time.monotonic()
            if left_s < _LEAST_S:
                child.end()
                skipped = {
                    "part": job.part,
                    "model": job.shape,
                    "failure": f"left out: {max(left_s, 0):.0f} s were left",
                }
                yield job, [skipped]
            else:
                if number + 1 < len(jobs):
                    following = _Child(jobs[number + 1], given, environment, log)
                yield job, child.run(min(job.limit_s, left_s))
    finally:
        following.end()
