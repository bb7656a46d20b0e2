"""`FleetService`: what executors, operators and autoscalers ask."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import grpc
import structlog

from common.errors import RefusedError, invalid, shown
from paceline.v1 import fleet_pb2, fleet_pb2_grpc
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet, check_name, describe
from scheduler_svc.journal.journal import Durability, Journal
from scheduler_svc.load import load_of
from scheduler_svc.load_meter import LoadWatcher
from scheduler_svc.scaling_lease import LEASE_S, ScalingLease

log = structlog.get_logger()

DURABILITIES = {
    Durability.OFF: fleet_pb2.DURABILITY_OFF,
    Durability.ON: fleet_pb2.DURABILITY_ON,
    Durability.LOST: fleet_pb2.DURABILITY_LOST,
}
_INTERVAL_MS, _LEAST_INTERVAL_MS, _LARGEST_INTERVAL_MS = 1000, 100, 60_000
_BURST_S = 0.05
"""Least time between two messages: a burst of requests is one piece of news."""


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """Serves executors, operators and the autoscaler."""

    def __init__(self, fleet: Fleet, engine: Engine, journal: Journal, scaling: ScalingLease, model: str) -> None:
        """Serve `fleet`, which runs `model`."""
        self._fleet = fleet
        self._engine = engine
        self._journal = journal
        self._scaling = scaling
        self._model = model
        self._leaving = asyncio.Event()

    async def Join(self, request: fleet_pb2.JoinRequest, context: grpc.aio.ServicerContext) -> fleet_pb2.JoinResponse:
        """Take an executor up or renew its lease."""
        try:
            return self._fleet.join(request)
        except RefusedError as error:
            log.warning("executor refused", executor_id=request.executor_id, reason=error.message)
            raise

    async def ListExecutors(
        self,
        request: fleet_pb2.ListExecutorsRequest,
        context: grpc.aio.ServicerContext,
    ) -> fleet_pb2.ListExecutorsResponse:
        """Show the fleet."""
        members = sorted(self._fleet.members.values(), key=lambda member: member.joined.executor_id)
        return fleet_pb2.ListExecutorsResponse(
            executors=[describe(member, self._engine) for member in members],
            waiting_request_count=self._engine.waiting_count,
            epoch=self._fleet.epoch,
            durability=DURABILITIES[self._journal.durability],
            journal_bytes=self._journal.byte_count,
            scaling_holder_id=self._scaling.holder(time.monotonic()),
        )

    async def Drain(
        self, request: fleet_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> fleet_pb2.DrainResponse:
        """Take an executor out of service."""
        self._fleet.drain(request.executor_id, request.finish_within_s)
        return fleet_pb2.DrainResponse()

    async def WatchLoad(
        self, request: fleet_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[fleet_pb2.WatchLoadResponse]:
        """Tell the load again and again, until the scheduler leaves."""
        interval_ms = request.interval_ms or _INTERVAL_MS
        if not _LEAST_INTERVAL_MS <= interval_ms <= _LARGEST_INTERVAL_MS:
            limits = f"{_LEAST_INTERVAL_MS} to {_LARGEST_INTERVAL_MS}"
            raise invalid(f"interval_ms is {interval_ms}, must be {limits}")
        watcher = LoadWatcher(request.first_token_target_ms / 1e3, request.per_token_target_us / 1e6)
        with self._engine.meter.watching(watcher):
            while not self._leaving.is_set():
                yield load_of(self._model, self._fleet, self._engine, watcher)
                await self._pause(watcher, interval_ms / 1e3)

    async def _pause(self, watcher: LoadWatcher, seconds: float) -> None:
        """Wait until the next message is due: at the interval, or when there is news that cannot wait for it."""
        await asyncio.sleep(_BURST_S)
        waits = [asyncio.create_task(event.wait()) for event in (watcher.is_urgent, self._leaving)]
        try:
            await asyncio.wait(waits, timeout=seconds - _BURST_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await wait
        watcher.is_urgent.clear()

    async def LeaseScaling(
        self, request: fleet_pb2.LeaseScalingRequest, context: grpc.aio.ServicerContext
    ) -> fleet_pb2.LeaseScalingResponse:
        """Let one autoscaler act."""
        now, holder = time.monotonic(), request.holder_id
        check_name("holder_id", holder)
        if self._engine.draining:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down; keep calling")
        if request.release:
            self._scaling.give_back(holder, now)
            return fleet_pb2.LeaseScalingResponse(lease_ms=0)
        before = self._scaling.holder(now)
        if not self._scaling.take(holder, now, request.starting_executor_count, request.next_ready_ms / 1e3):
            raise self._not_yours(now)
        self._scaling.told(request.decision if request.HasField("decision") else None, request.metrics_address)
        if before != holder:
            log.info("an autoscaler follows the load", holder_id=holder)
        return fleet_pb2.LeaseScalingResponse(lease_ms=round(LEASE_S * 1000))

    def _not_yours(self, now: float) -> RefusedError:
        wait_s = self._scaling.opens_in_s(now)
        if wait_s:
            return RefusedError(
                grpc.StatusCode.UNAVAILABLE,
                f"the scheduler has restarted, and an autoscaler may still go by its earlier life for {wait_s:.1f} s; "
                f"keep calling",
                retry_after_s=wait_s,
            )
        return RefusedError(
            grpc.StatusCode.ALREADY_EXISTS,
            f"autoscaler '{shown(self._scaling.holder(now))}' scales this fleet; stop it, or keep calling",
        )

    def leave(self) -> None:
        """End the streams: the scheduler drains."""
        self._leaving.set()
