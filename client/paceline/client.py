"""The client for programs without asyncio."""

import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal, Protocol, Self, TypeVar, Unpack, overload

import grpc

from paceline._answer import Answer, model_of
from paceline._batch import Batch, BatchPrompt, OnError, OnProgress
from paceline._calls import CHANNEL_OPTIONS, Attempts, metadata
from paceline._requests import generate_request, with_defaults
from paceline.errors import Cancelled, PacelineError, error_of_call
from paceline.types import Chunk, Message, Model, Options, Output, Prompt
from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import InferenceServiceStub

_Reply = TypeVar("_Reply", covariant=True)


class _Call(Protocol):
    """A running `Generate`."""

    def __next__(self) -> pb.GenerateResponse: ...
    def cancel(self) -> bool: ...


class _Start(Protocol[_Reply]):
    """Makes one attempt at a call whose request and metadata are set."""

    def __call__(self, *, timeout: float | None) -> _Reply: ...


class Stream(Answer):
    """The answer to one request as it is computed: iterate over it for its chunks.

    Leaving the `with` before the last chunk cancels the request, and so do `close` and dropping the stream.
    An error ends the iteration; `text` still has what came before it.
    """

    def __init__(self, start: _Start[_Call], request: pb.GenerateRequest, attempts: Attempts) -> None:
        super().__init__(request, attempts)
        self._start = start
        self._closed = threading.Event()
        self._call = start(timeout=attempts.remaining_s)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while True:
            try:
                chunk = self._add(next(self._call))
            except StopIteration:
                self._check_complete()
                raise
            except grpc.RpcError as failure:
                if self._output is not None:
                    raise StopIteration from None  # everything had come before the connection broke
                self._start_again(self._wait_s(failure))
            except BaseException:  # Ctrl-C
                self.close()
                raise
            else:
                if chunk is not None:
                    return chunk

    def result(self) -> Output:
        """Read on to the end, and return the whole answer."""
        with self:
            for _ in self:
                pass
        return self.output

    def close(self) -> None:
        """Cancel the request if it still runs; a thread that waits for its next chunk gets `Cancelled`."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self._call.cancel()

    def _start_again(self, wait_s: float) -> None:
        if not self._closed.wait(wait_s):
            self._call = self._start(timeout=self._attempts.remaining_s)
        if self._closed.is_set():  # also when closed while the call started
            self._call.cancel()
            raise Cancelled("the stream was closed", grpc.StatusCode.CANCELLED, self.request_id)


class Client:
    """A connection to one server; any number of threads may share it.

    `target` is `host:port` or `unix:/path`; it is dialled when it is first needed. `model` is the name of the model
    that every request asks for; None takes the one served there. `tenant` and `cache_salt` are those of every request
    that names none of its own. `timeout_s` holds for every call that names none of its own, over all of its attempts;
    None waits without limit. A call that meets a full or unreachable server is tried again up to `max_retries` times,
    with growing waits, as long as nothing of its answer has come.
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
    ) -> None:
        self._defaults = {"model": model, "tenant": tenant, "cache_salt": cache_salt}
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = InferenceServiceStub(self._channel)

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
        kept and only the other requests are sent again.
        """
        attempts = self._attempts(timeout_s)
        batch = Batch(prompts, with_defaults(self._defaults, options), attempts, on_progress, on_error)
        trace = metadata()
        while not batch.is_done:
            failure: grpc.RpcError | None = None
            call = self._stub.GenerateBatch(iter(batch.messages()), timeout=attempts.remaining_s, metadata=trace)
            try:
                for message in call:
                    batch.add(message)
            except grpc.RpcError as error:
                failure = error
            finally:
                call.cancel()
            time.sleep(batch.wait_s(failure))
        return batch.outcomes()

    def cancel(self, request_id: str) -> None:
        """Cancel a request by id; its reader gets `Cancelled`. A request that is unknown or has ended is left alone."""
        request = pb.CancelRequest(request_id=request_id)
        self._try(partial(self._stub.Cancel, request, metadata=metadata()), request_id)

    def model(self) -> Model:
        """Describe the model served there: its name and its limits."""
        return model_of(self._try(partial(self._stub.GetModel, pb.GetModelRequest(), metadata=metadata())).model)

    def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(self, request: pb.GenerateRequest, timeout_s: float | None) -> Stream:
        start = partial(self._stub.Generate, request, metadata=metadata())
        return Stream(start, request, self._attempts(timeout_s))

    def _try(self, start: _Start[_Reply], request_id: str = "") -> _Reply:
        """Make a call that may be repeated at will."""
        attempts = self._attempts(None)
        while True:
            try:
                return start(timeout=attempts.remaining_s)
            except grpc.RpcError as failure:
                time.sleep(attempts.wait_s(error_of_call(failure, request_id)))

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._timeout_s if timeout_s is None else timeout_s, self._max_retries)
