"""The step stream, seen from the scheduler: one attachment after the other to one executor process."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import grpc
import structlog

from common.grpc_servers import open_channel
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc import wire
from scheduler_svc.core.plan import Capacity, Inventory, Plan, ProtocolError, Result
from scheduler_svc.core.request import Request
from scheduler_svc.observation.step_meter import StepMeter

log = structlog.get_logger()

_ATTACH_TIMEOUT_S = 30.0  # the step that runs there ends first; that the process lives, its lease says
_RETURN_S = 0.5  # how long an executor that was cut off may take to answer before its requests go elsewhere
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 1.0
_EXPECTED_STEP_FACTOR = 20
_ATTACH = f"/{pb.DESCRIPTOR.services_by_name['ExecutorService'].full_name}/Attach"


# What gRPC makes of a line that broke, or a process that ended.
_OF_THE_LINE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

# Nobody listens at the address. An address that does not answer says nothing: the line may be cut.
_IS_DEAD = re.compile(r"Connection refused|No such file or directory")


@dataclass(slots=True)
class _Ending:
    """How an attachment ended, or why there was none."""

    reason: str
    may_return: bool = True  # the stream broke off: the process may have all that it had
    is_dead: bool = False  # the process is gone, or will be
    is_to_blame: bool = False  # one side has a bug; a request may have brought it up
    is_fenced: bool = False  # a scheduler with a higher epoch has taken over
    was_open: bool = False


class LinkEvents(Protocol):
    """What a link tells; the engine."""

    def find(self, request_id: str, choice: int) -> Request | None:
        """A choice of a request that has not ended, if it is known."""

    def attached(self, link: ExecutorLink, capacity: Capacity, inventory: Inventory) -> None:
        """The executor is ready for plans, with what it still has."""

    def fenced(self, reason: str) -> None:
        """Another scheduler, with a higher epoch, has taken over."""

    def started(self, link: ExecutorLink, step: int) -> None:
        """A step that was to be announced begins."""

    def answered(self, link: ExecutorLink, result: Result) -> None:
        """A step has run."""

    def lost(self, link: ExecutorLink, *, died: bool = False, may_return: bool = False) -> None:
        """The attachment is over; or, where it might have returned, it is not waited for any longer."""


class ExecutorLink:
    """Keeps one executor process attached: dials, attaches, sends plans, reads results, dials again."""

    def __init__(
        self,
        executor_id: str,
        incarnation: int,
        address: str,
        capacity: Capacity,
        owner: tuple[int, str],
        protocol_version: int,
        events: LinkEvents,
        clock: Callable[[], float],
    ) -> None:
        """Prepare a link; `owner` is the scheduler's epoch and its random name."""
        self.executor_id = executor_id
        self.is_attached = False
        self.draining = False  # the executor has said that it wants to leave
        self.incarnation = incarnation
        self._address = address
        self._capacity = capacity
        self._epoch, self._scheduler_id = owner
        self._protocol_version = protocol_version
        self._events = events
        self._clock = clock
        self._outgoing: asyncio.Queue[pb.SchedulerMessage] = asyncio.Queue()
        self._unanswered: deque[tuple[bool, float]] = deque()  # plans: whether it goes on with requests; sent when
        self._step_began_at: float | None = None  # when the oldest unanswered plan became the oldest
        self.steps = StepMeter()
        self.answered_step = 0
        self._acknowledged_step = 0  # to be told with the next plan; 0: was told
        self._detached = False
        self._channel: grpc.aio.Channel | None = None
        self._returning: asyncio.TimerHandle | None = None  # while it may be back in a moment
        self._forgets = False  # what the executor has makes no sense: it is to forget it

    @property
    def step_us(self) -> int:
        """Median time of the last steps on the executor; 0 before the first."""
        return round(1e6 * self.steps.median_s)

    @property
    def idle_share(self) -> float:
        """Share of the time since it joined, 0 to 1, in which it had requests to go on with and no plan."""
        return self.steps.idle_share

    def is_wedged(self, now: float, least_s: float) -> bool:
        """Whether a step takes so long that the device must be stuck: 20 times the usual, and at least `least_s`."""
        limit_s = max(least_s, _EXPECTED_STEP_FACTOR * self.step_us / 1e6)
        return self._step_began_at is not None and now - self._step_began_at > limit_s

    def send(self, plan: Plan) -> None:
        """Put a plan on its way."""
        message = self._message(plan=wire.encode_plan(plan, self._acknowledged_step))
        self._acknowledged_step = 0
        self.steps.token_count += plan.token_count
        now = self._clock()
        if not self._unanswered:
            self._step_began_at = now
        self._unanswered.append((plan.request_count > len(plan.new_requests), now))
        self._outgoing.put_nowait(message)

    def acknowledge(self, step: int) -> None:
        """Tell the executor, with the next plan, that it need not tell the tokens up to this step again."""
        self._acknowledged_step = step

    def detach(self) -> None:
        """Tell the executor that nothing is left on it, once."""
        if not self._detached:
            self._detached = True
            self._outgoing.put_nowait(self._message(detach=pb.Detach()))

    async def keep(self) -> None:
        """Attach, and attach again whenever the stream ends, until cancelled."""
        try:
            await self._keep()
        finally:
            if self._returning is not None:
                self._returning.cancel()

    async def _keep(self) -> None:
        pause_s, told = 0.0, ""
        async with open_channel(self._address) as self._channel:
            open_stream = self._channel.stream_stream(
                _ATTACH, request_serializer=self._to_bytes, response_deserializer=self._from_bytes
            )
            while not self._detached:
                ending = await self._attach(open_stream)
                if self._detached:
                    return
                if ending.was_open or ending.reason != told:  # that it still does not answer is no news
                    event = "executor detached" if ending.was_open else "executor does not answer"
                    log.warning(event, executor_id=self.executor_id, address=self._address, reason=ending.reason)
                told = ending.reason
                if ending.was_open:
                    pause_s = 0.0 if ending.may_return else _FIRST_RETRY_S
                await asyncio.sleep(pause_s)
                pause_s = min(max(_FIRST_RETRY_S, 2 * pause_s), _LAST_RETRY_S)

    def _to_bytes(self, message: pb.SchedulerMessage) -> bytes:
        """As the stub of `ExecutorService` does it, and counted on the way: to ask a message for its size writes it."""
        data = message.SerializeToString()
        self.steps.sent_byte_count += len(data)
        return data

    def _from_bytes(self, data: bytes) -> pb.ExecutorMessage:
        self.steps.received_byte_count += len(data)
        return pb.ExecutorMessage.FromString(data)

    async def _attach(self, open_stream: grpc.aio.StreamStreamMultiCallable) -> _Ending:
        """Serve one attachment; returns how it ended."""
        self._outgoing = asyncio.Queue()
        self._unanswered.clear()
        self.answered_step = self._acknowledged_step = 0
        call = open_stream()
        tasks: list[asyncio.Task[None]] = []
        ending = _Ending("the link was closed", may_return=False)
        try:
            await call.write(self._message(attach=self._attach_request()))
            async with asyncio.timeout(_ATTACH_TIMEOUT_S):  # no task of its own, whose error nobody would ask for
                first = self._check(await call.read(), "attached")
            log.info("executor attached", executor_id=self.executor_id, address=self._address)
            self._open(first.attached)
            tasks.append(asyncio.create_task(self._send_messages(call)))
            while (message := await call.read()) is not grpc.aio.EOF:
                self._take(self._check(message, "result", "started"))
            ending = _ending_of(await call.code(), await call.details())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            ending = _ending_of(await call.code(), await call.details()) if call.done() else _Ending(str(error))
        except TimeoutError:
            ending = _Ending(f"no answer to attach within {_ATTACH_TIMEOUT_S} s", may_return=False)
        except ProtocolError as error:
            log.error("executor makes no sense", executor_id=self.executor_id, reason=str(error))
            ending = _Ending(str(error), may_return=False, is_to_blame=True)
        except Exception as error:
            # A bug, here or there. It costs this attachment and nobody else anything.
            log.exception("attachment failed", executor_id=self.executor_id)
            ending = _Ending(repr(error), may_return=False, is_to_blame=True)
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            self._close(ending)
        return ending

    def _open(self, attached: pb.Attached) -> None:
        if self._returning is not None:
            self._returning.cancel()
        self.is_attached = True
        self._events.attached(self, self._capacity, wire.decode_inventory(attached, self._events.find))
        self._forgets = False

    def _close(self, ending: _Ending) -> None:
        """Tell what became of the attachment; where it ended by itself, the executor may be back in a moment."""
        ending.was_open, self.is_attached = self.is_attached, False
        self._step_began_at = None
        if ending.is_fenced:
            self._events.fenced(ending.reason)
        self._forgets = self._forgets or ending.is_to_blame
        is_over = not ending.may_return or ending.is_dead or self._detached
        if ending.was_open or is_over:
            self._events.lost(self, died=ending.is_to_blame or ending.is_dead, may_return=not is_over)
        if ending.was_open and not is_over:
            self._watch_return()

    def _wait_no_longer(self) -> None:
        """The executor does not answer: whether it has died or the line is cut, its requests go elsewhere.

        One that is connected does: it says what it has when its step has ended.
        """
        is_connected = self._channel is not None and self._channel.get_state() is grpc.ChannelConnectivity.READY
        if is_connected and not self.is_attached:
            self._watch_return()
        elif not self.is_attached:
            self._events.lost(self)

    def _watch_return(self) -> None:
        self._returning = asyncio.get_running_loop().call_later(_RETURN_S, self._wait_no_longer)

    def _take(self, message: pb.ExecutorMessage) -> None:
        if message.WhichOneof("message") == "started":
            self._events.started(self, message.started.step)
        else:
            self._take_result(message)

    def _take_result(self, message: pb.ExecutorMessage) -> None:
        if not self._unanswered:
            raise ProtocolError(f"result of step {message.result.step}, but no plan is in flight")
        now = self._clock()
        goes_on, sent_at = self._unanswered.popleft()
        self.steps.note(wire.decode_phases(message.result.timings), goes_on=goes_on, away_s=now - sent_at)
        self._step_began_at = now if self._unanswered else None
        self.answered_step = message.result.step
        self._events.answered(self, wire.decode_result(message.result))

    def _check(self, message: object, *kinds: str) -> pb.ExecutorMessage:
        """Refuse what another process, another attachment or a bug sent."""
        if not isinstance(message, pb.ExecutorMessage):
            raise asyncio.InvalidStateError("the stream ended before the executor was attached")
        if message.incarnation != self.incarnation or message.epoch != self._epoch:
            raise ProtocolError(
                f"message of incarnation {message.incarnation} for epoch {message.epoch}, but this attachment is "
                f"with incarnation {self.incarnation} and epoch {self._epoch}"
            )
        if message.WhichOneof("message") not in kinds:
            raise ProtocolError(f"message '{message.WhichOneof('message')}' where only '{kinds[0]}' may come")
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
        return pb.AttachRequest(
            protocol_version=self._protocol_version, scheduler_id=self._scheduler_id, resume=not self._forgets
        )

    def _message(
        self,
        attach: pb.AttachRequest | None = None,
        plan: pb.Plan | None = None,
        detach: pb.Detach | None = None,
    ) -> pb.SchedulerMessage:
        return pb.SchedulerMessage(
            epoch=self._epoch, incarnation=self.incarnation, attach=attach, plan=plan, detach=detach
        )


def _ending_of(code: grpc.StatusCode, details: str | None) -> _Ending:
    """What the status of the call says of the executor."""
    reason = f"{code.name}: {details}" if details else code.name
    if code is grpc.StatusCode.INVALID_ARGUMENT:  # it cannot follow our plans
        return _Ending(reason, may_return=False, is_to_blame=True)
    if code in (grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION):  # another scheduler has it
        is_dead = "incarnation" in (details or "")  # ... or another process has its address
        return _Ending(reason, may_return=False, is_dead=is_dead, is_fenced="is stale" in (details or ""))
    if code is grpc.StatusCode.INTERNAL:  # its device is broken, and the process ends
        return _Ending(reason, may_return=False, is_dead=True)
    if code in _OF_THE_LINE or "Stream removed" in (details or ""):
        return _Ending(reason, is_dead=_IS_DEAD.search(details or "") is not None)
    return _Ending(reason, may_return=False, is_to_blame=True)  # it answered, with an error that it should not make
