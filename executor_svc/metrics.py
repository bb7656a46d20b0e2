"""What an executor tells Prometheus. The scheduler tells the same steps as it sees them; here they are histograms."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common.processes import RELEASE
from executor_svc.batch import Runner
from paceline.internal.v1 import executor_pb2 as pb

_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ExecutorMetrics(Collector):
    """Counts steps on the thread of the model: some microseconds for each."""

    def __init__(self, executor_id: str, runner: Runner) -> None:
        """Start at nothing."""
        self._executor_id = executor_id
        self._info = runner.info
        registry = self._registry = CollectorRegistry()
        steps = Histogram(
            "paceline_step_seconds",
            "Time of a step by what the executor did; while it waits or idles it has nothing to compute.",
            ["phase"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        names = ("queued_us", "idle_us", "prepare_us", "forward_us", "sample_us")
        phases = ("wait", "idle", "prepare", "forward", "sample")
        self._phases = [(name, steps.labels(phase)) for name, phase in zip(names, phases, strict=True)]
        self._steps = Counter("paceline_steps", "Steps that ran.", registry=registry)
        self._failures = Counter("paceline_step_failures", "Requests that failed in a step.", registry=registry)
        tokens = Counter("paceline_step_tokens", "Tokens of steps.", ["kind"], registry=registry)
        self._prefilled, self._sampled = tokens.labels("prefill"), tokens.labels("sampled")

    def note_step(self, plan: pb.Plan, result: pb.StepResult) -> None:
        """A step has run."""
        timings = result.timings
        for name, child in self._phases:
            child.observe(getattr(timings, name) / 1e6)
        self._steps.inc()
        if result.errors:
            self._failures.inc(len(result.errors))
        if plan.chunk_token_counts:
            self._prefilled.inc(int(np.frombuffer(plan.chunk_token_counts, dtype="<u4").sum()))
        if result.token_ids:
            self._sampled.inc(int((np.frombuffer(result.token_ids, dtype="<i4") >= 0).sum()))

    def collect(self) -> Iterator[Metric]:
        """Everything as it is now."""
        info = GaugeMetricFamily("paceline_executor_info", "What runs here.", labels=["model", "dtype", "release"])
        info.add_metric([self._info.name, self._info.dtype, RELEASE], 1.0)
        yield info
        yield GaugeMetricFamily("paceline_cache_blocks", "Blocks of the cache.", self._info.block_count)
        yield GaugeMetricFamily("paceline_cache_bytes", "Bytes of the cache.", self._info.cache_bytes)
        yield from _device_memory()
        yield from self._registry.collect()


def _device_memory() -> Iterator[Metric]:
    """What torch has of the GPUs' memory, where it is loaded and uses one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    family = GaugeMetricFamily("paceline_device_memory_bytes", "Memory of the GPU.", labels=["kind"])
    family.add_metric(["allocated"], torch.cuda.memory_allocated())
    family.add_metric(["reserved"], torch.cuda.memory_reserved())
    yield family
