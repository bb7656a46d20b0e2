"""Load on a server that streams events over HTTP: every request on a connection of its own.

Written on asyncio's streams alone, and what comes is only read in full when all is over: the load takes from the same
cores as the server, so it has to be light, and it needs no package in the server's environment.
"""

import asyncio
import json
import time
from typing import Any, NamedTuple, Protocol

from benchmarks import BenchmarkError
from benchmarks.figures import Answer
from benchmarks.peers.processes import Server
from benchmarks.peers.runs import Ask
from benchmarks.workloads import Job

_LARGEST_LINE = 1 << 20


class Event(NamedTuple):
    """One event of a stream, and when it came."""

    at_s: float
    data: dict[str, Any]


class Api(Protocol):
    """How a server is asked, and how its events are read."""

    path: str

    def body(self, job: Job) -> dict[str, Any]:
        """The request, as JSON."""

    def has_token(self, data: dict[str, Any]) -> bool:
        """Whether an event brings tokens."""

    def counts(self, data: dict[str, Any]) -> tuple[int, int] | None:
        """How many tokens the prompt and the answer had, where an event says so."""


def load_on(server: Server, api: Api) -> Ask:
    """Asks this server, every request when it is to arrive."""

    async def ask_all(jobs: list[Job]) -> list[Answer]:
        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(_ask_at(start_s + job.arrival_s, server.port, api, job)) for job in jobs]
        return [task.result() for task in asked]

    return lambda jobs: asyncio.run(ask_all(jobs))


async def _ask_at(moment_s: float, port: int, api: Api, job: Job) -> Answer:
    payload = json.dumps(api.body(job)).encode()
    await asyncio.sleep(moment_s - time.perf_counter())
    asked_s = time.perf_counter()
    chunks = await _post(port, api.path, payload)
    return _answer(asked_s, _events(chunks), api, job)


async def _post(port: int, path: str, payload: bytes) -> list[tuple[float, bytes]]:
    """The pieces of the response, each with the moment it came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LARGEST_LINE)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(head.encode() + f"Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        answered = (await reader.readuntil(b"\r\n\r\n")).decode()
        if " 200 " not in answered.splitlines()[0] or "transfer-encoding: chunked" not in answered.lower():
            raise BenchmarkError(f"POST {path}: {answered}{(await reader.read(2000)).decode(errors='replace')}")
        chunks = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            chunk = await reader.readexactly(size + 2)
            chunks.append((time.perf_counter(), chunk[:-2]))
        return chunks
    finally:
        writer.close()


def _events(chunks: list[tuple[float, bytes]]) -> list[Event]:
    """The events of a stream, each at the moment its last byte came."""
    events, rest = [], b""
    for at_s, chunk in chunks:
        *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for text in whole:
            data = text.removeprefix(b"data: ")
            if data.startswith(b"{"):  # else a comment, or the end of an OpenAI stream
                events.append(Event(at_s, json.loads(data)))
    return events


def _answer(asked_s: float, events: list[Event], api: Api, job: Job) -> Answer:
    """When tokens came. How many a single event brought does not matter: the server says how many there were."""
    arrivals_s = [event.at_s for event in events if api.has_token(event.data)]
    counted = [counts for event in events if (counts := api.counts(event.data))]
    if not counted or not arrivals_s:
        raise BenchmarkError(f"an answer without tokens or usage, which ended with {[e.data for e in events[-2:]]}")
    prompt_count, output_count = counted[-1]
    if (prompt_count, output_count) != (len(job.prompt), job.output_count):
        wanted = f"{len(job.prompt)} and {job.output_count} were asked"
        raise BenchmarkError(f"a prompt of {prompt_count} and an answer of {output_count} tokens where {wanted}")
    answer = Answer(prompt_count, asked_s, [(at_s, 1) for at_s in arrivals_s[:-1]])
    answer.note(arrivals_s[-1], output_count - len(arrivals_s) + 1)
    return answer
