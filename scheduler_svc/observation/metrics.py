"""What the scheduler tells Prometheus, read when it is asked: nothing of it is on the step path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as PrometheusExemplar

from common.processes import RELEASE
from paceline.v1 import fleet_pb2
from scheduler_svc.arrivals import Hold
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet
from scheduler_svc.journal.journal import Durability, Journal
from scheduler_svc.load import load_of
from scheduler_svc.load_meter import LatencyMeter, LoadMeter, LoadWatcher, SizeMeter
from scheduler_svc.observation.step_meter import StepMeter
from scheduler_svc.refusals import REASONS

if TYPE_CHECKING:
    from common.span_exporter import OtlpSink

_STATES = {
    fleet_pb2.EXECUTOR_STATE_CONNECTING: "connecting",
    fleet_pb2.EXECUTOR_STATE_READY: "ready",
    fleet_pb2.EXECUTOR_STATE_DRAINING: "draining",
}
OUTCOMES = ("stop", "length", "cancelled", "deadline", "error", "cut off")
_MOVES = ("lost", "drained", "out of memory")
_RECOVERIES = ("resumed", "replanned", "given up")


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

    def __init__(self, model: str, fleet: Fleet, engine: Engine, journal: Journal, sink: OtlpSink | None) -> None:
        """Watch these; everything is called on the thread of the scrape."""
        self._model, self._fleet, self._engine, self._journal = model, fleet, engine, journal
        self._sink = sink

    def collect(self) -> Iterator[Metric]:
        """Everything as it is now."""
        load = load_of(self._model, self._fleet, self._engine, LoadWatcher())
        meter = self._engine.meter
        yield _labelled(
            GaugeMetricFamily("paceline_build_info", "What runs here.", labels=["release", "model"]),
            {(RELEASE, self._model): 1.0},
        )
        yield from self._journal_metrics()
        unfinished = float(self._engine.scheduler.request_count)
        yield GaugeMetricFamily("paceline_requests_unfinished", "Requests that have not ended.", unfinished)
        held = float(self._engine.arrivals.held_count(*Hold))
        yield GaugeMetricFamily("paceline_requests_at_door", "Requests held before they are accepted.", held)
        for figure in _GAUGES:
            yield GaugeMetricFamily(figure.name, figure.text, figure.scale * getattr(load, figure.field))
        yield from self._blocks()
        for figure in _COUNTERS:
            yield CounterMetricFamily(figure.name, figure.text, getattr(load, figure.field))
        yield from _counts(meter)
        yield CounterMetricFamily("paceline_plans", "Plans made.", meter.plan.count)
        yield CounterMetricFamily("paceline_plan_seconds", "Time of the scheduler for them.", meter.plan.total_s)
        yield CounterMetricFamily("paceline_apply_seconds", "And for taking in their results.", meter.apply.total_s)
        yield from _times(meter)
        yield from self._executors(load)
        dropped_count = self._sink.dropped_count if self._sink is not None else 0
        yield CounterMetricFamily("paceline_spans_dropped", "Spans that no receiver of traces got.", dropped_count)

    def _journal_metrics(self) -> Iterator[Metric]:
        durability = GaugeMetricFamily(
            "paceline_durability",
            "Whether what users were told outlives the scheduler: 1 for the state that holds, off, on or lost.",
            labels=["state"],
        )
        yield _labelled(durability, {(state.value,): float(self._journal.durability is state) for state in Durability})
        yield GaugeMetricFamily("paceline_journal_bytes", "Size of the journal's files.", self._journal.byte_count)

    def _blocks(self) -> Iterator[Metric]:
        pools = [e.cache.pool for e in list(self._engine.scheduler.executors.values()) if not e.draining]
        cached = sum(pool.reusable_count for pool in pools)
        free = sum(pool.free_count for pool in pools) - cached
        yield GaugeMetricFamily("paceline_blocks_cached", "Blocks that are free and kept for reuse.", cached)
        yield GaugeMetricFamily("paceline_blocks_free", "Blocks that are free and hold nothing.", free)

    def _executors(self, load: fleet_pb2.WatchLoadResponse) -> Iterator[Metric]:
        states = GaugeMetricFamily("paceline_executors", "Executors that have joined, by state.", labels=["state"])
        there = [executor.state for executor in load.executors]
        yield _labelled(states, {(name,): float(there.count(state)) for state, name in _STATES.items()})
        for figure in _OF_EXECUTORS:
            family = GaugeMetricFamily(figure.name, figure.text, labels=["executor_id"])
            for executor in load.executors:
                family.add_metric([executor.executor_id], figure.scale * getattr(executor, figure.field))
            yield family
        cached = GaugeMetricFamily(
            "paceline_executor_blocks_cached", "Free blocks kept for reuse.", labels=["executor_id"]
        )
        executors = list(self._engine.scheduler.executors.items())
        yield _labelled(cached, {(name,): executor.cache.pool.reusable_count for name, executor in executors})
        yield from _steps({name: member.link.steps for name, member in list(self._fleet.members.items())})


def _steps(meters: Mapping[str, StepMeter]) -> Iterator[Metric]:
    starved = CounterMetricFamily(
        "paceline_executor_starved_seconds",
        "Time in which it had requests to go on with and no plan: what the split costs.",
        labels=["executor_id"],
    )
    yield _labelled(starved, {(name,): steps.starved_s for name, steps in meters.items()})
    busy = CounterMetricFamily(
        "paceline_executor_busy_seconds",
        "Time that its steps took; with paceline_executor_starved_seconds_total all the time in which it had work.",
        labels=["executor_id"],
    )
    yield _labelled(busy, {(name,): steps.total.busy for name, steps in meters.items()})
    count = CounterMetricFamily("paceline_executor_steps", "Steps that it ran.", labels=["executor_id"])
    yield _labelled(count, {(name,): steps.step_count for name, steps in meters.items()})
    phases = CounterMetricFamily(
        "paceline_executor_phase_seconds",
        "Where the time of its steps went. While it waits or idles it has nothing to compute.",
        labels=["executor_id", "phase"],
    )
    by_phase = {
        (name, phase): seconds for name, steps in meters.items() for phase, seconds in steps.total._asdict().items()
    }
    yield _labelled(phases, by_phase)
    wire = CounterMetricFamily(
        "paceline_executor_wire_bytes", "Bytes of messages on the step stream.", labels=["executor_id", "direction"]
    )
    sent = {(name, "sent"): steps.sent_byte_count for name, steps in meters.items()}
    yield _labelled(wire, sent | {(name, "received"): steps.received_byte_count for name, steps in meters.items()})


def _counts(meter: LoadMeter) -> Iterator[Metric]:
    def counter(name: str, text: str, label: str, values: Mapping[str, int], known: tuple[str, ...]) -> Metric:
        family = CounterMetricFamily(name, text, labels=[label])
        return _labelled(family, {(value.replace(" ", "_"),): values.get(value, 0) for value in known})

    yield counter("paceline_requests_refused", "Requests not let in.", "reason", meter.refused_counts, REASONS)
    yield counter("paceline_requests_ended", "Requests that ended.", "outcome", meter.outcome_counts, OUTCOMES)
    yield counter(
        "paceline_moves", "Times that a choice had to leave an executor and go on.", "cause", meter.move_counts, _MOVES
    )
    yield counter(
        "paceline_recoveries",
        "Executors that went with requests on them, by what became of any of these: it was resumed there, planned "
        "elsewhere, or given up because it kills executors.",
        "kind",
        meter.recovery_counts,
        _RECOVERIES,
    )
    yield CounterMetricFamily(
        "paceline_preemptions", "Requests that gave their blocks to others.", meter.preemption_count
    )
    yield CounterMetricFamily(
        "paceline_tokens_recomputed", "Tokens computed once more than needed.", meter.recomputed_token_count
    )
    yield CounterMetricFamily(
        "paceline_prompt_tokens_placed",
        "Prompt tokens of requests that were placed and have ended: what paceline_tokens_reused_total is a part of.",
        meter.placed_prompt_token_count,
    )


def _times(meter: LoadMeter) -> Iterator[Metric]:
    yield histogram("paceline_door_seconds", "Held before acceptance; only of those who were.", meter.door)
    yield histogram("paceline_queue_seconds", "From acceptance to the first placement.", meter.queue)
    yield histogram("paceline_prefill_seconds", "From the first placement to the first token.", meter.prefill)
    yield histogram("paceline_first_token_seconds", "From receipt to the first token.", meter.first_token)
    yield histogram("paceline_per_token_seconds", "Mean of the tokens after the first.", meter.per_token)
    yield histogram("paceline_between_tokens_seconds", "From a token to the next of its request.", meter.between_tokens)
    yield histogram("paceline_request_seconds", "From receipt to the end.", meter.whole)
    yield histogram("paceline_request_prompt_tokens", "Tokens of a prompt.", meter.prompt_sizes)
    yield histogram("paceline_request_output_tokens", "Tokens of an output.", meter.output_sizes)


def histogram(name: str, text: str, meter: LatencyMeter | SizeMeter) -> HistogramMetricFamily:
    """A meter as Prometheus reads it, with its exemplars."""
    limits = [f"{limit:g}" for limit, _ in meter.cumulative()] + ["+Inf"]
    counts = [float(count) for _, count in meter.cumulative()] + [float(meter.count)]
    exemplars = dict(meter.exemplars) if isinstance(meter, LatencyMeter) else {}
    buckets: list[tuple[str, float] | tuple[str, float, PrometheusExemplar]] = []
    for index, (limit, count) in enumerate(zip(limits, counts, strict=True)):
        found = exemplars.get(index)
        exemplar = PrometheusExemplar({"trace_id": found.trace_id}, found.seconds, found.at_s) if found else None
        buckets.append((limit, count, exemplar) if exemplar else (limit, count))
    total = meter.sum_s if isinstance(meter, LatencyMeter) else meter.total
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)


def _labelled(family: Metric, values: Mapping[Any, float]) -> Metric:
    for labels, value in values.items():
        family.add_metric(labels, value)  # type: ignore[attr-defined]  # the base class of all families lacks it
    return family
