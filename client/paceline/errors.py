"""What can go wrong, and what to do then.

Error               gRPC status             what to do
  InvalidRequest    INVALID_ARGUMENT,       change the request; retrying cannot help
                    NOT_FOUND,
                    OUT_OF_RANGE,
                    ALREADY_EXISTS
  Overloaded        RESOURCE_EXHAUSTED      the queue is full; wait `error.retry_after_s` seconds and retry
  Unavailable       UNAVAILABLE             resumed by request id, but the server stayed away; check that it runs
  TimedOut          DEADLINE_EXCEEDED       allow more time with timeout_s, a shorter prompt, or fewer tokens
  Cancelled         CANCELLED               send the request again if it was not you who cancelled it
  AnswerLost        DATA_LOSS               send it again from the start, under another `request_id`
  ServerError       anything else           report it with `error.request_id`

`Overloaded` and `Unavailable` have been retried for you, as often as `max_retries` and the time-out allowed. What broke
off without a word of the server, in the middle of an answer or before it, was taken up again where it was, until the
server had been away for `detach_timeout_s`, or the time-out was over. Every error is a `PacelineError`.
"""

# ruff: noqa: N818 - `except Overloaded` says it all
import re
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status


class PacelineError(Exception):
    """A request failed; `str(error)` says why, `what_to_do` says what helps."""

    what_to_do = "see the message"
    """The remedy, as in the table of this module."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code, request_id, retry_after_s)
        self.message = message  # names the value, the limit and the way out
        self.code = code  # the gRPC status that this error stands for
        self.request_id = request_id  # finds the request in logs and traces; empty where none was sent
        self.retry_after_s = retry_after_s  # when the server expects to have room; None: it did not say

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message


class InvalidRequest(PacelineError):
    """The server, or already this client, refuses the request as it is."""

    what_to_do = "change the request; retrying cannot help"


class Overloaded(PacelineError):
    """The server has no room for the request now."""

    what_to_do = "the queue is full; wait `error.retry_after_s` seconds and retry"


class Unavailable(PacelineError):
    """The server is not reachable, starting or draining, or the connection to it broke, and it did not come back."""

    what_to_do = "resumed by request id, but the server stayed away; check that it runs"


class TimedOut(PacelineError):
    """The time-out was over before the request had ended."""

    what_to_do = "allow more time with timeout_s, a shorter prompt, or fewer tokens"


class Cancelled(PacelineError):
    """The request was cancelled: by its id, or because its stream or its client was closed here."""

    what_to_do = "send the request again if it was not you who cancelled it"


class AnswerLost(PacelineError):
    """The server no longer knows the answer that broke off: it was restarted without a journal, or kept it long enough.

    What had come of it stands. A second answer may go on in other words, so it is for the caller to ask for one.
    """

    what_to_do = "send it again from the start, under another `request_id`"


class ServerError(PacelineError):
    """The server failed in a way that is not the request's fault."""

    what_to_do = "report it with `error.request_id`"


ERROR_OF_STATUS: dict[grpc.StatusCode, type[PacelineError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOut,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DATA_LOSS: AnswerLost,
}
"""The table above; a status that is not here is a `ServerError`."""

# gRPC itself refuses what is too large to read, with the status of a full queue.
_TOO_LARGE = re.compile(r"^SERVER: Received message larger than max \((\d+) vs\. (\d+)\)")

# What grpcio 1.85 makes of a line that is lost in the middle of a call; the same for TCP and unix sockets, for clients
# and servers with and without asyncio:
#
#   server killed, line cut or reset         UNAVAILABLE  Stream removed (Socket closed), (… Connection reset by peer …)
#   server.stop(), when its grace is over    UNAVAILABLE  Cancelling all calls
#   half-open line, once keepalive notices   UNAVAILABLE  Stream removed (ping timeout)
#   GOAWAY                                   UNAVAILABLE  Stream removed (… GOAWAY received; Error code: 0 …)
#   nobody listens                           UNAVAILABLE  failed to connect to all addresses; … refused
#   a port forwarder whose server is away    UNAVAILABLE  failed to connect to all addresses; … Socket closed
#   one that resets, one that hangs          UNAVAILABLE  … Connection reset by peer (104), … receiving SETTINGS frame
#   a name that nobody knows                 UNAVAILABLE  errors resolving …
#   a proxy with 429, 502, 503 or 504        UNAVAILABLE  Received http2 header with status: 502
#   RST_STREAM of a proxy, code 8            CANCELLED    Stream removed (RST_STREAM (Received RST_STREAM …))
#   RST_STREAM of a proxy, most codes        INTERNAL     Stream removed (RST_STREAM (Received RST_STREAM …))
#   stream that ends without a status        UNKNOWN      Stream removed (Data frame with END_STREAM flag received)
#   asyncio server that ends without stop()  CANCELLED    CANCELLED
#   asyncio client, while a batch is sent    INTERNAL     Internal error from Core (or it cancels the call: see `aio`)
#
# Releases before it leave out "Stream removed" before RST_STREAM. `Cancel` is answered in words of the server.
_BROKEN_LINE = re.compile(
    r"(Stream removed|Received RST_STREAM|RST_STREAM|GOAWAY|Internal error from Core)\b|CANCELLED$"
)
_CODES_OF_A_BROKEN_LINE = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_NO_CONNECTION = re.compile(r"failed to connect|errors resolving|DNS resolution failed")
_WITHOUT_A_WORD = re.compile(
    _BROKEN_LINE.pattern + r"|Socket closed|Cancelling all calls|Received http2 header with status: 50[234]"
    r"|failed to connect.*(Socket closed|Connection reset|Broken pipe|receiving SETTINGS frame)"
)

# The time-out of a call is over: gRPC's own words. A server that ends a call for its deadline says more.
_OWN_TIME_OUT = re.compile(r"(Stream removed \()?Deadline Exceeded\b")

_STATUS_OF_NUMBER: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}


