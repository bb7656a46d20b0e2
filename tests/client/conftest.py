"""A scripted server, and both clients under one face."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import pytest

from paceline import AsyncClient, AsyncStream, Chunk, Client, Output
from paceline._calls import Backoff
from tests.client.scripted_server import ScriptedServer


class BlockingStream:
    """An `AsyncStream` with the methods of a `Stream`."""

    def __init__(self, run: Callable[..., Any], stream: AsyncStream) -> None:
        self._run = run
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        try:
            return self._run(anext(self._stream))
        except StopAsyncIteration:
            raise StopIteration from None

    def result(self) -> Output:
        return self._run(self._stream.result())

    def close(self) -> None:
        self._run(self._stream.close())

    def __enter__(self) -> "BlockingStream":
        self._run(self._stream.__aenter__())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run(self._stream.__aexit__(kind, error, trace))


class BlockingClient:
    """An `AsyncClient` with the methods of a `Client`, so that one test holds for both."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._client = AsyncClient(*args, **settings)
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **arguments: Any) -> Any:
            async def inside_the_loop() -> Any:
                result = getattr(self._client, name)(*args, **arguments)
                return await result if asyncio.iscoroutine(result) else result

            result = self._run(inside_the_loop())
            return BlockingStream(self._run, result) if isinstance(result, AsyncStream) else result

        return call

    def __enter__(self) -> "BlockingClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._client.close())
        self._runner.close()

    def _run(self, awaitable: Any) -> Any:
        async def inside_the_loop() -> Any:
            return await awaitable

        return self._runner.run(inside_the_loop())


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other fast, so that no test waits for them."""
    monkeypatch.setattr("paceline._calls._RETRY", Backoff(first_s=0.01, max_s=8.0))
    monkeypatch.setattr("paceline._calls._RESUME", Backoff(first_s=0.01, max_s=0.1))


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture(params=[Client, BlockingClient], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[Callable[..., Any]]:
    """Makes a client of either kind for the scripted server; it is closed after the test."""
    with ExitStack() as clients:
        yield lambda target=server.target, **settings: clients.enter_context(request.param(target, **settings))


@pytest.fixture
def client(connect: Callable[..., Any]) -> Any:
    return connect()
