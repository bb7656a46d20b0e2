"""The live scheduler: feeds events to the core, sends its plans, hands its outputs to their readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import grpc
import structlog

from common.errors import RefusedError, invalid
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.core.plan import Capacity, NeverFitsError, Plan, Result
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.request import FinishReason, Request, RequestState
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.output_stream import Answer, OutputStream
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
        policy = make_policy(
            config.policy, input_weight=config.fair_input_weight, output_weight=config.fair_output_weight
        )
        self.scheduler = Scheduler(policy, reuse=config.prefix_reuse)
        self.draining = False
        self._config = config
        self._streams: dict[Request, OutputStream] = {}  # of every choice that has not ended
        self._links: dict[str, Link] = {}
        self._loop = asyncio.get_running_loop()
        self._arriving: dict[str, bool] = {}  # ids at the door; True once somebody cancelled it
        self._expiry: asyncio.TimerHandle | None = None  # for the next moment of the core's, or earlier
        self._room = asyncio.Event()  # set whenever the queue may have become shorter
        self._ended = asyncio.Event()  # set whenever a request ended

    # --- requests -----------------------------------------------------------------------------------------------

    @contextmanager
    def arriving(self, request_id: str) -> Iterator[None]:
        """Hold an id while its request is at the door, so that it can be cancelled there and is not used twice."""
        if request_id in self._arriving or self.scheduler.get(request_id) is not None:
            raise RefusedError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"a request with the id '{request_id}' is running; choose another request_id",
            )
        self._arriving[request_id] = False
        try:
            yield
        finally:
            del self._arriving[request_id]

    def submit(self, request: Request, texts: Sequence[TextStream]) -> Answer:
        """Accept a request that is `arriving`, or refuse it at once; `texts` are those of its choices."""
        if self._arriving[request.request_id]:
            raise RefusedError(grpc.StatusCode.CANCELLED, f"request '{request.request_id}' was cancelled")
        self.check_room(len(request.token_ids))
        try:
            self.scheduler.add(request)
        except NeverFitsError as error:
            raise invalid(str(error)) from error
        answer = Answer(request, texts, time.monotonic())
        self._streams.update(zip(request.family, answer.streams, strict=True))
        self._watch_deadlines()
        self._pump()
        return answer

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

    async def wait_for_room(self, token_count: int) -> None:
        """Wait until the queue has room for this in its first half: a batch leaves the rest to everybody else."""
        scheduler, config = self.scheduler, self._config
        while (
            scheduler.waiting_count
            and (
                scheduler.waiting_count >= config.max_waiting_requests // 2
                or scheduler.waiting_token_count + token_count > config.max_waiting_tokens // 2
            )
            and not self.draining
        ):
            self._room.clear()
            await self._room.wait()

    def cancel_id(self, request_id: str) -> None:
        """End the request of that id, if there is one."""
        if request_id in self._arriving:
            self._arriving[request_id] = True
        elif (request := self.scheduler.get(request_id)) is not None:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """End a request that nobody wants any more; its answer, if somebody still reads it, says so."""
        if request.has_ended:
            return
        ending = [choice for choice in request.family if choice.state is not RequestState.FINISHED]
        self.scheduler.cancel(request)
        for choice in ending:
            self._end_stream(choice, FinishReason.CANCELLED)
        self._pump()

    def _watch_deadlines(self) -> None:
        """Have the timer ring when a deadline passes, or cannot be met any more."""
        moment = self.scheduler.next_moment
        if moment is None:
            return
        wait_s = moment - time.monotonic() + 0.002  # the loop counts milliseconds and may be that much early
        if self._expiry is None or self._expiry.when() > self._loop.time() + wait_s:
            if self._expiry is not None:
                self._expiry.cancel()
            self._expiry = self._loop.call_later(wait_s, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        for request in self.scheduler.expire(time.monotonic()):
            self._end_stream(request, FinishReason.DEADLINE)
        self._watch_deadlines()
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
        """An executor wants to leave. One that leaves together with the scheduler is still needed for what waits."""
        if self._links.get(link.executor_id) is link and not self.draining:
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
            stream = self._streams[request]
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
        stream = self._streams.pop(request, None)
        if stream is not None:
            stream.end(reason, time.monotonic())
            self._ended.set()

    async def drain_all(self, timeout_s: float) -> None:
        """Refuse new requests, and wait until those accepted have ended; cut off what has not after `timeout_s`."""
        self.draining = True
        for executor_id in self._links:
            self.scheduler.drain(executor_id, draining=False)
        self._pump()
        try:
            async with asyncio.timeout(timeout_s):
                while self._streams:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            log.warning("requests are cut off", request_count=self.scheduler.request_count)
            for request in list(self._streams):
                self.scheduler.finish(request, request.output_count, FinishReason.CUT_OFF)
                self._end_stream(request, FinishReason.CUT_OFF)


def _overloaded(reason: str) -> RefusedError:
    return RefusedError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"the queue is full: {reason}; retry after a second", retry_after_s=1.0
    )
