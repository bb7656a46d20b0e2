"""KEDA as its contract and its source say that it behaves, with the HPA behind it: what scales by us in a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import grpc

from externalscaler import externalscaler_pb2 as pb
from externalscaler import externalscaler_pb2_grpc

COOLDOWN_S = 300.0
TOLERANCE = 0.1


@dataclass
class ScaledObject:
    """One ScaledObject with one external trigger: scales between 0 and 1 itself, and beyond by the HPA's formula."""

    stub: externalscaler_pb2_grpc.ExternalScalerAsyncStub
    metadata: dict[str, str]
    tolerance: float = TOLERANCE
    replicas: int = 0
    most: int = 10
    active_at: float | None = None  # last
    errors: list[grpc.StatusCode] = field(default_factory=list)

    @property
    def ref(self) -> pb.ScaledObjectRef:
        metadata = {"scalerAddress": "paceline:50071", **self.metadata}
        return pb.ScaledObjectRef(name="executors", namespace="llm", scalerMetadata=metadata)

    async def poll(self, now: float) -> int:
        """One poll: metric and activity, then what becomes of the replicas. An error changes nothing."""
        try:
            (spec,) = (await self.stub.GetMetricSpec(self.ref)).metricSpecs
            in_hpa = f"s0-{spec.metricName}"
            asked = pb.GetMetricsRequest(scaledObjectRef=self.ref, metricName=in_hpa.removeprefix("s0-"))
            values = (await self.stub.GetMetrics(asked)).metricValues
            active = (await self.stub.IsActive(self.ref)).result
        except grpc.aio.AioRpcError as error:
            self.errors.append(error.code())
            return self.replicas
        target = spec.targetSizeFloat if spec.targetSizeFloat > 0 else spec.targetSize
        value = sum(v.metricValueFloat if v.metricValueFloat > 0 else v.metricValue for v in values)
        self._take(now, active)
        if self.replicas:
            self._scale(value, target)
        return self.replicas

    def push(self, now: float, active: bool) -> None:
        """A message of the stream: true scales from zero at once, false is ignored."""
        if active:
            self._take(now, active)

    def _take(self, now: float, active: bool) -> None:
        if active:
            self.active_at = now
            self.replicas = self.replicas or 1
        elif self.active_at is None or now - self.active_at > COOLDOWN_S:
            self.replicas = 0

    def _scale(self, total: float, target: float) -> None:
        """`AverageValue` of the HorizontalPodAutoscaler, without windows. Its own least is 1."""
        if abs(total / (target * self.replicas) - 1) > self.tolerance:
            self.replicas = min(self.most, max(1, math.ceil(total / target)))
