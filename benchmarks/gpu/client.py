"""Users of a server, in processes of their own: a line of JSON in says what to ask, a line out when each token came."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.figures import Answer
from benchmarks.workloads import Job, Workload

_LONGEST_LINE = 1 << 28  # the moments of some hundred thousand tokens


class Clients:
    """So many processes of users; they share the requests, so that reading streams does not limit the server."""

    def __init__(self, count: int, log: Path) -> None:
        self._count = count
        self._log = log
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Clients:
        with self._log.open("ab") as log:
            for _ in range(self._count):
                self._processes.append(
                    await asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", "benchmarks.gpu.client"),
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE,
                        stderr=log,
                        limit=_LONGEST_LINE,
                    )
                )
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def ask(self, address: str, jobs: Sequence[Job]) -> list[Answer]:
        """Make all requests at once; returns when each of their tokens came, on the clock of this machine."""
        shares = [jobs[number :: self._count] for number in range(self._count)]
        asking = [
            self._ask(process, address, share)
            for process, share in zip(self._processes, shares, strict=True)
            if share  # fewer requests than clients
        ]
        return [answer for answers in await asyncio.gather(*asking) for answer in answers]

    async def _ask(self, process: asyncio.subprocess.Process, address: str, jobs: Sequence[Job]) -> list[Answer]:
        assert process.stdin is not None
        assert process.stdout is not None
        wanted = {"address": address, "jobs": [[job.prompt, job.output_count] for job in jobs]}
        process.stdin.write(json.dumps(wanted).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise BenchmarkError(f"a client ended with code {await process.wait()}; its words are in {self._log}")
        return [Answer(count, asked_s, [(when, n) for when, n in came]) for count, asked_s, came in json.loads(line)]


def answer(line: str) -> list[list[Any]]:
    """Ask what a line says, and give what came."""
    from benchmarks.load import ask_all

    wanted = json.loads(line)
    workload = Workload("", "", [Job(prompt, output_count) for prompt, output_count in wanted["jobs"]])
    answers = asyncio.run(ask_all(wanted["address"], workload, lambda _count: None))
    return [[one.prompt_count, one.asked_s, one.arrivals] for one in answers]


def main() -> None:
    """Answer line by line until there are no more."""
    for line in sys.stdin:
        print(json.dumps(answer(line)), flush=True)


if __name__ == "__main__":
    main()
