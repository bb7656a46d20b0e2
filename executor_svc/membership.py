"""The executor's place in the fleet: joins, renews the lease, says when it wants to leave."""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc
import structlog

from common.grpc_servers import open_channel
from common.processes import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, RELEASE
from executor_svc.batch import RunnerInfo
from paceline.v1 import fleet_pb2, fleet_pb2_grpc

log = structlog.get_logger()

_FINAL = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
_RETRY_S = 0.5
_CALL_TIMEOUT_S = 2.0
_START_UP_S = 3.0  # a scheduler that was started together with this executor answers by then


class RefusedError(Exception):
    """The scheduler will never take this executor as it is."""


class Membership:
    """Keeps calling `Join`, from the event loop, which never runs the model."""

    def __init__(
        self,
        scheduler: str,
        executor_id: str,
        incarnation: int,
        address: str,
        info: RunnerInfo,
        startup_s: float = 0.0,
        metrics_address: str = "",
    ) -> None:
        """Prepare to join the fleet of the scheduler at `scheduler`, `startup_s` after this process began."""
        self._scheduler = scheduler
        self._request = fleet_pb2.JoinRequest(
            executor_id=executor_id,
            incarnation=incarnation,
            address=address,
            protocol_version=PROTOCOL_VERSION,
            oldest_protocol_version=OLDEST_PROTOCOL_VERSION,
            release=RELEASE,
            startup_ms=round(startup_s * 1000),
            metrics_address=metrics_address,
            model=fleet_pb2.ExecutorModel(
                name=info.name,
                fingerprint=info.fingerprint,
                context_length=info.context_length,
                vocabulary_size=info.vocabulary_size,
                end_token_ids=info.end_token_ids,
                dtype=info.dtype,
                mode=info.mode,
            ),
            capacity=fleet_pb2.ExecutorCapacity(
                layer_groups=[
                    fleet_pb2.LayerGroup(
                        block_size=group.block_size,
                        window=group.window,
                        chunk=group.chunk,
                        layer_count=group.layer_count,
                    )
                    for group in info.layer_groups
                ],
                block_count=info.block_count,
                slot_count=info.slot_count,
                step_token_count=info.step_token_count,
                cache_bytes=info.cache_bytes,
            ),
        )
        self.joined = asyncio.Event()
        self._changed = asyncio.Event()
        self._refusal: str | None = None  # logged last
        self._began_at: float | None = None  # when calls began to fail

    def leave(self) -> None:
        """Say with the next call, which goes out at once, that this executor takes nothing new."""
        self._request.draining = True
        self._changed.set()

    async def keep(self) -> None:
        """Join and renew until cancelled. Raises `RefusedError` when the scheduler will never take this executor."""
        async with open_channel(self._scheduler) as channel:
            stub = fleet_pb2_grpc.FleetServiceStub(channel)
            while True:
                self._changed.clear()
                pause_s = await self._call(stub)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), pause_s)

    async def _call(self, stub: fleet_pb2_grpc.FleetServiceAsyncStub) -> float:
        """Make one call; returns the seconds until the next."""
        try:
            response = await stub.Join(self._request, timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in _FINAL:
                raise RefusedError(error.details()) from error
            if self._began_at is None:
                self._began_at = time.monotonic()
            if error.details() != self._refusal and time.monotonic() - self._began_at > _START_UP_S:
                self._refusal = error.details()
                log.warning("not joined", scheduler=self._scheduler, reason=self._refusal)
            self.joined.clear()
            return _RETRY_S
        if not self.joined.is_set():
            log.info("joined", scheduler=self._scheduler, lease_ms=response.lease_ms)
            self.joined.set()
            self._refusal = None
            self._began_at = None
        return response.lease_ms / 1000 / 3
