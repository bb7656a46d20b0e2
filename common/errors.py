"""Errors that a user or an operator can do something about, and their way into a gRPC status."""

from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status


class RefusedError(Exception):
    """A call that cannot be served as it is. Its message names the value, the limit and the way out."""

    def __init__(
        self, code: grpc.StatusCode, message: str, retry_after_s: float | None = None, reason: str = ""
    ) -> None:
        """Say why; `retry_after_s` tells the caller when trying again makes sense, `reason` is the word under which
        it is counted where the code does not say enough.
        """
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.reason = reason

    @property
    def code_number(self) -> int:
        """Number of the status code."""
        return int(self.code.value[0])


def invalid(message: str) -> RefusedError:
    """An error in what the caller sent."""
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)


def shown(value: str) -> str:
    """A value of the caller's, short enough for a message."""
    return value if len(value) <= 80 else value[:77] + "..."


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: RefusedError) -> NoReturn:
    """End the call with the error, with a `google.rpc.RetryInfo` where it says when to retry."""
    if error.retry_after_s is None:
        await context.abort(error.code, error.message)
    delay = Duration()
    delay.FromMilliseconds(round((error.retry_after_s or 0) * 1000))
    detail = Any()
    detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.name), message=error.message, details=[detail])
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort returned")
