"""Answers KEDA: how many executors there should be, or how much there is to do, as a metric with a target.

The contract and what KEDA makes of it: KEDA, "External Scalers" and `pkg/scalers/external_scaler.go`, version 2.20.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc

from autoscaler_svc.load import PoolLoad
from common.errors import RefusedError, abort, invalid, shown
from externalscaler import externalscaler_pb2 as pb
from externalscaler import externalscaler_pb2_grpc

_KEDAS_OWN = frozenset(
    {"scalerAddress", "enableTLS", "unsafeSsl", "caCert", "tlsClientCert", "tlsClientKey", "tlsCertFile"}
)
"""Keys of a trigger's metadata that are between KEDA and its own configuration."""

_LARGEST_TARGET = 1e15
"""Targets are also told as int64, and KEDA counts in thousandths of them."""


class Outlook(Protocol):
    """What the autoscaler knows and wants; None where it knows nothing, or what it knew is too old."""

    @property
    def load(self) -> PoolLoad | None:
        """The load as it was told last."""
        ...

    @property
    def wanted(self) -> int | None:
        """Executors there should be, by policies and bounds."""
        ...

    @property
    def round_count(self) -> int:
        """How often either may have changed."""
        ...

    async def changed(self, since: int) -> None:
        """Wait until `round_count` is another one."""
        ...


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that KEDA can be told: its total over the pool, and what each executor may have of it."""

    name: str
    target: float | None  # None: the trigger has to say it
    total: Callable[[PoolLoad, int], float]


METRICS = {
    metric.name.removeprefix("paceline-"): metric
    for metric in (
        Metric("paceline-executors", 1.0, lambda _load, wanted: wanted),
        Metric("paceline-requests", None, lambda load, _wanted: load.unfinished_request_count),
        Metric("paceline-tokens", None, lambda load, _wanted: load.waiting_token_count + load.running_token_count),
        Metric("paceline-backlog_seconds", None, lambda load, _wanted: load.backlog_s * max(1, len(load.ready))),
    )
}


@dataclass(frozen=True, slots=True)
class Trigger:
    """What a trigger of a ScaledObject asks for."""

    metric: Metric
    target: float
    pool: str  # "": whichever is there

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Trigger:
        """Read the metadata. Raises `RefusedError` that names the key, the value and what is allowed."""
        given = {key: value for key, value in metadata.items() if key not in _KEDAS_OWN and not key.endswith("FromEnv")}
        unknown = sorted(given.keys() - {"metric", "target", "pool"})
        if unknown:
            raise invalid(f"metadata has '{shown(unknown[0])}'; there are metric, target and pool")
        name = given.get("metric", "executors")
        metric = METRICS.get(name)
        if metric is None:
            raise invalid(f"metadata metric is '{shown(name)}', must be one of {', '.join(METRICS)}")
        return cls(metric, _target_of(given.get("target", ""), metric), given.get("pool", ""))


def _target_of(text: str, metric: Metric) -> float:
    if not text and metric.target is not None:
        return metric.target
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not (0.001 <= target <= _LARGEST_TARGET):
        raise invalid(
            f"metadata target is '{shown(text)}', must be a number of at least 0.001 and at most "
            f"{_LARGEST_TARGET:g}: how much of {metric.name} one executor may have"
        )
    return target


class ExternalScaler(externalscaler_pb2_grpc.ExternalScalerServicer):
    """KEDA's contract over what the autoscaler knows.

    A trigger's metadata are `metric` (`executors`, the number that is wanted, or `requests`, `tokens`,
    `backlog_seconds`), `target` for one executor of it, and `pool`, the model's name, to be sure. Each is a total over
    the pool, for `metricType: AverageValue`.

    The HPA leaves alone what is within its tolerance of 10 %: of `executors` it ignores a step of one where there are
    ten or more. Set `behavior.scaleUp.tolerance` and `scaleDown.tolerance` to 0 there, or let KEDA go by `requests`.
    """

    def __init__(self, outlook: Outlook) -> None:
        """Answer by what `outlook` says at that moment."""
        self._outlook = outlook
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End all streams, cleanly: of an error KEDA would remember a longer and longer pause."""
        self._closing.set()

    async def IsActive(self, request: pb.ScaledObjectRef, context: grpc.aio.ServicerContext) -> pb.IsActiveResponse:
        """Whether there should be any executor."""
        try:
            return pb.IsActiveResponse(result=self._is_active(self._trigger(request)))
        except RefusedError as error:
            await abort(context, error)

    async def StreamIsActive(
        self, request: pb.ScaledObjectRef, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.IsActiveResponse]:
        """The present state at once, then each change; while nothing is known, nothing."""
        try:
            trigger = self._trigger(request)
        except RefusedError as error:
            await abort(context, error)
        told: bool | None = None
        while not self._closing.is_set():
            round_count = self._outlook.round_count
            try:
                now: bool | None = self._is_active(trigger)
            except RefusedError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    await abort(context, error)
                now = told
            if now is not None and now != told:
                told = now
                yield pb.IsActiveResponse(result=now)
            await self._until_changed(round_count)

    async def GetMetricSpec(
        self, request: pb.ScaledObjectRef, context: grpc.aio.ServicerContext
    ) -> pb.GetMetricSpecResponse:
        """The metric of the trigger, and its target."""
        try:
            return _spec(self._trigger(request))
        except RefusedError as error:
            await abort(context, error)

    async def GetMetrics(
        self, request: pb.GetMetricsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetMetricsResponse:
        """The value of the metric now."""
        try:
            trigger = self._trigger(request.scaledObjectRef)
            if request.metricName != trigger.metric.name:
                raise invalid(
                    f"metricName is '{shown(request.metricName)}', this trigger has only '{trigger.metric.name}'"
                )
            value = _value(trigger, *self._known(trigger))
        except RefusedError as error:
            await abort(context, error)
        return pb.GetMetricsResponse(
            metricValues=[
                pb.MetricValue(metricName=trigger.metric.name, metricValue=math.ceil(value), metricValueFloat=value)
            ]
        )

    async def StreamMetricSpec(
        self, request: pb.ScaledObjectRef, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GetMetricSpecResponse]:
        """The metric and its target at once; they change only with the trigger, which opens another stream."""
        try:
            spec = _spec(self._trigger(request))
        except RefusedError as error:
            await abort(context, error)
        yield spec
        await self._closing.wait()

    @staticmethod
    def _trigger(request: pb.ScaledObjectRef) -> Trigger:
        return Trigger.of(request.scalerMetadata)

    def _known(self, trigger: Trigger) -> tuple[PoolLoad, int]:
        """The load and what is wanted. Missing data are an error and never a zero: KEDA would scale by it."""
        load, wanted = self._outlook.load, self._outlook.wanted
        if load is None or wanted is None:
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE, "nothing is known of the load: the scheduler does not tell it; ask again"
            )
        if trigger.pool and trigger.pool != load.model:
            raise invalid(f"metadata pool is '{shown(trigger.pool)}', this autoscaler has '{load.model}'")
        return load, wanted

    def _is_active(self, trigger: Trigger) -> bool:
        load, wanted = self._known(trigger)
        return wanted > 0 or load.unfinished_request_count > 0

    async def _until_changed(self, since: int) -> None:
        waits = [asyncio.ensure_future(self._outlook.changed(since)), asyncio.ensure_future(self._closing.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


def _value(trigger: Trigger, load: PoolLoad, wanted: int) -> float:
    """The total of the metric.

    How long a backlog takes is unknown until an executor has computed something. Where none takes requests, what is
    wanted stands in for it: an error there would also keep KEDA from starting the first. Else it is an error.
    """
    is_unknown = trigger.metric is METRICS["backlog_seconds"] and load.backlog_token_count and not load.backlog_s
    if is_unknown and load.ready:
        raise RefusedError(
            grpc.StatusCode.UNAVAILABLE,
            f"nothing is known of how long the backlog of {load.backlog_token_count} tokens takes: no executor has "
            f"computed anything yet; ask again",
        )
    return trigger.target * max(1, wanted) if is_unknown else trigger.metric.total(load, wanted)


def _spec(trigger: Trigger) -> pb.GetMetricSpecResponse:
    return pb.GetMetricSpecResponse(
        metricSpecs=[
            pb.MetricSpec(
                metricName=trigger.metric.name,
                targetSize=math.ceil(trigger.target),
                targetSizeFloat=trigger.target,
            )
        ]
    )
