"""What the scheduler tells Prometheus, read when it is asked: nothing of it is on the step path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from paceline.v1 import fleet_pb2
from scheduler_svc.journal.journal import Durability, Journal
from scheduler_svc.load_meter import LatencyMeter, LoadMeter

_STATES = {
    fleet_pb2.EXECUTOR_STATE_CONNECTING: "connecting",
    fleet_pb2.EXECUTOR_STATE_READY: "ready",
    fleet_pb2.EXECUTOR_STATE_DRAINING: "draining",
}


@dataclass(frozen=True, slots=True)
class _Figure:
    """A field of the load as a metric."""

    name: str
    text: str
    field: str
    scale: float = 1.0


_GAUGES = (
    _Figure("paceline_requests_waiting", "Requests that no executor computes.", "waiting_request_count"),
    _Figure("paceline_requests_running", "Requests placed on executors.", "running_request_count"),
    _Figure("paceline_waiting_tokens", "Known tokens of the requests that wait.", "waiting_token_count"),
    _Figure("paceline_running_tokens", "Tokens of running requests in the caches.", "running_token_count"),
    _Figure("paceline_oldest_waiting_seconds", "How long the oldest request waits.", "oldest_waiting_ms", 1e-3),
    _Figure("paceline_backlog_tokens", "Tokens to compute before everybody's next one.", "backlog_token_count"),
    _Figure("paceline_backlog_seconds", "Time that these take; 0 with tokens: unknown.", "backlog_ms", 1e-3),
    _Figure("paceline_blocks", "Blocks of the executors that take requests.", "block_count"),
    _Figure("paceline_blocks_held", "How many of these requests hold.", "held_block_count"),
)
_COUNTERS = (
    _Figure("paceline_requests_arrived", "Requests accepted.", "arrived_request_count"),
    _Figure("paceline_prompt_tokens_arrived", "Tokens of their prompts.", "arrived_prompt_token_count"),
    _Figure("paceline_requests_refused", "Requests refused because the queue was full.", "refused_request_count"),
    _Figure("paceline_requests_ended", "Requests that ended, whatever for.", "ended_request_count"),
    _Figure("paceline_tokens_generated", "Tokens generated.", "generated_token_count"),
    _Figure("paceline_tokens_computed", "Tokens computed, prompts included.", "computed_token_count"),
    _Figure("paceline_tokens_reused", "Prompt tokens that were found in a cache instead.", "reused_token_count"),
)
_OF_EXECUTORS = (
    _Figure("paceline_executor_requests_running", "Requests placed on it.", "running_request_count"),
    _Figure("paceline_executor_blocks_held", "Blocks that requests hold.", "held_block_count"),
    _Figure("paceline_executor_blocks", "Blocks of its cache.", "block_count"),
    _Figure("paceline_executor_step_seconds", "Time of a step without tokens, as measured.", "step_us", 1e-6),
    _Figure("paceline_executor_token_seconds", "Time that a token adds to a step.", "token_us", 1e-6),
    _Figure("paceline_executor_startup_seconds", "From its start until its model was ready.", "startup_ms", 1e-3),
)


class SchedulerMetrics(Collector):
    """Reads plain numbers from another thread: each is right by itself, all of them together nearly of one moment."""

    def __init__(
        self,
        load: Callable[[], fleet_pb2.WatchLoadResponse],
        unfinished: Callable[[], int],
        meter: LoadMeter,
        journal: Journal,
    ) -> None:
        """Watch these; `load` is called on the thread of the scrape."""
        self._load = load
        self._unfinished = unfinished
        self._meter = meter
        self._journal = journal

    def collect(self) -> Iterator[Metric]:
        """Everything as it is now."""
        durability = GaugeMetricFamily(
            "paceline_durability",
            "Whether what users were told outlives the scheduler: 1 for the state that holds, off, on or lost.",
            labels=["state"],
        )
        for state in Durability:
            durability.add_metric([state.value], float(self._journal.durability is state))
        yield durability
        yield GaugeMetricFamily("paceline_journal_bytes", "Size of the journal's files.", self._journal.byte_count)
        yield GaugeMetricFamily(
            "paceline_requests_unfinished", "Requests that have not ended.", float(self._unfinished())
        )
        load = self._load()
        for figure in _GAUGES:
            yield GaugeMetricFamily(figure.name, figure.text, figure.scale * getattr(load, figure.field))
        for figure in _COUNTERS:
            yield CounterMetricFamily(figure.name, figure.text, getattr(load, figure.field))
        yield _histogram("paceline_first_token_seconds", "From acceptance to the first token.", self._meter.first_token)
        yield _histogram("paceline_per_token_seconds", "Mean of the tokens after the first.", self._meter.per_token)
        yield from _executors(load)


def _executors(load: fleet_pb2.WatchLoadResponse) -> Iterator[Metric]:
    states = GaugeMetricFamily("paceline_executors", "Executors that have joined, by state.", labels=["state"])
    for state, name in _STATES.items():
        states.add_metric([name], sum(executor.state == state for executor in load.executors))
    yield states
    for figure in _OF_EXECUTORS:
        family = GaugeMetricFamily(figure.name, figure.text, labels=["executor_id"])
        for executor in load.executors:
            family.add_metric([executor.executor_id], figure.scale * getattr(executor, figure.field))
        yield family


def _histogram(name: str, text: str, meter: LatencyMeter) -> HistogramMetricFamily:
    buckets = [(f"{limit:g}", float(count)) for limit, count in meter.cumulative()]
    return HistogramMetricFamily(name, text, buckets=[*buckets, ("+Inf", meter.count)], sum_value=meter.sum_s)
