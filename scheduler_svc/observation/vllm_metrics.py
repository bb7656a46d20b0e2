"""The figures of this scheduler under the names that vLLM gives them: dashboards and autoscalers ask by those.

What this system does not have is left out (LoRA, speculation, sleep), as is what it does not measure.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from common.http_pages import Page, PageRequest
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet
from scheduler_svc.load import load_of
from scheduler_svc.load_meter import LatencyMeter, LoadWatcher, SizeMeter

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
"""The only format whose names may have colons: OpenMetrics would rewrite them."""

_LABELS = ["model_name", "engine", "model"]
"""vLLM's own two, and the one by which the KEDA queries of its production stack ask for the same name."""

_REASONS = {"stop": ("stop",), "length": ("length",), "abort": ("cancelled", "deadline"), "error": ("error", "cut off")}


class VllmMetrics(Collector):
    """Reads the same meters as `SchedulerMetrics`; all executors together are one engine."""

    def __init__(self, model: str, fleet: Fleet, engine: Engine) -> None:
        """Watch these."""
        self._model, self._fleet, self._engine = model, fleet, engine
        self._values = [model, "0", model]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        self._registry = registry

    def page(self, _request: PageRequest) -> Page:
        """The page at `/metrics/vllm`."""
        return Page(generate_latest(self._registry).decode(), TEXT_FORMAT)

    def collect(self) -> Iterator[Metric]:
        """Everything as it is now."""
        load = load_of(self._model, self._fleet, self._engine, LoadWatcher())
        meter = self._engine.meter
        share = load.held_block_count / load.block_count if load.block_count else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that executors compute.", load.running_request_count),
            ("num_requests_waiting", "Requests that wait.", load.waiting_request_count),
            ("kv_cache_usage_perc", "Share of the cache that requests hold, 0 to 1.", share),
        ):
            yield self._gauge(name, text, value)
        yield self._cache_config()
        yield self._counter("prompt_tokens", "Number of prefill tokens.", meter.placed_prompt_token_count)
        yield self._counter("prompt_tokens_cached", "Prompt tokens found in a cache.", load.reused_token_count)
        yield self._counter("generation_tokens", "Number of generation tokens.", load.generated_token_count)
        yield self._counter("num_preemptions", "Number of preemptions.", meter.preemption_count)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", meter.placed_prompt_token_count)
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", load.reused_token_count)
        yield self._endings()
        for name, text, times in (
            ("time_to_first_token_seconds", "Time to first token.", meter.first_token),
            ("inter_token_latency_seconds", "Time between tokens.", meter.between_tokens),
            ("request_time_per_output_token_seconds", "Mean time per output token.", meter.per_token),
            ("e2e_request_latency_seconds", "End to end latency.", meter.whole),
            ("request_queue_time_seconds", "Time in the queue.", meter.queue),
            ("request_prefill_time_seconds", "Time in prefill.", meter.prefill),
            ("request_decode_time_seconds", "Time in decode.", meter.decode),
            ("request_inference_time_seconds", "Time from its first placement to its end.", meter.inference),
        ):
            yield self._histogram(name, text, times)
        yield self._histogram("request_prompt_tokens", "Prefill tokens of a request.", meter.prompt_sizes)
        yield self._histogram("request_generation_tokens", "Generated tokens of a request.", meter.output_sizes)
        longest = "Generated tokens of the longest choice of a request."
        yield self._histogram("request_max_num_generation_tokens", longest, meter.longest_sizes)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _endings(self) -> Metric:
        family = CounterMetricFamily("vllm:request_success", "Finished requests.", labels=[*_LABELS, "finished_reason"])
        outcomes = self._engine.meter.outcome_counts
        for reason, ours in _REASONS.items():
            family.add_metric([*self._values, reason], sum(outcomes.get(outcome, 0) for outcome in ours))
        return family

    def _cache_config(self) -> Metric:
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "The cache.", labels=[*_LABELS, "block_size", "num_gpu_blocks"]
        )
        executors = [e for e in list(self._engine.scheduler.executors.values()) if not e.draining]
        if executors:
            size = str(executors[0].capacity.layer_groups[0].block_size)
            count = str(sum(executor.capacity.block_count for executor in executors))
            family.add_metric([*self._values, size, count], 1)
        return family

    def _histogram(self, name: str, text: str, meter: LatencyMeter | SizeMeter) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        buckets = [(f"{limit:g}", float(count)) for limit, count in meter.cumulative()]
        total = meter.sum_s if isinstance(meter, LatencyMeter) else meter.total
        family.add_metric(self._values, [*buckets, ("+Inf", float(meter.count))], total)
        return family
