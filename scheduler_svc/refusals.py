"""What a request is refused with, wherever in the scheduler that is noticed, and how refusals are counted."""

import grpc

from common.errors import RefusedError

REASONS = (
    "invalid",  # it makes no sense, or not here
    "too_large",  # more tokens or bytes than the model, the cache or the settings take
    "id_taken",  # another request has its id
    "queue_full",
    "no_executor",  # none has joined yet, and nobody is there who would start one
    "leaving",  # the scheduler stops
    "deadline",  # passed at the door, or too early for the next executor
    "cancelled",  # at the door: by id, or by a caller who has hung up
    "lost",  # what it wants to go on with is not known any more
    "internal",  # by a mistake of ours, which the log has
    "other",
)
"""Every reason there is: a label of a metric."""

_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: "invalid",
    grpc.StatusCode.NOT_FOUND: "invalid",
    grpc.StatusCode.ALREADY_EXISTS: "id_taken",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "queue_full",
    grpc.StatusCode.UNAVAILABLE: "leaving",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.CANCELLED: "cancelled",
    grpc.StatusCode.DATA_LOSS: "lost",
    grpc.StatusCode.INTERNAL: "internal",
}


def reason_of(error: RefusedError) -> str:
    """Which of `REASONS` an error is counted under."""
    return error.reason or _BY_CODE.get(error.code, "other")


def too_large(message: str) -> RefusedError:
    """It would make sense if it were smaller."""
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message, reason="too_large")


def no_executor() -> RefusedError:
    """Nobody knows yet what the model takes."""
    message = "no executor has joined yet; retry with backoff until one is ready"
    return RefusedError(grpc.StatusCode.UNAVAILABLE, message, reason="no_executor")


def cancelled(request_id: str) -> RefusedError:
    """Somebody has cancelled it."""
    return RefusedError(grpc.StatusCode.CANCELLED, f"request '{request_id}' was cancelled")


def hung_up(request_id: str, held_for: str, *, is_late: bool) -> RefusedError:
    """Its caller has gone before it was accepted: because of its deadline, or for reasons of their own. `held_for` is
    what it had to wait for last; "": nothing.
    """
    when = f"while it was held for {held_for}" if held_for else "before it was accepted"
    if is_late:
        message = f"request '{request_id}': its deadline passed {when}; allow more time"
        return RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, message)
    return RefusedError(grpc.StatusCode.CANCELLED, f"request '{request_id}': its caller hung up {when}")


def leaving() -> RefusedError:
    """The service goes."""
    return RefusedError(grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down; retry with backoff")


def overloaded(reason: str) -> RefusedError:
    """There is no room in the queue."""
    return RefusedError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"the queue is full: {reason}; retry after a second", retry_after_s=1.0
    )
