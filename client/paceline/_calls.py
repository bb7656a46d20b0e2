"""How a client calls: its channel, the metadata of a call, and when a call is tried again."""

import math
import random
import time
from dataclasses import dataclass

import grpc

from paceline._tracing import traceparent
from paceline.errors import PacelineError, TimedOut

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # A line that is dead without a word is noticed after 15 s, well within the default `detach_timeout_s`. gRPC waits
    # for the answer to a ping, and a minute for it, whatever the time-out of keepalive, unless that is said as well.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # a request may wait long in the queue, and its stream be silent
    ("grpc.max_receive_message_length", 64 * 2**20),  # an output of a batch comes whole
    ("grpc.max_send_message_length", -1),  # the server knows its limit
    ("grpc.initial_reconnect_backoff_ms", 100),  # a restarted server is found again within the retries
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long a connection may take: more than that, and it was lost
]


def metadata() -> tuple[tuple[str, str], ...]:
    """The metadata of a call; the attempts of one call share it, so that they are one trace."""
    return (("traceparent", traceparent()),)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before one more retry."""

    first_s: float
    max_s: float

    def wait_s(self, retry_count: int, retry_after_s: float | None, jitter: float) -> float:
        """Seconds to wait before the retry after `retry_count` retries; `jitter` is drawn from [0, 1).

        The wait doubles with each retry, and is drawn from all of [0, limit) so that clients that failed together do
        not come back together. What the server asked for comes on top.

        Example: with `first_s` 0.25 the third retry (2 before it) waits up to 0.25 * 2**2 = 1 s. After a `RetryInfo`
        of 2 s, it waits 2 to 3 s.
        """
        return (retry_after_s or 0.0) + jitter * min(self.max_s, self.first_s * 2.0 ** min(retry_count, 30))


_RETRY = Backoff(first_s=0.25, max_s=8.0)
_RESUME = Backoff(first_s=0.1, max_s=2.0)  # somebody reads what broke off, and each second counts for `patience_s`


class Attempts:
    """The attempts at one call: how much time is left, and whether there is another one.

    What the server did not take is tried again up to `max_retries` times. What it had taken, or may have, is worth
    more: there, only the time counts that passes without the server, at most `patience_s` before something new comes.
    """

    def __init__(self, timeout_s: float | None, max_retries: int, patience_s: float) -> None:
        self.timeout_s = timeout_s  # what the caller allowed for all attempts together; None: without limit
        self._deadline = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
        self._max_retries = max_retries
        self.patience_s = patience_s  # 0: what broke is not taken up again
        self._retry_count = 0  # since the last progress, like `_resume_count`
        self._resume_count = 0  # apart from retries: a server that is back after an outage is due all of them
        self._attempt_at = math.inf  # when the last attempt began that followed another; the first one counts nothing
        self.away_s = 0.0  # without the server since the last progress: waiting, or in attempts that it did not answer

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the time-out of the call, over all attempts; None: it has none."""
        remaining = self._deadline - time.monotonic()
        return None if remaining == math.inf else max(remaining, 0.0)

    def wait_s(self, error: PacelineError) -> float:
        """Seconds to wait before the next attempt; raises `error` where none would help, is left or is in time."""
        wait = _RETRY.wait_s(self._retry_count, error.retry_after_s, random.random())
        is_too_late = time.monotonic() + wait >= self._deadline
        if not is_retryable(error) or self._retry_count >= self._max_retries or is_too_late:
            raise error
        self._retry_count += 1
        self._attempt_at = time.monotonic() + wait
        return wait

    def wait_after_break_s(self, error: PacelineError, *, was_answered: bool) -> float:
        """Seconds to wait before what broke is taken up again; raises `error` where that cannot help or takes too long.

        `was_answered`: the attempt that broke had reached the server, so that the time until then was not without it.
        The last attempt is made when the patience ends, or the time-out.
        """
        now = time.monotonic()
        if not was_answered:
            self.away_s += max(0.0, now - self._attempt_at)
        if not is_retryable(error) or self.away_s >= self.patience_s:
            raise error
        if now >= self._deadline:
            message = f"the time-out was over before the server was back: {error.message}"
            raise TimedOut(message, grpc.StatusCode.DEADLINE_EXCEEDED, error.request_id) from error
        left_s = min(self.patience_s - self.away_s, self._deadline - now)
        wait = min(_RESUME.wait_s(self._resume_count, error.retry_after_s, random.random()), left_s)
        self._resume_count += 1
        self._attempt_at = now + wait
        self.away_s += wait
        return wait

    def note_progress(self) -> None:
        """Something was gained: all retries are left again, and all patience."""
        self._retry_count = self._resume_count = 0
        self.away_s = 0.0


def is_retryable(error: PacelineError) -> bool:
    """Whether another attempt at the same request may fare better."""
    return error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
