"""What every call to the scheduler passes on its way in and out: whose trace it belongs to, and what went wrong.

Handlers raise `RefusedError` and need not know how gRPC is told of it. The step stream passes none of this: executors
are its servers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from common.errors import RefusedError, abort, invalid
from common.tracing import parse_traceparent

log = structlog.get_logger()

_OURS = "/paceline."
_traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)


def traceparent() -> str | None:
    """The header of that name of the call which is being answered (W3C Trace Context)."""
    return _traceparent.get()


class ReadContext(grpc.aio.ServerInterceptor):
    """Keeps what a call says of its context, for whoever needs it while the call is answered."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Note it in the context of the call's task, which answers the call too."""
        header = dict(handler_call_details.invocation_metadata or ()).get("traceparent")
        _traceparent.set(header if isinstance(header, str) else None)
        return await continuation(handler_call_details)


class FailedError(Exception):
    """A mistake of ours, and the request that it happened to. Its cause is what went wrong."""

    def __init__(self, request_id: str, trace_id: str) -> None:
        """Say by which ids the log has it."""
        super().__init__(f"request '{request_id}' failed")
        self.request_id = request_id
        self.trace_id = trace_id


def mistake(at: str, error: BaseException) -> RefusedError:
    """What others may know of a mistake of ours at something: what it trips over may be what another user has sent."""
    return RefusedError(
        grpc.StatusCode.INTERNAL,
        f"the scheduler failed at {at} with a {type(error).__name__}, which is a mistake of its own; its log has the "
        "reason",
    )


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands where the message would be, in a stream of them."""

    error: RefusedError


class TellErrors(grpc.aio.ServerInterceptor):
    """Ends calls with the status that says what went wrong.

    - `RefusedError` becomes its own status.
    - A message that cannot be read is refused with a reason. gRPC answers it with `INTERNAL` and no explanation,
      because reading a message comes before the handler.
    - Anything else is a mistake of ours: `INTERNAL`, with the reason in the log and not in the answer.
    """

    def __init__(self, on_unreadable: Callable[[str, RefusedError], None] = lambda _method, _error: None) -> None:
        """Call `on_unreadable` with the method's full name for each message that its handler never sees."""
        self._on_unreadable = on_unreadable

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the methods that are ours; health and reflection know what to say."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        kind = _KINDS[handler.request_streaming, handler.response_streaming]
        wrap = _streams if handler.response_streaming and not handler.request_streaming else _answers
        return handler._replace(
            request_deserializer=_lenient(handler.request_deserializer),
            **{kind: wrap(getattr(handler, kind), functools.partial(self._readable, method))},
        )

    def _readable(self, method: str, request: Any) -> Any:
        if isinstance(request, Malformed):
            self._on_unreadable(method, request.error)
            raise request.error
        return request


_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def _answers(
    behaviour: Callable[[Any, Any], Awaitable[Any]], readable: Callable[[Any], Any]
) -> Callable[[Any, Any], Awaitable[Any]]:
    """A handler that returns its answer, or writes to the context."""

    @functools.wraps(behaviour)
    async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with _Told(context):
            return await behaviour(readable(request), context)

    return answer


def _streams(
    behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]], readable: Callable[[Any], Any]
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    """A handler that yields its answers."""

    @functools.wraps(behaviour)
    async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async with _Told(context), contextlib.aclosing(behaviour(readable(request), context)) as messages:
            async for message in messages:
                yield message

    return stream


class _Told:
    """Ends the call with the status of what is raised within; what gRPC itself raises to end it goes on its way."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.BaseError):
            return
        if isinstance(error, RefusedError):
            await abort(self._context, error)
        cause = error.__cause__ or error if isinstance(error, FailedError) else error
        request_id, trace_id = _ids_of(error)
        log.error("call failed", request_id=request_id, trace_id=trace_id, traceparent=traceparent(), exc_info=cause)
        await abort(self._context, mistake("this call", cause))


def _ids_of(error: Exception) -> tuple[str, str]:
    """The request and the trace in which something went wrong; "" where that is not known."""
    if isinstance(error, FailedError):
        return error.request_id, error.trace_id
    header = traceparent()
    parsed = parse_traceparent(header) if header else None
    return "", parsed[0].hex() if parsed else ""


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            reason = "a text field is not valid UTF-8" if "utf-8" in str(error).lower() else str(error)
            return Malformed(invalid(f"the message of {len(data)} bytes cannot be read: {reason}"))

    return read
