"""The client for programs with asyncio: what `paceline.client` does, awaited."""

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar, Unpack, cast, overload
from weakref import WeakSet

import grpc

from paceline._answer import Answer, model_of
from paceline._batch import Batch, BatchPrompt, OnError, OnProgress
from paceline._calls import CHANNEL_OPTIONS, Attempts, metadata
from paceline._cancels import AsyncCancels
from paceline._requests import generate_request, with_defaults
from paceline._tracing import CallSpan
from paceline.errors import Cancelled, PacelineError, Unavailable, error_of_call
from paceline.types import Chunk, Message, Model, Options, Output, Prompt
from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from paceline.v1.inference_pb2_grpc import InferenceServiceAsyncStub  # exists for type checkers only

_Reply = TypeVar("_Reply", covariant=True)


class _Call(Protocol):
    """A running `Generate`."""

    async def read(self) -> object: ...  # a GenerateResponse or grpc.aio.EOF
    def cancel(self) -> bool: ...
    def done(self) -> bool: ...


class _Generate(Protocol):
    """Makes one call of `Generate` whose metadata are set."""

    def __call__(self, request: pb.GenerateRequest, *, timeout: float | None) -> _Call: ...


class _Start(Protocol[_Reply]):
    """Makes one attempt at a call whose request and metadata are set."""

    def __call__(self, *, timeout: float | None) -> _Reply: ...


@contextmanager
def _local_cancel_as_error(request_id: str) -> Iterator[None]:
    """Turn what grpc.aio raises for a call that was cancelled here into `Cancelled`.

    It raises `CancelledError`, which asyncio keeps for a task that is itself cancelled.
    """
    try:
        yield
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) and task.cancelling():
            raise
        raise Cancelled("the stream or its client was closed", grpc.StatusCode.CANCELLED, request_id) from None


class AsyncStream(Answer):
    """The answer to one request as it is computed: iterate over it with `async for` for its chunks.

    When the connection breaks, it waits for the server and goes on where it was. Leaving the `async with` before the
    last chunk cancels the request, and so do `close`, dropping the stream, and cancelling the task that reads it. An
    error ends the iteration; `text` still has what came before it.
    """

    def __init__(
        self,
        generate: _Generate,
        cancels: AsyncCancels,
        request: pb.GenerateRequest,
        attempts: Attempts,
        span: CallSpan,
    ) -> None:
        super().__init__(request, attempts, span)
        self._generate = generate
        self._cancels = cancels
        self._is_closed = False
        self._call = self._start()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        try:
            while (chunk := await self._read()) is None:
                pass
        except BaseException as error:  # also that this task is cancelled, and an answer that cannot be right
            self._span.fail(error)
            await self.close()
            raise
        return chunk

    async def result(self) -> Output:
        """Read on to the end, and return the whole answer."""
        async with self:
            async for _ in self:
                pass
        return self.output

    async def close(self) -> None:
        """Cancel the request if it still runs; a task that waits for its next chunk gets `Cancelled`."""
        if not self._is_over:
            self._is_closed = True
        self._call.cancel()
        if self._leave():
            self._cancels.send(self._request_id)
            await self._cancels.wait()  # the last thing of a program, often: its event loop must not end before

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            if not self._call.done() and self._leave():
                self._cancels.send_from_anywhere(self._request_id)
            with suppress(RuntimeError):  # the event loop is closed, and the call with it
                self._call.cancel()
            self._span.end()

    def _start(self) -> _Call:
        return self._generate(self._next_request(), timeout=self._attempts.remaining_s)

    async def _read(self) -> Chunk | None:
        """Wait for one message, or after a break for the next call."""
        try:
            with _local_cancel_as_error(self.request_id):
                message = await self._call.read()
        except grpc.RpcError as failure:
            if self._output is not None:
                raise StopAsyncIteration from None  # everything had come before the connection broke
            wait_s = self._wait_s(failure)
        else:
            if message is not grpc.aio.EOF:
                return self._add(cast(pb.GenerateResponse, message))
            self._check_complete()
            raise StopAsyncIteration
        await asyncio.sleep(wait_s)
        if self._is_closed:
            raise Cancelled("the stream was closed", grpc.StatusCode.CANCELLED, self.request_id)
        self._call = self._start()
        return None


