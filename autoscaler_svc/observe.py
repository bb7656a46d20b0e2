"""Watches the load that a scheduler tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc
import structlog

from autoscaler_svc.load import ExecutorLoad, ExecutorState, Latency, PoolLoad
from autoscaler_svc.scaling_settings import Targets
from common.grpc_servers import open_channel
from paceline.v1 import fleet_pb2, fleet_pb2_grpc

log = structlog.get_logger()

_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 2.0
_START_UP_S = 5.0  # a scheduler that was started together with this autoscaler answers by then
_STALE_INTERVALS = 5
_STALE_AT_LEAST_S = 3.0

_STATES = {
    fleet_pb2.EXECUTOR_STATE_CONNECTING: ExecutorState.CONNECTING,
    fleet_pb2.EXECUTOR_STATE_READY: ExecutorState.READY,
    fleet_pb2.EXECUTOR_STATE_DRAINING: ExecutorState.DRAINING,
}


class LoadWatch:
    """Keeps the stream of one scheduler open, and what came last."""

    def __init__(
        self,
        scheduler: str,
        interval_s: float,
        targets: Targets,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch the scheduler at that address; it tells every `interval_s`, and counts who came within the targets."""
        self.scheduler = scheduler
        self._request = fleet_pb2.WatchLoadRequest(
            interval_ms=round(interval_s * 1000),
            first_token_target_ms=round(targets.first_token_s * 1000),
            per_token_target_us=round(targets.per_token_s * 1e6),
        )
        self._stale_after_s = max(_STALE_AT_LEAST_S, _STALE_INTERVALS * interval_s)
        self._clock = clock
        self._load: PoolLoad | None = None
        self._came_at = 0.0
        self._news = asyncio.Event()

    @property
    def load(self) -> PoolLoad | None:
        """What was told last; None before the first time, and when that is too long ago to go by."""
        return self._load if self._load and self._clock() - self._came_at <= self._stale_after_s else None

    async def next(self, timeout_s: float) -> PoolLoad | None:
        """Wait for what comes next; None when nothing has come in that time, or it is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return None
        self._news.clear()
        return self.load

    async def keep(self) -> None:
        """Keep the stream open until cancelled."""
        pause_s, told, began_at = _FIRST_RETRY_S, "", self._clock()
        async with open_channel(self.scheduler) as channel:
            stub = fleet_pb2_grpc.FleetServiceStub(channel)
            while True:
                try:
                    async for message in stub.WatchLoad(self._request):
                        if told or self._load is None:
                            log.info("watching the load", scheduler=self.scheduler, model=message.model)
                        pause_s, told = _FIRST_RETRY_S, ""
                        self._load, self._came_at = decode_load(message), self._clock()
                        self._news.set()
                    reason = "the scheduler leaves"
                except grpc.aio.AioRpcError as error:
                    reason = f"{error.code().name}: {error.details()}"
                is_starting = self._load is None and self._clock() - began_at < _START_UP_S
                if not told and not is_starting:
                    log.warning("the load is unknown; nothing is changed", scheduler=self.scheduler, reason=reason)
                    told = reason
                await asyncio.sleep(pause_s)
                pause_s = min(_LAST_RETRY_S, 2 * pause_s)


def decode_load(message: fleet_pb2.WatchLoadResponse) -> PoolLoad:
    """What the scheduler told, as a value."""
    same = (
        "model",
        "epoch",
        "waiting_request_count",
        "waiting_token_count",
        "running_request_count",
        "running_token_count",
        "backlog_token_count",
        "block_count",
        "held_block_count",
        "arrived_request_count",
        "arrived_prompt_token_count",
        "refused_request_count",
        "ended_request_count",
        "generated_token_count",
        "computed_token_count",
        "reused_token_count",
        "mean_prompt_token_count",
        "mean_output_token_count",
    )
    return PoolLoad(
        **{name: getattr(message, name) for name in same},
        oldest_waiting_s=message.oldest_waiting_ms / 1e3,
        backlog_s=message.backlog_ms / 1e3,
        first_token=_latency(message.first_token),
        per_token=_latency(message.per_token),
        executors=tuple(_executor(executor) for executor in message.executors),
    )


def _latency(message: fleet_pb2.Latency) -> Latency:
    return Latency(
        message.count,
        message.sum_us / 1e6,
        message.within_target_count,
        message.p50_us / 1e6,
        message.p95_us / 1e6,
        message.p99_us / 1e6,
    )


def _executor(message: fleet_pb2.ExecutorLoad) -> ExecutorLoad:
    same = (
        "executor_id",
        "running_request_count",
        "running_token_count",
        "useful_token_count",
        "block_count",
        "held_block_count",
        "slot_count",
        "step_token_count",
        "cache_token_count",
        "step_us",
        "token_us",
    )
    return ExecutorLoad(
        **{name: getattr(message, name) for name in same},
        state=_STATES.get(message.state, ExecutorState.CONNECTING),
        startup_s=message.startup_ms / 1e3,
    )
