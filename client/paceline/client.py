"""The client for programs without asyncio."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, Protocol, Self, TypeVar, Unpack, cast, overload
from weakref import WeakSet

import grpc

from paceline._answer import Answer, model_of
from paceline._batch import Batch, BatchPrompt, OnError, OnProgress
from paceline._calls import CHANNEL_OPTIONS, Attempts, metadata
from paceline._cancels import Cancels
from paceline._requests import generate_request, with_defaults
from paceline._tracing import CallSpan
from paceline.errors import Cancelled, PacelineError, error_of_call
from paceline.types import Chunk, Message, Model, Options, Output, Prompt
from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import InferenceServiceStub

_Reply = TypeVar("_Reply", covariant=True)
_Run = TypeVar("_Run", "Stream", "_BatchRun")


class _Call(Protocol):
    """A running `Generate`."""

    def __next__(self) -> pb.GenerateResponse: ...
    def cancel(self) -> bool: ...
    def add_callback(self, callback: Callable[[], None]) -> bool: ...


class _Generate(Protocol):
    """Makes one call of `Generate` whose metadata are set."""

    def __call__(self, request: pb.GenerateRequest, *, timeout: float | None) -> _Call: ...


class _Start(Protocol[_Reply]):
    """Makes one attempt at a call whose request and metadata are set."""

    def __call__(self, *, timeout: float | None) -> _Reply: ...


class Stream(Answer):
    """The answer to one request as it is computed: iterate over it for its chunks.

    When the connection breaks, it waits for the server and goes on where it was. Leaving the `with` before the last
    chunk cancels the request, and so do `close` and dropping the stream. An error ends the iteration; `text` still has
    what came before it.
    """

    def __init__(
        self, generate: _Generate, cancels: Cancels, request: pb.GenerateRequest, attempts: Attempts, span: CallSpan
    ) -> None:
        super().__init__(request, attempts, span)
        self._generate = generate
        self._cancels = cancels
        self._closed = threading.Event()
        self._call = self._start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        try:
            while (chunk := self._read()) is None:
                pass
        except BaseException as error:  # also Ctrl-C, and an answer that cannot be right
            self._span.fail(error)
            self.close()
            raise
        return chunk

    def result(self) -> Output:
        """Read on to the end, and return the whole answer."""
        with self:
            for _ in self:
                pass
        return self.output

    def close(self) -> None:
        """Cancel the request if it still runs; a thread that waits for its next chunk gets `Cancelled`."""
        if not self._is_over:
            self._closed.set()
        self._call.cancel()
        if self._leave():
            self._cancels.send(self._request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            if self._leave():
                self._cancels.send_after(self._call, self._request_id)
            self._call.cancel()

    def _start(self) -> _Call:
        return self._generate(self._next_request(), timeout=self._attempts.remaining_s)

    def _read(self) -> Chunk | None:
        """Wait for one message, or after a break for the next call."""
        try:
            return self._add(next(self._call))
        except StopIteration:
            self._check_complete()
            raise
        except grpc.RpcError as failure:
            if self._output is not None:
                raise StopIteration from None  # everything had come before the connection broke
            wait_s = self._wait_s(failure)
        if not self._closed.wait(wait_s):
            self._call = self._start()
        if self._closed.is_set():  # also when closed while the call started
            self._call.cancel()
            if self._runs_on:
                self._cancels.send(self._request_id)
            raise Cancelled("the stream was closed", grpc.StatusCode.CANCELLED, self.request_id)
        return None


class _BatchRun:
    """One `generate_batch` as it runs."""

    def __init__(
        self, stub: InferenceServiceStub, cancels: Cancels, batch: Batch, attempts: Attempts, span: CallSpan
    ) -> None:
        self._generate = partial(stub.GenerateBatch, metadata=span.metadata)
        self._cancels = cancels
        self._batch = batch
        self._attempts = attempts
        self._span = span
        self._closed = threading.Event()
        self._call: grpc.Call | None = None  # the last one

    def outcomes(self) -> list[Output | PacelineError]:
        """Make attempts until each request has an outcome."""
        try:
            while not self._batch.is_done:
                if self._closed.wait(self._batch.wait_s(self._attempt())) and not self._batch.is_done:
                    raise Cancelled("the client was closed", grpc.StatusCode.CANCELLED)
        except BaseException as error:  # the error of one request, Ctrl-C
            self._span.fail(error)
            self.close()
            raise
        self._span.end()
        return self._batch.outcomes()

    def close(self) -> None:
        """Cancel the requests without an outcome."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._call is not None:
            self._call.cancel()
        for request_id in self._batch.open_ids():
            self._cancels.send(request_id)

    def _attempt(self) -> PacelineError | None:
        """Make one call; returns how it failed, None if it ended in order."""
        call = self._call = self._generate(iter(self._batch.messages()), timeout=self._attempts.remaining_s)
        try:
            for message in call:
                self._batch.add(message)
        except grpc.RpcError as failure:
            return error_of_call(failure, timeout_s=self._attempts.timeout_s)
        finally:
            call.cancel()
        return None