def error_of(
    code: grpc.StatusCode, message: str, request_id: str = "", retry_after_s: float | None = None
) -> PacelineError:
    """The error that stands for a status."""
    return ERROR_OF_STATUS.get(code, ServerError)(message, code, request_id, retry_after_s)


def at_prompt(index: int, error: PacelineError) -> PacelineError:
    """`error` with the place of its prompt in a batch."""
    placed = type(error)(f"prompts[{index}]: {error.message}", error.code, error.request_id, error.retry_after_s)
    placed.__cause__ = error.__cause__
    return placed


def error_of_number(number: int, message: str, request_id: str) -> PacelineError:
    """The error that stands for a status given as its number, as in `RequestError.code`."""
    return error_of(_STATUS_OF_NUMBER.get(number, grpc.StatusCode.UNKNOWN), message, request_id)


def is_own_time_out(failure: grpc.RpcError) -> bool:
    """Whether the call ended here because its time-out was over, without a word of the server."""
    return (
        failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED and _OWN_TIME_OUT.match(failure.details() or "") is not None
    )


def error_of_call(
    failure: grpc.RpcError, request_id: str = "", note: str = "", timeout_s: float | None = None
) -> PacelineError:
    """The error that stands for a failed call; `note` is added to the message of the server. `timeout_s` is what the
    caller allowed for it, over all of its attempts.
    """
    message = failure.details() or f"the call ended with {failure.code().name} and no message"
    code = failure.code()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(message)):
        code = grpc.StatusCode.INVALID_ARGUMENT
        message = f"the request has {sizes[1]} bytes, the server takes at most {sizes[2]}; shorten the prompt"
    elif code in _CODES_OF_A_BROKEN_LINE and _BROKEN_LINE.match(message):
        code = grpc.StatusCode.UNAVAILABLE
    elif timeout_s is not None and is_own_time_out(failure):
        message = f"not done within {timeout_s:g} s"
    error = error_of(code, message + note, request_id, _retry_after_s(failure))
    error.__cause__ = failure
    return error


def reached_nobody(error: PacelineError) -> bool:
    """Whether a call failed before there was a connection to a server, as when none runs: the call was not sent."""
    return error.code is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION.match(error.message) is not None


def ended_without_a_word(error: PacelineError) -> bool:
    """Whether somebody took the connection, and then it ended without a word of the server.

    Either the server may have the request, or a port forwarder or proxy stands before a server that is away. In both
    cases the address is right, and what is there is worth waiting for.
    """
    return error.code is grpc.StatusCode.UNAVAILABLE and _WITHOUT_A_WORD.match(error.message) is not None


def _retry_after_s(failure: grpc.RpcError) -> float | None:
    """When the server says that a retry may succeed, from the `google.rpc.RetryInfo` of the status."""
    metadata: Any = failure.trailing_metadata() or ()  # pairs, as a tuple or as grpc.aio.Metadata
    for key, value in metadata:
        if key == "grpc-status-details-bin":
            with suppress(DecodeError):
                info = RetryInfo()
                if any(detail.Unpack(info) for detail in Status.FromString(value).details):
                    return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None
