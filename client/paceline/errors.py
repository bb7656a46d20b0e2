"""What can go wrong, and what to do then.

Error               gRPC status             what to do
  InvalidRequest    INVALID_ARGUMENT,       change the request; retrying cannot help
                    NOT_FOUND,
                    OUT_OF_RANGE,
                    ALREADY_EXISTS
  Overloaded        RESOURCE_EXHAUSTED      the queue is full; wait `error.retry_after_s` seconds and retry
  Unavailable       UNAVAILABLE             check that the server runs and is reachable, then send the request again
  TimedOut          DEADLINE_EXCEEDED       allow more time with timeout_s, a shorter prompt, or fewer tokens
  Cancelled         CANCELLED               send the request again if it was not you who cancelled it
  ServerError       anything else           report it with `error.request_id`

`Overloaded` and `Unavailable` have been retried for you, as often as `max_retries` and the time-out allowed, unless
tokens had been delivered already. Every error is a `PacelineError`.
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
    """The server is not reachable, starting or draining, or the connection to it broke."""

    what_to_do = "check that the server runs and is reachable, then send the request again"


class TimedOut(PacelineError):
    """The time-out was over before the request had ended."""

    what_to_do = "allow more time with timeout_s, a shorter prompt, or fewer tokens"


class Cancelled(PacelineError):
    """The request was cancelled: by its id, or because its stream or its client was closed here."""

    what_to_do = "send the request again if it was not you who cancelled it"


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
}
"""The table above; a status that is not here is a `ServerError`."""

# gRPC itself refuses what is too large to read, with the status of a full queue.
_TOO_LARGE = re.compile(r"^SERVER: Received message larger than max \((\d+) vs\. (\d+)\)")

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


def error_of_call(failure: grpc.RpcError, request_id: str = "", note: str = "") -> PacelineError:
    """The error that stands for a failed call; `note` is added to the message of the server."""
    message = failure.details() or f"the call ended with {failure.code().name} and no message"
    code = failure.code()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(message)):
        code = grpc.StatusCode.INVALID_ARGUMENT
        message = f"the request has {sizes[1]} bytes, the server takes at most {sizes[2]}; shorten the prompt"
    error = error_of(code, message + note, request_id, _retry_after_s(failure))
    error.__cause__ = failure
    return error


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
