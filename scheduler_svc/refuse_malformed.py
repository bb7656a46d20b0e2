"""Messages that cannot be read at all, refused with a reason.

gRPC answers them with `INTERNAL` and no explanation, because reading a message comes before the handler. Here the
deserializer hands the error to the handler instead of raising it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from common.errors import RefusedError, invalid


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands where the message would be."""

    error: RefusedError


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Gives handlers a `Malformed` in the place of a message that cannot be read."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the deserializer of every method of the inference service."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/paceline.v1.InferenceService/"):
            return handler
        return handler._replace(request_deserializer=_lenient(handler.request_deserializer))


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            reason = "a text field is not valid UTF-8" if "utf-8" in str(error).lower() else str(error)
            return Malformed(invalid(f"the message of {len(data)} bytes cannot be read: {reason}"))

    return read
