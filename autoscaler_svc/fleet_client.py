"""What the autoscaler asks of the scheduler: the right to act, and to drain an executor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc
import structlog

from common.grpc_servers import open_channel
from paceline.v1 import fleet_pb2, fleet_pb2_grpc

log = structlog.get_logger()

_TIMEOUT_S = 2.0
_RENEW_EVERY_S = 0.5  # a tenth of the lease: the scheduler refuses by what it was told last
_LONGEST_START_S = 86400.0
_START_UP_S = 8.0


class FleetError(Exception):
    """The scheduler could not be asked, or refused; the message says what and why."""


class FleetClient:
    """One autoscaler, as its scheduler knows it."""

    def __init__(self, scheduler: str, holder_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Ask the scheduler at that address, under that name."""
        self._channel = open_channel(scheduler)
        self._stub = fleet_pb2_grpc.FleetServiceStub(self._channel)
        self._holder_id = holder_id
        self._clock = clock
        self._began_at = clock()
        self._held_until = 0.0
        self._starting_count, self._next_ready_s = 0, 0.0
        self._told = ""
        self.metrics_address = ""  # where Prometheus finds this autoscaler; "": nowhere
        self._decision: fleet_pb2.ScalingDecision | None = None

    def show(self, wanted: int, reason: str, changed_at: float, cost_per_hour: float) -> None:
        """Have operators see, with the next renewal, what was decided; `changed_at` in seconds since 1970."""
        self._decision = fleet_pb2.ScalingDecision(
            wanted_executor_count=wanted,
            reason=reason,
            changed_unix_ms=round(1000 * changed_at),
            cost_per_hour=cost_per_hour,
        )

    @property
    def may_act(self) -> bool:
        """Whether this autoscaler has the right to add and remove executors, at this moment."""
        return self._clock() < self._held_until

    def tell(self, starting_count: int, next_ready_s: float) -> None:
        """What is to come, for the next renewal: executors that are being started, and the least seconds until one is
        ready, 0: unknown.
        """
        self._starting_count, self._next_ready_s = starting_count, min(next_ready_s, _LONGEST_START_S)

    async def keep(self) -> None:
        """Renew the right to act until cancelled, whatever else is slow."""
        while True:
            await self.renew()
            await asyncio.sleep(_RENEW_EVERY_S)

    async def renew(self) -> bool:
        """Take the right to act or keep it; returns whether this autoscaler has it.

        It counts from before the call: what the scheduler counts from is later, and so ends later.
        """
        request = fleet_pb2.LeaseScalingRequest(
            holder_id=self._holder_id,
            starting_executor_count=self._starting_count,
            next_ready_ms=round(self._next_ready_s * 1000),
            decision=self._decision,
            metrics_address=self.metrics_address,
        )
        asked_at = self._clock()
        try:
            response = await self._stub.LeaseScaling(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self._note(f"{error.code().name}: {error.details()}")
            return self.may_act
        self._held_until = asked_at + response.lease_ms / 1000
        self._note("")
        return self.may_act

    def _note(self, reason: str) -> None:
        """Say it once when the right to act cannot be had, and once when it can."""
        if reason == self._told:
            return
        is_starting = self._clock() - self._began_at < _START_UP_S  # one that died holds it for some seconds
        if reason and not is_starting:
            log.warning("may not act", reason=reason)
        elif not reason and self._told:
            log.info("may act again")
        self._told = "" if is_starting else reason

    async def drain(self, executor_id: str, finish_within_s: float) -> None:
        """Let an executor finish and go. One that is gone is no error. Raises `FleetError`."""
        request = fleet_pb2.DrainRequest(executor_id=executor_id, finish_within_s=round(finish_within_s))
        try:
            await self._stub.Drain(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise FleetError(f"cannot drain {executor_id}: {error.code().name}: {error.details()}") from error

    async def close(self) -> None:
        """Give the right to act back, so that nobody has to wait for its end."""
        if self.may_act:
            self._held_until = 0.0
            request = fleet_pb2.LeaseScalingRequest(holder_id=self._holder_id, release=True)
            try:
                await self._stub.LeaseScaling(request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.info("could not give the right to act back; it ends by itself", reason=error.details())
        await self._channel.close()
