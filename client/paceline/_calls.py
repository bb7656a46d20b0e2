"""How a client calls: its channel, the metadata of a call, and when a call is tried again."""

import math
import random
import sys
import time
from uuid import uuid4

import grpc

from paceline.errors import PacelineError

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 20_000),  # a dead connection is noticed after these two
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 * 2**20),  # an output of a batch comes whole
    ("grpc.max_send_message_length", -1),  # the server knows its limit
    ("grpc.initial_reconnect_backoff_ms", 100),  # a restarted server is found again within the retries
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 8.0


def metadata() -> tuple[tuple[str, str], ...]:
    """The metadata of a call; the attempts of one call share it, so that they are one trace."""
    return (("traceparent", traceparent()),)


def traceparent() -> str:
    """The W3C trace context of the caller.

    It is that of the OpenTelemetry span that runs now, where the program uses OpenTelemetry; otherwise a new trace
    whose flags leave it to the server whether to record.
    """
    if trace := sys.modules.get("opentelemetry.trace"):
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    return f"00-{uuid4().hex}-{uuid4().hex[:16]}-00"


def backoff_s(retry_count: int, retry_after_s: float | None, jitter: float) -> float:
    """Seconds to wait before the retry after `retry_count` retries; `jitter` is drawn from [0, 1).

    The wait doubles with each retry, and is drawn from all of [0, limit) so that clients that failed together do not
    come back together. What the server asked for comes on top.

    Example: the third retry (2 before it) waits up to 0.25 * 2**2 = 1 s. After a `RetryInfo` of 2 s, it waits 2 to 3 s.
    """
    return (retry_after_s or 0.0) + jitter * min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0**retry_count)


class Attempts:
    """The attempts at one call: how much time is left, and whether there is another one.

    A caller asks for another attempt only where nothing was delivered yet, or where what was delivered is kept.
    """

    def __init__(self, timeout_s: float | None, max_retries: int) -> None:
        self._deadline = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
        self._max_retries = max_retries
        self._retry_count = 0  # since the last progress
        self._is_retry = False  # an attempt before this one may have left its request behind on the server

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the time-out of the call, over all attempts; None: it has none."""
        remaining = self._deadline - time.monotonic()
        return None if remaining == math.inf else max(remaining, 0.0)

    def is_retryable(self, error: PacelineError) -> bool:
        """Whether another attempt at the same request may fare better, retries and time permitting."""
        if error.code is grpc.StatusCode.ALREADY_EXISTS:
            return self._is_retry  # the request that exists is our own; it ends soon, as its reader is gone
        return error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)

    def wait_s(self, error: PacelineError) -> float:
        """Seconds to wait before the next attempt; raises `error` where none would help, is left or is in time."""
        wait = backoff_s(self._retry_count, error.retry_after_s, random.random())
        is_too_late = time.monotonic() + wait >= self._deadline
        if not self.is_retryable(error) or self._retry_count >= self._max_retries or is_too_late:
            raise error
        self._retry_count += 1
        self._is_retry = True
        return wait

    def note_progress(self) -> None:
        """Something was gained: all retries are left again."""
        self._retry_count = 0
