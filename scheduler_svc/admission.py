"""The way in: from the message of a caller to the reader of an answer, held at the door where that is needed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass

import grpc

from common.errors import RefusedError, shown
from paceline.v1 import inference_pb2 as pb
from scheduler_svc.answers import Answer, Reader, data_loss
from scheduler_svc.arrivals import Arrival, Hold
from scheduler_svc.door import Door, content_hash, operation_of, positions_of, request_id_of
from scheduler_svc.engine import EARLY_S, Engine
from scheduler_svc.fleet import Fleet
from scheduler_svc.interceptors import FailedError, mistake, traceparent
from scheduler_svc.refusals import hung_up, reason_of
from scheduler_svc.scaling_lease import ScalingLease

_LOOK_EVERY_S = 0.1  # whether an autoscaler is still there, and somebody still wants the answer

# How a request that was turned away at the door would have ended, had it been accepted.
_OUTCOMES = {
    "cancelled": "cancelled",
    "deadline": "deadline",
    "leaving": "cut off",
    "no_executor": "cut off",
    "internal": "error",
}

_UNKNOWN = (
    "its result has expired, nobody came back for it in time, or the scheduler was restarted without its journal or "
    "with another model"
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who brings a request."""

    method: str
    deadline: float  # on the clock of the event loop
    waits: bool  # for room in a full queue, instead of being refused

    @classmethod
    def of(cls, context: grpc.aio.ServicerContext, method: str, *, waits: bool = False) -> Caller:
        """Whoever called `method` of the service."""
        remaining_s = context.time_remaining()
        return cls(method, math.inf if remaining_s is None else time.monotonic() + remaining_s, waits)


class Admission:
    """Lets requests in, or finds the answers of those that are in already."""

    def __init__(self, door: Door, engine: Engine, fleet: Fleet, scaling: ScalingLease) -> None:
        """What passes `door` goes to `engine`; `fleet` and `scaling` say whether there is anybody to compute it."""
        self._door = door
        self._engine = engine
        self._fleet = fleet
        self._scaling = scaling

    async def accept(self, message: pb.GenerateRequest, caller: Caller) -> Reader:
        """Let a request in, or read one that is in already. Raises `RefusedError`, or `FailedError` for a mistake of
        ours.
        """
        trace = self._engine.observer.tracing.accept(traceparent())
        arrival = Arrival(shown(message.request_id), time.monotonic(), trace, operation_of(message), caller.method)
        try:
            return await self._accept(message, arrival, caller)
        except RefusedError as error:
            self._turn_away(arrival, error)
            raise
        except Exception as error:
            self._turn_away(arrival, mistake(f"request '{arrival.request_id}'", error))
            raise FailedError(arrival.request_id, trace.trace_id.hex()) from error

    async def _accept(self, message: pb.GenerateRequest, arrival: Arrival, caller: Caller) -> Reader:
        request_id, positions = request_id_of(message), positions_of(message)
        arrival.request_id = request_id
        answer = await self._engine.known(request_id, content_hash(message)) if message.request_id else None
        if answer is None and positions:
            raise data_loss(request_id, _UNKNOWN)
        if answer is None:
            answer = await self._arrive(message, arrival, caller)
        return await self._read(answer, positions)

    def refused(self, error: RefusedError) -> RefusedError:
        """Count a request that is not let in."""
        self._engine.meter.note_refused(reason_of(error))
        return error

    async def _read(self, answer: Answer, positions: dict[int, tuple[int, int]]) -> Reader:
        """Nothing is told before it is written down."""
        reader = self._engine.answers.read(answer, positions)
        try:
            await self._engine.durable()
        except BaseException:
            self._engine.answers.leave(reader)
            raise
        return reader

    async def _arrive(self, message: pb.GenerateRequest, arrival: Arrival, caller: Caller) -> Answer:
        """Let it in, unless its caller hangs up before that."""
        with self._engine.arrivals.arriving(arrival):
            try:
                return await self._let_in(message, arrival, caller)
            except asyncio.CancelledError:
                is_late = time.monotonic() > caller.deadline - EARLY_S
                held_for = arrival.held_for[-1] if arrival.held_for else ""
                self._turn_away(arrival, hung_up(arrival.request_id, held_for, is_late=is_late))
                raise

    async def _let_in(self, message: pb.GenerateRequest, arrival: Arrival, caller: Caller) -> Answer:
        if not caller.waits:
            self._engine.check_room(0)  # before the work of tokenizing
        self._refuse_hopeless(arrival.request_id, caller.deadline)
        if self._fleet.limits is None and self._scaling.is_expected(time.monotonic()):
            await self._wait_for_first_executor(arrival)
        request, texts, terms = await self._door.request(
            message, arrival.request_id, self._fleet.limits, caller.deadline, arrival.trace, caller.method
        )
        if caller.waits:
            await self._engine.wait_for_room(arrival, len(request.token_ids))
        return self._engine.submit(request, texts, terms, arrival)

    def _turn_away(self, arrival: Arrival, error: RefusedError) -> None:
        """Count a request that is not let in, and let it be seen."""
        reason, observer = reason_of(self.refused(error)), self._engine.observer
        if reason == "internal" or (arrival.held_for and reason in _OUTCOMES):
            observer.on_turned_away(arrival, _OUTCOMES[reason], error.message)
        else:  # whoever is told at once what is wrong has nothing to ask
            observer.on_refused(arrival, error, reason)

    def _refuse_hopeless(self, request_id: str, deadline: float) -> None:
        """Tell at once who cannot be served in time: the next executor is still to be started."""
        now = time.monotonic()
        wait_s = self._scaling.least_wait_s(now)
        if wait_s and deadline < now + wait_s and not self._fleet.has_any:
            raise RefusedError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"request '{request_id}' has {max(0.0, deadline - now):.1f} s left, but no executor is there and the "
                f"next one takes requests in {wait_s:.1f} s at the earliest; allow more time",
            )

    async def _wait_for_first_executor(self, arrival: Arrival) -> None:
        """Hold a request that came before the first executor, as long as an autoscaler is there that will start one:
        only executors know how many tokens the model takes. Raises `RefusedError` when it was cancelled meanwhile.
        """
        with self._engine.arrivals.held(arrival, Hold.EXECUTOR):
            while not self._fleet.limits_known.is_set() and self._scaling.is_expected(time.monotonic()):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._fleet.limits_known.wait(), _LOOK_EVERY_S)
                self._engine.check_arriving(arrival)
