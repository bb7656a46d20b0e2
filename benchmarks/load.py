"""Asks a server for a workload through the public SDK, as users do: one stream for each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from benchmarks import BenchmarkError
from benchmarks.figures import Answer
from benchmarks.wanted import WARM_UP
from benchmarks.workloads import Job, Workload
from paceline import AsyncClient


async def ask_all(address: str, workload: Workload, on_tokens: Callable[[int], None]) -> list[Answer]:
    """Make all requests when they are due and read them to the end; `on_tokens` hears of each arrival."""
    async with AsyncClient(address, max_retries=0) as client:
        began = time.perf_counter()

        async def ask(job: Job) -> Answer:
            await asyncio.sleep(began + job.arrival_s - time.perf_counter() if job.arrival_s else 0)
            return await _ask(client, job, on_tokens)

        return await asyncio.gather(*map(ask, workload.jobs))


async def warm_up(address: str) -> None:
    """One short request that does not count: the connection is made, and what is made at first use."""
    prompt, output_count = WARM_UP
    async with AsyncClient(address, max_retries=0) as client:
        await _ask(client, Job(prompt, output_count), lambda _count: None)


async def _ask(client: AsyncClient, job: Job, on_tokens: Callable[[int], None]) -> Answer:
    answer = Answer(len(job.prompt), time.perf_counter())
    async for chunk in client.generate(
        job.prompt, max_output_tokens=job.output_count, temperature=0.0, ignore_eos=True
    ):
        answer.note(time.perf_counter(), len(chunk.token_ids))
        on_tokens(len(chunk.token_ids))
    check_complete(answer, job)
    return answer


def check_complete(answer: Answer, job: Job) -> None:
    """Refuse to count an answer that is not what was asked for."""
    if answer.output_count != job.output_count:
        raise BenchmarkError(
            f"a request for {job.output_count} tokens got {answer.output_count}; "
            "its figures would mean nothing: look at the server's log"
        )
