"""The step stream, seen from the scheduler: one attachment after the other to one executor process."""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from collections.abc import Callable
from typing import Protocol

import grpc
import structlog

from common.grpc_servers import open_channel
from common.processes import PROTOCOL_VERSION
from paceline.internal.v1 import executor_pb2 as pb
from paceline.internal.v1 import executor_pb2_grpc
from scheduler_svc import wire
from scheduler_svc.core.plan import Capacity, Plan, ProtocolError, Result

log = structlog.get_logger()

_ATTACH_TIMEOUT_S = 5.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 1.0
_EXPECTED_STEP_FACTOR = 20


class LinkEvents(Protocol):
    """What a link tells; the engine."""

    def attached(self, link: ExecutorLink, capacity: Capacity) -> None:
        """The executor is ready for plans."""

    def answered(self, link: ExecutorLink, result: Result) -> None:
        """A step has run."""

    def lost(self, link: ExecutorLink) -> None:
        """The attachment is over."""


class ExecutorLink:
    """Keeps one executor process attached: dials, attaches, sends plans, reads results, dials again."""

    def __init__(
        self,
        executor_id: str,
        incarnation: int,
        address: str,
        capacity: Capacity,
        owner: tuple[int, str],
        events: LinkEvents,
        clock: Callable[[], float],
    ) -> None:
        """Prepare a link; `owner` is the scheduler's epoch and its random name."""
        self.executor_id = executor_id
        self.is_attached = False
        self.draining = False  # the executor has said that it wants to leave
        self._incarnation = incarnation
        self._address = address
        self._capacity = capacity
        self._epoch, self._scheduler_id = owner
        self._events = events
        self._clock = clock
        self._outgoing: asyncio.Queue[pb.SchedulerMessage] = asyncio.Queue()
        self._unanswered: deque[bool] = deque()  # for each plan on its way: whether it goes on with requests
        self._step_began_at: float | None = None  # when the oldest unanswered plan became the oldest
        self._busy_us = self._starved_us = 0  # since the link was made
        self._step_times_us: deque[int] = deque(maxlen=64)
        self.answered_step = 0
        self._detached = False
        self._opened = False  # whether the last attachment was ever open

    @property
    def step_us(self) -> int:
        """Median time of the last steps on the executor; 0 before the first."""
        return round(statistics.median(self._step_times_us)) if self._step_times_us else 0

    @property
    def idle_share(self) -> float:
        """Share of the time, 0 to 1, in which the executor had requests to go on with and no plan."""
        return self._starved_us / max(1, self._starved_us + self._busy_us)

    def is_wedged(self, now: float, least_s: float) -> bool:
        """Whether a step takes so long that the device must be stuck: 20 times the usual, and at least `least_s`."""
        limit_s = max(least_s, _EXPECTED_STEP_FACTOR * self.step_us / 1e6)
        return self._step_began_at is not None and now - self._step_began_at > limit_s

    def send(self, plan: Plan) -> None:
        """Put a plan on its way."""
        message = self._message(plan=wire.encode_plan(plan))
        if not self._unanswered:
            self._step_began_at = self._clock()
        self._unanswered.append(plan.request_count > len(plan.new_requests))
        self._outgoing.put_nowait(message)

    def detach(self) -> None:
        """Tell the executor that nothing is left on it, once."""
        if not self._detached:
            self._detached = True
            self._outgoing.put_nowait(self._message(detach=pb.Detach()))

    async def keep(self) -> None:
        """Attach, and attach again whenever the stream ends, until cancelled."""
        pause_s, told = _FIRST_RETRY_S, ""
        async with open_channel(self._address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            while not self._detached:
                self._opened = False
                reason = await self._attach(stub)
                if self._opened:
                    pause_s = _FIRST_RETRY_S
                if not self._detached:
                    if self._opened or reason != told:  # that it still does not answer is no news
                        event = "executor detached" if self._opened else "executor does not answer"
                        log.warning(event, executor_id=self.executor_id, address=self._address, reason=reason)
                    told = reason
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LAST_RETRY_S)

    async def _attach(self, stub: executor_pb2_grpc.ExecutorServiceAsyncStub) -> str:
        """Serve one attachment; returns why it ended."""
        self._outgoing = asyncio.Queue()
        self._unanswered.clear()
        self.answered_step = 0
        call = stub.Attach()
        sending = None
        try:
            await call.write(self._message(attach=self._attach_request()))
            first = await asyncio.wait_for(call.read(), _ATTACH_TIMEOUT_S)
            self._check(first, "attached")
            log.info("executor attached", executor_id=self.executor_id, address=self._address)
            sending = asyncio.create_task(self._send_messages(call))
            self.is_attached = self._opened = True
            self._events.attached(self, self._capacity)
            while (message := await call.read()) is not grpc.aio.EOF:
                self._take_result(self._check(message, "result"))
            return _reason(await call.code(), await call.details())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            return _reason(await call.code(), await call.details()) if call.done() else str(error)
        except TimeoutError:
            return f"no answer to attach within {_ATTACH_TIMEOUT_S} s"
        except ProtocolError as error:
            log.error("executor makes no sense", executor_id=self.executor_id, reason=str(error))
            return str(error)
        except Exception as error:
            # A bug, here or there. It costs this attachment and nobody else anything.
            log.exception("attachment failed", executor_id=self.executor_id)
            return repr(error)
        finally:
            self.is_attached = False
            self._step_began_at = None
            call.cancel()
            if sending is not None:
                sending.cancel()
            self._events.lost(self)

    def _take_result(self, message: pb.ExecutorMessage) -> None:
        timings = message.result.timings
        if not self._unanswered:
            raise ProtocolError(f"result of step {message.result.step}, but no plan is in flight")
        goes_on = self._unanswered.popleft()
        busy_us = timings.prepare_us + timings.forward_us + timings.sample_us
        self._step_times_us.append(busy_us)
        self._busy_us += busy_us
        self._starved_us += timings.idle_us if goes_on else 0
        self._step_began_at = self._clock() if self._unanswered else None
        self.answered_step = message.result.step
        self._events.answered(self, wire.decode_result(message.result))

    def _check(self, message: object, kind: str) -> pb.ExecutorMessage:
        """Refuse what another process, another attachment or a bug sent."""
        if not isinstance(message, pb.ExecutorMessage):
            raise asyncio.InvalidStateError("the stream ended before the executor was attached")
        if message.incarnation != self._incarnation or message.epoch != self._epoch:
            raise ProtocolError(
                f"message of incarnation {message.incarnation} for epoch {message.epoch}, but this attachment is "
                f"with incarnation {self._incarnation} and epoch {self._epoch}"
            )
        if message.WhichOneof("message") != kind:
            raise ProtocolError(f"message '{message.WhichOneof('message')}' where only '{kind}' may come")
        return message

    async def _send_messages(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            while True:
                message = await self._outgoing.get()
                await call.write(message)
                if message.WhichOneof("message") == "detach":
                    await call.done_writing()
                    return
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream is over; whoever reads from it learns why

    def _attach_request(self) -> pb.AttachRequest:
        return pb.AttachRequest(protocol_version=PROTOCOL_VERSION, scheduler_id=self._scheduler_id)

    def _message(
        self,
        attach: pb.AttachRequest | None = None,
        plan: pb.Plan | None = None,
        detach: pb.Detach | None = None,
    ) -> pb.SchedulerMessage:
        return pb.SchedulerMessage(
            epoch=self._epoch, incarnation=self._incarnation, attach=attach, plan=plan, detach=detach
        )


def _reason(code: grpc.StatusCode, details: str | None) -> str:
    return f"{code.name}: {details}" if details else code.name
