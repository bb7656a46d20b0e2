"""What the scheduler tells Prometheus, read when it is asked: nothing of it is on the step path."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.journal.journal import Durability, Journal


class SchedulerMetrics(Collector):
    """Reads plain numbers from another thread: each is right by itself, all of them together nearly of one moment."""

    def __init__(self, scheduler: Scheduler, journal: Journal) -> None:
        """Watch these."""
        self._scheduler = scheduler
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
            "paceline_requests_waiting", "Requests that no executor computes.", self._scheduler.waiting_count
        )
        yield GaugeMetricFamily(
            "paceline_requests_unfinished", "Requests that have not ended.", self._scheduler.request_count
        )
