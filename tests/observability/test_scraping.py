"""The deployed scrape configuration and every expression, tried on a service that has every metric there can be."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.observability.metric_names import METRICS
from tests.observability.prometheus import (
    Prometheus,
    expressions,
    may_be_empty,
    running_prometheus,
    selector_text,
    selectors,
    short_config,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
OF_TARGETS = {"job", "instance"}  # labels that Prometheus puts there
BUCKETS = ("0.1", "1", "2.5", "+Inf")


def has(job: str, name: str) -> bool:
    """Whether a service has a metric; every process has its memory."""
    return name == "process_resident_memory_bytes" or job_of(name) == job


def job_of(name: str) -> str:
    """Which service has a metric that not all of them have."""
    if name.startswith("paceline_autoscaler_"):
        return "paceline-autoscaler"
    is_executors = name.startswith("paceline_") and "executor_id" in METRICS[name] and "paceline_executor_" not in name
    return "paceline-executor" if is_executors or name == "paceline_executor_info" else "paceline-scheduler"


def sample_lines(job: str) -> Iterator[str]:
    """Every metric of a service, with every value of its labels; counters count seconds."""
    for name, labels in METRICS.items():
        if not has(job, name) or name in ("up", "ALERTS"):
            continue
        from_target = {"executor_id"} if job == "paceline-executor" or not name.startswith("paceline_") else set()
        own = set(labels) - OF_TARGETS - from_target
        values = [[(label, one) for one in sorted(labels[label]) or example(label)] for label in sorted(own)]
        for chosen in itertools.product(*values):
            text = ",".join(f'{label}="{value}"' for label, value in chosen)
            number = time.time() if name.endswith(("_total", "_bucket", "_sum", "_count")) else 1.0
            exemplar = f' # {{trace_id="{TRACE}"}} 0.5' if name.endswith("_bucket") else ""
            yield f"{name}{{{text}}} {number}{exemplar}"


def example(label: str) -> tuple[str, ...]:
    return BUCKETS if label == "le" else ("e0",) if label == "executor_id" else ("some",)


@contextmanager
def answering(pages: dict[str, object]) -> Iterator[str]:
    """An HTTP server with pages that are made when they are asked for; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, text = pages[self.path]()  # type: ignore[operator]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def metrics_of(job: str) -> dict[str, object]:
    return {"/metrics": lambda: (OPEN_METRICS, "\n".join([*sample_lines(job), "# EOF\n"]))}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has looked at a whole service several times."""
    with (
        answering(metrics_of("paceline-executor")) as executor,
        answering(metrics_of("paceline-autoscaler")) as autoscaler,
    ):
        pages = metrics_of("paceline-scheduler")
        with answering(pages) as scheduler:
            found = [
                {"targets": [executor], "labels": {"job": "paceline-executor", "executor_id": "e0"}},
                {"targets": [autoscaler], "labels": {"job": "paceline-autoscaler"}},
                {"targets": [scheduler], "labels": {"job": "paceline-scheduler"}},
            ]
            pages["/sd"] = lambda: ("application/json", json.dumps(found))
            with running_prometheus(short_config(scheduler), tmp_path_factory.mktemp("prometheus")) as prometheus:
                prometheus.eventually(lambda: len(prometheus.query("count_over_time(up[1m]) >= 3")) == 3)
                yield prometheus


def test_prometheus_finds_executors_and_the_autoscaler_through_the_scheduler(scraped):
    """Executors come and go; whoever watches them by name watches the past. The scheduler is watched once."""
    targets = sorted((t["labels"]["job"], t["labels"].get("executor_id"), t["health"]) for t in scraped.targets())

    assert targets == [
        ("paceline-autoscaler", None, "up"),
        ("paceline-executor", "e0", "up"),
        ("paceline-scheduler", None, "up"),
    ]


def test_every_panel_has_a_curve(scraped):
    """An expression may be right in each part and empty as a whole: labels on its two sides that do not match."""
    empty = [where for where, expr in expressions("10s") if not scraped.query(expr) and not may_be_empty(where, expr)]

    assert not empty


def test_every_alert_reads_series_that_there_are(scraped):
    """Silent because all is well, and silent because a label is misspelt, look the same."""
    missing = {
        selector_text(*selector)
        for _, expr in expressions()
        for selector in selectors(expr)
        if selector[0] != "ALERTS" and not scraped.query(selector_text(*selector))
    }

    assert not missing


def test_latencies_lead_to_traces(scraped):
    """The dots on the curves of the dashboard are what this answers."""
    found = scraped.eventually(lambda: scraped.exemplars("paceline_first_token_seconds_bucket"))

    assert found[0]["labels"] == {"trace_id": TRACE}