class Client:
    """A connection to one server; any number of threads may share it.

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
        self._defaults = {
            "model": model,
            "tenant": tenant,
            "cache_salt": cache_salt,
            "detach_timeout_s": detach_timeout_s,
        }
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._detach_timeout_s = detach_timeout_s
        self._target = target
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = InferenceServiceStub(self._channel)
        self._cancels = Cancels(self._stub)
        self._lock = threading.Lock()
        self._runs: WeakSet[Stream | _BatchRun] = WeakSet()  # what may have requests that still run; under the lock

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[True] = True,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Stream: ...
    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False], timeout_s: float | None = None, **options: Unpack[Options]
    ) -> Output: ...
    def generate(
        self, prompt: Prompt, *, stream: bool = True, timeout_s: float | None = None, **options: Unpack[Options]
    ) -> Stream | Output:
        """Continue a prompt: as a stream of chunks, or whole with `stream=False`.

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
    ) -> Stream: ...
    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[False],
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Output: ...
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: bool = True,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Stream | Output:
        """Let the model speak next in a conversation, oldest message first; a `str` is one message of the user.

        Like `generate` in everything else. `InvalidRequest` if the model has no chat template.
        """
        answer = self._generate(
            generate_request(messages=messages, **with_defaults(self._defaults, options)), timeout_s
        )
        return answer if stream else answer.result()

    @overload
    def generate_batch(
        self,
        prompts: Iterable[BatchPrompt],
        *,
        on_progress: OnProgress | None = None,
        on_error: Literal["raise"] = "raise",
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> list[Output]: ...
    @overload
    def generate_batch(
        self,
        prompts: Iterable[BatchPrompt],
        *,
        on_progress: OnProgress | None = None,
        on_error: Literal["return"],
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> list[Output | PacelineError]: ...
    def generate_batch(
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
        return self._noted(
            _BatchRun(self._stub, self._cancels, batch, attempts, CallSpan("GenerateBatch", self._target))
        ).outcomes()

    def cancel(self, request_id: str) -> None:
        """Cancel a request by id; its reader gets `Cancelled`. A request that is unknown or has ended is left alone."""
        request = pb.CancelRequest(request_id=request_id)
        self._try(partial(self._stub.Cancel, request, metadata=metadata()), request_id)

    def model(self) -> Model:
        """Describe the model served there: its name and its limits."""
        return model_of(self._try(partial(self._stub.GetModel, pb.GetModelRequest(), metadata=metadata())).model)

    def close(self) -> None:
        """Cancel the requests that still run, and close the connection."""
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            run.close()
        self._cancels.wait()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(self, request: pb.GenerateRequest, timeout_s: float | None) -> Stream:
        span = CallSpan("Generate", self._target, request)
        generate = cast(_Generate, partial(self._stub.Generate, metadata=span.metadata))
        try:
            return self._noted(Stream(generate, self._cancels, request, self._attempts(timeout_s), span))
        except BaseException as error:  # the client is closed, say
            span.fail(error)
            raise

    def _noted(self, run: _Run) -> _Run:
        """`run`, to be closed with this client."""
        with self._lock:
            self._runs.add(run)
        return run

    def _try(self, start: _Start[_Reply], request_id: str = "") -> _Reply:
        """Make a call that may be repeated at will."""
        attempts = self._attempts(None)
        while True:
            try:
                return start(timeout=attempts.remaining_s)
            except grpc.RpcError as failure:
                error = error_of_call(failure, request_id, timeout_s=attempts.timeout_s)
                time.sleep(attempts.wait_s(error))

    def _attempts(self, timeout_s: float | None) -> Attempts:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(timeout_s, self._max_retries, self._detach_timeout_s)
