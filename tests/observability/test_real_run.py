"""A real Prometheus watches a real service: every panel and every alert finds what it asks for."""

import json
import os
import re
import signal
import urllib.request

import psutil
import pytest

from paceline import Client
from tests.observability.metric_names import METRICS
from tests.observability.otlp_receiver import OtlpReceiver
from tests.observability.prometheus import (
    MAY_BE_EMPTY_OR_ABSENT,
    expressions,
    may_be_empty,
    program,
    running_prometheus,
    selector_text,
    selectors,
    short_config,
)
from tests.paceline_cli.conftest import wait_until
from tests.paceline_cli.test_serve import Served

FILE = """
executors: {min: 1, max: 2}
node_types: [{name: local, price_per_hour: 1.5}]
policies: [{kind: concurrency, target: 4, stable_window: 2s, panic_window: 1s}]
cooldowns: {down: 2s}
times: {interval: 200ms, finish: 0}
"""


@pytest.fixture(scope="module")
def receiver():
    receiver = OtlpReceiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory, receiver):
    """Scheduler, autoscaler and one or two executors, with everything that can be looked at."""
    folder = tmp_path_factory.mktemp("served")
    file = folder / "scaling.yaml"
    file.write_text(FILE)
    running = Served(
        folder / "printed",
        *("--scaling", str(file), "--http-port", "-1", "--otlp-endpoint", receiver.endpoint),
        *("--fake-step-us", "10000", "--log-level", "info", "--drain-timeout", "2"),
    )
    yield running
    running.process.terminate()
    running.process.wait(60)


@pytest.fixture(scope="module")
def page(served):
    """Address of the scheduler's HTTP port."""
    assert served.address
    return wait_until(lambda: re.search(r"status page http://(\S+)", served.printed))[1]


@pytest.fixture(scope="module")
def watched(served, page, tmp_path_factory):
    """A Prometheus that has watched it under load."""
    program("prometheus")
    with running_prometheus(short_config(page), tmp_path_factory.mktemp("prometheus")) as prometheus:
        with Client(served.address) as client:
            prompts = [f"{'the same beginning ' * 8}{number}" for number in range(64)]
            for _ in range(3):
                client.generate_batch(prompts, max_output_tokens=24)
            prometheus.eventually(lambda: len(prometheus.query("count_over_time(up[1m]) >= 4")) >= 3, 60)
            client.generate_batch(prompts, max_output_tokens=24)
        yield prometheus


def get(page, path):
    with urllib.request.urlopen(f"http://{page}{path}", timeout=10) as answer:
        return answer.read().decode()


def overview(page):
    return json.loads(get(page, "/api/overview"))


def test_every_process_is_found_through_the_scheduler(watched):
    """Executors that come by themselves are watched by themselves."""
    jobs = {target["labels"]["job"] for target in watched.targets()}

    assert jobs == {"paceline-scheduler", "paceline-executor", "paceline-autoscaler"}


def test_every_metric_that_dashboards_may_use_is_there(watched):
    """The list that expressions are held to is the truth, not a wish."""
    missing = [name for name in METRICS if name not in MAY_BE_EMPTY_OR_ABSENT and not watched.query(name)]

    assert not missing


def test_every_panel_has_a_curve(watched):
    """An empty panel in the hour of need is worse than none."""
    empty = [where for where, expr in expressions("10s") if not watched.query(expr) and not may_be_empty(where, expr)]

    assert not empty


def test_every_alert_reads_series_that_there_are_and_none_fires(watched):
    """All is well here: an alert that fires cries wolf, one without series never would."""
    missing = {
        selector_text(*selector)
        for _, expr in expressions()
        for selector in selectors(expr)
        if selector[0] not in MAY_BE_EMPTY_OR_ABSENT and not watched.query(selector_text(*selector))
    }

    assert not missing
    assert not watched.firing()


def test_memory_is_shown_of_every_process(watched):
    """A panel with the curves of some looks like one in which the others take nothing."""
    (expr,) = [expr for where, expr in expressions() if "How much memory do processes take? [A]" in where]
    jobs = {series["metric"]["job"] for series in watched.query(expr)}

    assert jobs == {"paceline-scheduler", "paceline-executor", "paceline-autoscaler"}


def test_a_late_first_token_leads_to_its_trace(watched, receiver):
    """From the dot on the curve to the trace: the exemplar names one that the backend has."""
    found = watched.eventually(lambda: watched.exemplars("paceline_first_token_seconds_bucket"))
    known = {root.span.trace_id.hex() for root in receiver.roots()}

    assert {exemplar["labels"]["trace_id"] for exemplar in found} & known


def test_dashboards_made_for_vllm_find_their_names(watched, page):
    """Colons in names survive only in the classic format; autoscalers ask for these three at least."""
    text = get(page, "/metrics/vllm")

    for name in ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert f'{name}{{engine="0",model="fake",model_name="fake"}}' in text
    labels = 'engine="0",{}model="fake",model_name="fake"'
    assert f'vllm:request_success_total{{{labels.format("""finished_reason="length",""")}}} 256.0' in text
    for name in ("time_to_first_token", "request_inference_time"):
        assert f"vllm:{name}_seconds_count{{{labels.format('')}}} 256.0" in text
    assert f"vllm:request_max_num_generation_tokens_sum{{{labels.format('')}}} {256 * 24}.0" in text


def test_the_page_and_what_it_reads_are_served(served, page):
    """One port, no other software: whoever has a browser sees what runs."""
    with Client(served.address) as client:
        client.generate("hello", max_output_tokens=4, request_id="seen/<b>", stream=False)
    overview = json.loads(get(page, "/api/overview?requests=1000"))
    trace = json.loads(get(page, "/api/trace/seen%2F%3Cb%3E"))

    assert "<title>" in get(page, "/")
    assert overview["load"]["model"] == "fake"
    assert any(one["requestId"] == "seen/<b>" and one["outcome"] == "length" for one in overview["requests"])
    names = [span["name"] for one in trace["resourceSpans"] for scope in one["scopeSpans"] for span in scope["spans"]]
    assert {"text_completion fake", "queue", "prefill", "decode"} <= set(names)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(page, "/api/trace/unknown")


def test_an_executor_that_was_killed_is_seen_to_be_gone_and_back(served, page, watched):
    """Who takes its place is watched under its name, and what happened to its requests is counted."""
    with Client(served.address) as client:
        stream = client.generate("hello", max_output_tokens=200, request_id="moves")
        next(stream)
        # An overview that was made for somebody else may be shown for half a second more.
        shown = wait_until(lambda: [one for one in overview(page)["requests"] if one["requestId"] == "moves"])
        where = shown[0]["phases"][-1]["executorId"]
        (pid,) = [one.pid for one in psutil.Process(served.process.pid).children() if where in one.cmdline()]
        os.kill(pid, signal.SIGKILL)
        tokens = 1 + sum(len(chunk.token_ids) for chunk in stream)

    assert tokens == 200
    watched.eventually(lambda: watched.query("sum(paceline_moves_total{cause='lost'}) >= 1"))
    watched.eventually(lambda: watched.query("sum(paceline_executors{state='ready'}) >= 1"))
