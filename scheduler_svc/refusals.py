"""What a request is refused with, wherever in the scheduler that is noticed."""

import grpc

from common.errors import RefusedError


def cancelled(request_id: str) -> RefusedError:
    """Somebody has cancelled it."""
    return RefusedError(grpc.StatusCode.CANCELLED, f"request '{request_id}' was cancelled")


def leaving() -> RefusedError:
    """The service goes."""
    return RefusedError(grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down; retry with backoff")


def overloaded(reason: str) -> RefusedError:
    """There is no room in the queue."""
    return RefusedError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"the queue is full: {reason}; retry after a second", retry_after_s=1.0
    )
