"""The live scheduler: feeds events to the core, sends its plans, hands its outputs to their readers."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol

import grpc
import structlog

from common.errors import RefusedError, invalid
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.core.plan import Capacity, NeverFitsError, Plan, Result
from scheduler_svc.core.request import FinishReason, Request, RequestState
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.output_stream import OutputStream
from scheduler_svc.text_stream import TextStream

log = structlog.get_logger()


class Link(Protocol):
    """An attached executor, as the engine sees it."""

    executor_id: str
    draining: bool  # the executor has said that it wants to leave

    def send(self, plan: Plan) -> None:
        """Send a plan, some time soon."""
        ...

    def detach(self) -> None:
        """Let the executor go: nothing is left on it."""
        ...


class Engine:
    """Owns the core and lives on one event loop, so that nothing here needs a lock."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Start with no request and no executor."""
        self.scheduler = Scheduler()
        self.draining = False
        self._config = config
        self._streams: dict[str, OutputStream] = {}
        self._links: dict[str, Link] = {}
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()  # set whenever the queue may have become shorter
        self._ended = asyncio.Event()  # set whenever a request ended

    # --- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request, text: TextStream) -> OutputStream:
        """Accept a request or refuse it at once."""
        self.check_room(len(request.token_ids))
        if self.scheduler.get(request.request_id) is not None:
            raise RefusedError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"a request with the id '{request.request_id}' is running; choose another request_id",
            )
        try:
            self.scheduler.add(request)
        except NeverFitsError as error:
            raise invalid(str(error)) from error
        stream = OutputStream(request, text, time.monotonic())
        self._streams[request.request_id] = stream
        if request.deadline != math.inf:
            # The loop counts milliseconds and may be that much early.
            self._loop.call_later(request.deadline - time.monotonic() + 0.002, self._expire)
        self._pump()
        return stream

    def check_room(self, token_count: int) -> None:
        """Refuse a request of `token_count` tokens when the service is leaving or the queue is full."""
        if self.draining:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down; retry with backoff")
        waiting, limit = self.scheduler.waiting_count, self._config.max_waiting_requests
        if waiting >= limit:
            raise _overloaded(f"{waiting} requests are waiting, the limit is {limit}")
        tokens, limit = self.scheduler.waiting_token_count, self._config.max_waiting_tokens
        if waiting and tokens + token_count > limit:
            raise _overloaded(f"{tokens} tokens are waiting and this request has {token_count}, the limit is {limit}")

    async def wait_for_room(self) -> None:
        """Wait until the queue is at most half full, so that a batch leaves room for everybody else."""
        limit = max(1, self._config.max_waiting_requests // 2), max(1, self._config.max_waiting_tokens // 2)
        while (
            self.scheduler.waiting_count >= limit[0] or self.scheduler.waiting_token_count >= limit[1]
        ) and not self.draining:
            self._room.clear()
            await self._room.wait()

    def cancel(self, request: Request) -> None:
        """End a request that nobody wants any more; its stream, if somebody still reads it, says so."""
        if request.state is RequestState.FINISHED:
            return
        self.scheduler.cancel(request)
        self._end_stream(request, FinishReason.CANCELLED)
        self._pump()

    def _expire(self) -> None:
        for request in self.scheduler.expire(time.monotonic()):
            self._end_stream(request, FinishReason.DEADLINE)
        self._pump()

    # --- executors ----------------------------------------------------------------------------------------------

    def attached(self, link: Link, capacity: Capacity) -> None:
        """An executor is ready for plans."""
        self.scheduler.join(link.executor_id, capacity)
        self._links[link.executor_id] = link
        if link.draining:
            self.drain(link)
        self._pump()

    def lost(self, link: Link) -> None:
        """An attachment is over; its requests are planned again elsewhere, or wait for an executor."""
        if self._links.get(link.executor_id) is not link:
            return
        del self._links[link.executor_id]
        requests = self.scheduler.lose(link.executor_id)
        if requests:
            log.warning("requests wait again", executor_id=link.executor_id, request_count=len(requests))
        self._pump()

    def drain(self, link: Link) -> None:
        """An executor wants to leave."""
        if self._links.get(link.executor_id) is link:
            self.scheduler.drain(link.executor_id)
            self._pump()

    def answered(self, link: Link, result: Result) -> None:
        """A step has run: plan the next before anything else, then tell the readers.

        Raises `ProtocolError` when the executor makes no sense.
        """
        outputs = self.scheduler.apply(link.executor_id, result)
        self._pump()
        now = time.monotonic()
        stopped = False
        for request, token_id in outputs.tokens:
            stream = self._streams[request.request_id]
            stopped_at = stream.push(token_id, now)
            if stopped_at is not None:
                self.scheduler.finish(request, stopped_at, FinishReason.STOP)
                self._end_stream(request, FinishReason.STOP)
                stopped = True
        for request in outputs.finished:
            assert request.finish_reason is not None
            self._end_stream(request, request.finish_reason)
        if stopped:
            self._pump()

    def _pump(self) -> None:
        """Send plans while somebody has credit and work, and let go of executors that have drained.

        A plan for one executor may place a request on another: go round until nobody has anything new.
        """
        progress = True
        while progress:
            progress = False
            now = time.monotonic()
            for executor_id, link in self._links.items():
                while (plan := self.scheduler.plan(executor_id, now)) is not None:
                    link.send(plan)
                    progress = True
        for executor_id, link in self._links.items():
            executor = self.scheduler.executors[executor_id]
            if executor.draining and executor.is_idle:
                link.detach()
        self._room.set()

    def _end_stream(self, request: Request, reason: FinishReason) -> None:
        stream = self._streams.get(request.request_id)
        if stream is not None and stream.request is request:  # its id may be in use again
            del self._streams[request.request_id]
            stream.end(reason, time.monotonic())
            self._ended.set()

    async def drained(self) -> None:
        """Wait until no request is left. Set `draining` first."""
        self._room.set()
        while self._streams:
            self._ended.clear()
            await self._ended.wait()


def _overloaded(reason: str) -> RefusedError:
    return RefusedError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"the queue is full: {reason}; retry after a second", retry_after_s=1.0
    )