class _BatchRun:
    """One `generate_batch` as it runs."""

    def __init__(
        self, stub: "InferenceServiceAsyncStub", cancels: AsyncCancels, batch: Batch, attempts: Attempts, span: CallSpan
    ) -> None:
        self._generate = partial(stub.GenerateBatch, metadata=span.metadata)
        self._cancels = cancels
        self._batch = batch
        self._attempts = attempts
        self._span = span
        self._is_closed = False
        self._call: grpc.aio.Call | None = None  # the last one

    async def outcomes(self) -> list[Output | PacelineError]:
        """Make attempts until each request has an outcome."""
        try:
            while not self._batch.is_done:
                await asyncio.sleep(self._batch.wait_s(await self._attempt()))
                if self._is_closed and not self._batch.is_done:
                    raise Cancelled("the client was closed", grpc.StatusCode.CANCELLED)
        except BaseException as error:  # the error of one request; that this task is cancelled
            self._span.fail(error)
            await self.close()
            raise
        self._span.end()
        return self._batch.outcomes()

    async def close(self) -> None:
        """Cancel the requests without an outcome."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._call is not None:
            self._call.cancel()
        for request_id in self._batch.open_ids():
            self._cancels.send(request_id)
        await self._cancels.wait()

    async def _attempt(self) -> PacelineError | None:
        """Make one call; returns how it failed, None if it ended in order."""
        call = self._call = self._generate(iter(self._batch.messages()), timeout=self._attempts.remaining_s)
        try:
            while (message := await self._read(call)) is not grpc.aio.EOF:
                self._batch.add(cast(pb.GenerateBatchResponse, message))
        except grpc.RpcError as failure:
            return error_of_call(failure, timeout_s=self._attempts.timeout_s)
        except _SendingBrokeError:
            return Unavailable("the connection broke while the requests were sent", grpc.StatusCode.UNAVAILABLE)
        finally:
            call.cancel()
        return None

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.GenerateBatchRequest, pb.GenerateBatchResponse]) -> object:
        try:
            with _local_cancel_as_error(""):
                return await call.read()
        except Cancelled:
            if self._is_closed:
                raise
            raise _SendingBrokeError from None


class _SendingBrokeError(Exception):
    """The connection broke while requests were written to it, and grpc.aio cancelled the call for that."""


class AsyncClient:
    """A connection to one server; any number of tasks of one event loop may share it.

    It may be made outside the event loop, and belongs to the one in which it is first used.
    `target` is `host:port` or `unix:/path`; it is dialled when it is first needed. `model` is the name of the model
    that every request asks for; None takes the one served there. `tenant` and `cache_salt` are those of every request
    that names none of its own. `timeout_s` holds for every call that names none of its own, over all of its attempts;
    None waits without limit. A call that meets a full or unreachable server is tried again up to `max_retries` times,
    with growing waits. A request that the server had accepted, or may have, survives a broken connection and a restart
    of the server: it runs on unread for `detach_timeout_s`, and for as long its reader looks for the server again, also
    through a port forwarder that answers meanwhile. With 0 it is cancelled when its connection breaks, and the reader
    gets `Unavailable`.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        model: str | None = None,
        tenant: str | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        max_retries: int = 4,
        detach_timeout_s: float = 30,
    ) -> None:
        self._target = target
        self._defaults = {
            "model": model,
            "tenant": tenant,
            "cache_salt": cache_salt,
            "detach_timeout_s": detach_timeout_s,
        }
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._detach_timeout_s = detach_timeout_s
        self._runs: WeakSet[AsyncStream | _BatchRun] = WeakSet()  # what may have requests that still run

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[True] = True,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream: ...
    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False], timeout_s: float | None = None, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Output]: ...
    def generate(
        self, prompt: Prompt, *, stream: bool = True, timeout_s: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream | Coroutine[Any, Any, Output]:
        """Continue a prompt: a stream of chunks for `async for`, or with `stream=False` the whole output to `await`.

        `options` are those of `paceline.types.Options`: n, max_output_tokens, temperature, top_k, top_p, min_p, seed,
        stop, stop_token_ids, ignore_eos, priority, tenant, cache_salt, request_id. With `n` > 1 each chunk is a piece
        of its `choice`, and the output has `choices`. The request starts now; its errors come while it is read, except
        `InvalidRequest` for what cannot be sent. Errors: see `paceline.errors`.
        """
        answer = self._generate(generate_request(prompt, **with_defaults(self._defaults, options)), timeout_s)
        return answer if stream else answer.result()

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[True] = True,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream: ...
    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[False],
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Coroutine[Any, Any, Output]: ...
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: bool = True,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream | Coroutine[Any, Any, Output]:
        """Let the model speak next in a conversation, oldest message first; a `str` is one message of the user.

        Like `generate` in everything else. `InvalidRequest` if the model has no chat template.
        """
        answer = self._generate(
            generate_request(messages=messages, **with_defaults(self._defaults, options)), timeout_s
        )
        return answer if stream else answer.result()

    @overload
    async def generate_batch(
        self,
        prompts: Iterable[BatchPrompt],
        *,
        on_progress: OnProgress | None = None,
        on_error: Literal["raise"] = "raise",
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> list[Output]: ...
    @overload
    async def generate_batch(
        self,
        prompts: Iterable[BatchPrompt],
        *,
        on_progress: OnProgress | None = None,
        on_error: Literal["return"],
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> list[Output | PacelineError]: ...
    async def generate_batch(
        self,
        prompts: Iterable[BatchPrompt],
        *,
        on_progress: OnProgress | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> list[Output] | list[Output | PacelineError]:
        """Continue many prompts; returns their outputs in the order of the prompts.

        A prompt is text, token ids, a conversation, or a dict of the arguments of `generate`, which go before
        `options`. The server takes them as it has room, so a batch may have any size. `on_progress` is called with the
        number of requests done and of all requests, after each one. `timeout_s` is for the whole batch.

        One request's error does not touch the others. With `on_error="raise"` the first error is raised as soon as it
        is known, its message begins with the place of the prompt, and the rest is cancelled since nobody would get it;
        with `"return"` the error stands in the place of the output. If the connection breaks, the outputs so far are
        kept and only the other requests are asked for again, which the server may have gone on with meanwhile.
        """
        attempts = self._attempts(timeout_s)
        batch = Batch(prompts, with_defaults(self._defaults, options), attempts, on_progress, on_error)
        run = _BatchRun(self._stub, self._cancels, batch, attempts, CallSpan("GenerateBatch", self._target))
        self._runs.add(run)
        return await run.outcomes()

    async def cancel(self, request_id: str) -> None:
        """Cancel a request by id; its reader gets `Cancelled`. A request that is unknown or has ended is left alone."""
        request = pb.CancelRequest(request_id=request_id)
        await self._try(partial(self._stub.Cancel, request, metadata=metadata()), request_id)

    async def model(self) -> Model:
        """Describe the model served there: its name and its limits."""
        reply = await self._try(partial(self._stub.GetModel, pb.GetModelRequest(), metadata=metadata()))
        return model_of(reply.model)

    async def close(self) -> None:
        """Cancel the requests that still run, and close the connection."""
        await asyncio.gather(*[run.close() for run in self._runs])
        await self._cancels.wait()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        asyncio.get_running_loop()  # a channel belongs to the loop in which it is made: none running is a mistake
        return grpc.aio.insecure_channel(self._target, options=CHANNEL_OPTIONS)

    @cached_property
    def _stub(self) -> "InferenceServiceAsyncStub":
        return InferenceServiceStub(self._channel)

    @cached_property
    def _cancels(self) -> AsyncCancels:
        return AsyncCancels(self._stub)

    def _generate(self, request: pb.GenerateRequest, timeout_s: float | None) -> AsyncStream:
        span = CallSpan("Generate", self._target, request)
        generate = cast(_Generate, partial(self._stub.Generate, metadata=span.metadata))
        try:
            stream = AsyncStream(generate, self._cancels, request, self._attempts(timeout_s), span)
        except BaseException as error:  # the client is closed, say
            span.fail(error)
            raise
        self._runs.add(stream)
        return stream

    async def _try(self, start: _Start[Awaitable[_Reply]], request_id: str = "") -> _Reply:
        """Make a call that may be repeated at will."""
        attempts = self._attempts(None)
        while True:
            try:
                with _local_cancel_as_error(request_id):
                    return await start(timeout=attempts.remaining_s)
            except grpc.RpcError as failure:
                error = error_of_call(failure, request_id, timeout_s=attempts.timeout_s)
                await asyncio.sleep(attempts.wait_s(error))

    def _attempts(self, timeout_s: float | None) -> Attempts:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(timeout_s, self._max_retries, self._detach_timeout_s)
