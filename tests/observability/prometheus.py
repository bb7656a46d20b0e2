"""A real Prometheus for tests, and every expression that our dashboards and rules ask it."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "deploy/prometheus/prometheus.yml"
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
ALERT_TESTS = ROOT / "deploy/prometheus/alerts_test.yml"
DASHBOARDS = ROOT / "deploy/grafana/dashboards"
FROM_VENV = Path(sys.prefix) / "prometheus"

_STARTED_WITHIN_S = 30.0
_POLL_S = 0.1

Series = dict[str, Any]  # {"metric": {label: value}, "value": [time, "number"]}
T = TypeVar("T")


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`; the test is skipped where there is none."""
    found = str(FROM_VENV / name) if (FROM_VENV / name).exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: neither in {FROM_VENV}, where `make test` puts Debian's, nor on the PATH")
    return found


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool; its words are in `stdout` and `stderr`."""
    return subprocess.run(
        [program("promtool"), *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )


class QueryError(ValueError):
    """Prometheus does not understand an expression, or cannot answer it; the message is its own."""


class Prometheus:
    """A running server."""

    def __init__(self, address: str, log: Path) -> None:
        """Talk to the one at `address`, whose output goes to `log`."""
        self.url = f"http://{address}"
        self._log = log

    def query(self, expr: str) -> list[Series]:
        """The series that an expression has now; a scalar is one without labels. Raises `QueryError`."""
        data = self._ask("query", query=expr)
        return [{"metric": {}, "value": data["result"]}] if data["resultType"] == "scalar" else data["result"]

    def value(self, expr: str) -> float:
        """The value of an expression that has exactly one series."""
        (series,) = self.query(expr)
        return float(series["value"][1])

    def exemplars(self, selector: str, within_s: float = 600.0) -> list[dict[str, Any]]:
        """Exemplars of the series that a selector names: `{"labels": {"trace_id": …}, "value": …, "timestamp": …}`."""
        now = time.time()
        found = self._ask("query_exemplars", query=selector, start=str(now - within_s), end=str(now))
        return [exemplar for series in found for exemplar in series["exemplars"]]

    def targets(self) -> list[dict[str, Any]]:
        """What is scraped, with `labels`, `health` (up, down, unknown) and `lastError`."""
        return self._ask("targets", state="active")["activeTargets"]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in self._ask("alerts")["alerts"] if alert["state"] == "firing"}

    def eventually(self, look: Callable[[], T], timeout_s: float = 20.0) -> T:
        """What `look` answers as soon as that is not empty; fails with the targets when it stays so."""
        deadline = time.monotonic() + timeout_s
        while not (found := look()):
            if time.monotonic() > deadline:
                states = [(t["labels"], t["health"], t["lastError"]) for t in self.targets()]
                raise AssertionError(f"nothing within {timeout_s:g} s; targets: {states}; log: {self._log.read_text()}")
            time.sleep(_POLL_S)
        return found

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def _ask(self, what: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(json.load(error)["error"]) from error


def short_config(scheduler: str, scrape_interval: str = "1s") -> dict[str, Any]:
    """The deployed configuration for a scheduler whose HTTP port is at `scheduler` (`host:port`), with short times."""
    text = CONFIG.read_text().replace("scheduler:9100", scheduler)
    config = yaml.safe_load(text)
    config["global"] = {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval}
    config["rule_files"] = [str(ALERTS)]
    for job in config["scrape_configs"]:
        for discovery in job.get("http_sd_configs", ()):
            discovery["refresh_interval"] = scrape_interval
    return config


@contextmanager
def running_prometheus(config: dict[str, Any], folder: Path) -> Iterator[Prometheus]:
    """A Prometheus with this configuration, which keeps its data in `folder`, for as long as the context lasts."""
    binary = program("prometheus")
    file, log = folder / "prometheus.yml", folder / "prometheus.log"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{_free_port()}"
    command = [
        binary,
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'prometheus-data'}",
        f"--web.listen-address={address}",
        "--enable-feature=exemplar-storage",
    ]
    with log.open("w") as output, subprocess.Popen(command, cwd=folder, stdout=output, stderr=output) as process:
        try:
            server = Prometheus(address, log)
            deadline = time.monotonic() + _STARTED_WITHIN_S
            while not server.is_ready():
                assert process.poll() is None, f"Prometheus ended: {log.read_text()}"
                assert time.monotonic() < deadline, f"Prometheus is not ready: {log.read_text()}"
                time.sleep(_POLL_S)
            yield server
        finally:
            process.kill()  # its data is thrown away


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def expressions(window: str = "1m") -> list[tuple[str, str]]:
    """Every expression of dashboards and rules, each with where it stands.

    What Grafana would fill in is filled in: rates are over `window`.
    """
    found = [*_of_dashboards(), *_of_rules()]
    return [(where, _filled_in(expr, window)) for where, expr in found]


MAY_BE_EMPTY_OR_ABSENT = {
    "ALERTS": "a series exists only while an alert is pending or fires",
    "paceline_autoscaler_decisions_total": "a series begins with the first decision of its kind",
    "paceline_autoscaler_actions_total": "a series begins with the first action of its kind; never with keda",
    "paceline_autoscaler_never_ready_total": "not there with the actuator keda",
    "paceline_autoscaler_actuator_works": "not there with the actuator keda",
    "paceline_autoscaler_cost_total": "a series begins with the first executor of a node type",
    "paceline_device_memory_bytes": "only on a GPU",
}
"""Metrics that a healthy short run need not have, and why. Every other selector has to find a series."""


def may_be_empty(where: str, expr: str) -> bool:
    """Whether an expression may have no series while everything is well: alerts, and what rests on such metrics."""
    is_comparison = where.startswith("alert ")
    return is_comparison or any(metric in MAY_BE_EMPTY_OR_ABSENT for metric, _ in selectors(expr))


def selectors(expr: str) -> list[tuple[str, dict[str, tuple[str, str]]]]:
    """The metrics that an expression reads, each with its matchers: label -> (operator, value).

    An alert that is silent because a label is misspelt looks like one that is silent because all is well: its
    selectors, asked alone, tell them apart.
    """
    tokens = [*_TOKEN.findall(expr), ""]
    found: list[tuple[str, dict[str, tuple[str, str]]]] = []
    at = 0
    while at < len(tokens) - 1:
        token, after = tokens[at], tokens[at + 1]
        at += 1
        if token in _GROUPINGS:
            at = tokens.index(")", at) + 1
        elif not _NAME.fullmatch(token) or token in _WORDS or after == "(" or after in _GROUPINGS:
            continue  # a function, or no name at all
        elif after == "{":
            end = tokens.index("}", at)
            found.append((token, _matchers(tokens[at + 1 : end])))
            at = end + 1
        else:
            found.append((token, {}))
    return found


def selector_text(name: str, matchers: dict[str, tuple[str, str]]) -> str:
    """A selector as an expression of its own."""
    inside = ",".join(f'{label}{operator}"{value}"' for label, (operator, value) in matchers.items())
    return f"{name}{{{inside}}}"


_TOKEN = re.compile(r'"[^"]*"|[a-zA-Z_:][\w:]*|\d[\w.]*|\[[^\]]*\]|=~|!~|!=|\S')
_NAME = re.compile(r"[a-zA-Z_:][\w:]*")
_GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset"}


def _matchers(tokens: list[str]) -> dict[str, tuple[str, str]]:
    """Of `label = "value" , …`."""
    return {tokens[at]: (tokens[at + 1], tokens[at + 2].strip('"')) for at in range(0, len(tokens), 4)}


def _filled_in(expr: str, window: str) -> str:
    for variable in ("$__rate_interval", "$__interval", "$__range"):
        expr = expr.replace(variable, window)
    assert "$" not in expr, f"a variable of Grafana that the tests do not know: {expr}"
    return expr


def _of_dashboards() -> Iterator[tuple[str, str]]:
    for file in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield f"{file.name}: {panel['title']} [{target['refId']}]", target["expr"]


def of_each_executor(window: str = "1m") -> list[tuple[str, str]]:
    """The expressions that a dashboard shows as a curve for each executor, each with where it stands."""
    targets = [(target["expr"], target.get("legendFormat", "")) for target in _targets()]
    named = {expr for expr, legend in targets if "{{executor_id}}" in legend}
    return [(where, _filled_in(expr, window)) for where, expr in _of_dashboards() if expr in named]


def _targets() -> Iterator[dict[str, Any]]:
    for file in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            yield from panel.get("targets", ())


def _of_rules() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            kind = "alert" if "alert" in rule else "record"
            yield f"{kind} {rule[kind]}", rule["expr"]
