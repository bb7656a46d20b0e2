"""What the scheduler answers over HTTP: the status page and what it reads, and Prometheus."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict

from common.errors import RefusedError
from common.http_pages import HttpPages, Page, PageRequest
from common.otlp_json import to_otlp_json
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet
from scheduler_svc.observation.metrics import SchedulerMetrics
from scheduler_svc.observation.overview import MOST_REQUESTS, Overview
from scheduler_svc.observation.service import trace_of
from scheduler_svc.observation.vllm_metrics import VllmMetrics
from scheduler_svc.scaling_lease import ScalingLease

_BUSY_S = 3.0
"""How long a reader waits for the event loop, which has better things to do, and is then answered with 503. Less than
the 5 s for which the page itself waits, so that it can say why there is nothing."""

_REQUESTS = 100
_FRESH_S = 0.5
"""Age of an overview that is shown once more: any number of people may look."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Shown:
    """An overview that may be shown once more."""

    made_at: float
    request_limit: int
    overview: dict[str, Any]  # with as many requests
    texts: dict[int, str] = field(default_factory=dict)  # by the requests in them

    def has(self, wanted: int, now: float) -> bool:
        """Whether it is new enough, and has so many requests."""
        return now - self.made_at <= _FRESH_S and wanted <= self.request_limit

    def text(self, wanted: int) -> str:
        """As JSON, with so many requests."""
        if wanted not in self.texts:
            requests = self.overview.get("requests", [])[:wanted]
            self.texts[wanted] = json.dumps({**self.overview, "requests": requests})
        return self.texts[wanted]


class StatusPages:
    """The pages of a scheduler. What they show is read on its event loop, whoever asks from which thread."""

    def __init__(
        self,
        overview: Overview,
        engine: Engine,
        metrics: SchedulerMetrics,
        vllm: VllmMetrics,
        targets: Callable[[], dict[str, dict[str, str]]],
    ) -> None:
        """Show these; called on the event loop. `targets` are addresses of other processes' metrics, each with its
        labels.
        """
        self._overview, self._engine = overview, engine
        self._targets = targets
        self._shown: _Shown | None = None
        self._lock = threading.Lock()  # of `_shown`
        self._loop = asyncio.get_running_loop()
        self.http = HttpPages(
            [metrics],
            {
                "/": self._page,
                "/api/overview": self._api_overview,
                "/api/trace/": self._api_trace,
                "/sd": self._targets_page,
                "/metrics/vllm": vllm.page,
            },
        )

    def _page(self, _request: PageRequest) -> Page:
        page = resources.files("scheduler_svc").joinpath("status_page/index.html").read_text(encoding="utf-8")
        return Page(page, "text/html; charset=utf-8")

    def _api_overview(self, request: PageRequest) -> Page:
        wanted = request.parameters.get("requests", str(_REQUESTS))
        if not wanted.isdecimal() or len(wanted) > 4 or int(wanted) > MOST_REQUESTS:
            return Page(f"requests must be 0 to {MOST_REQUESTS}", "text/plain", "400 Bad Request")
        return Page(self._overview_text(int(wanted), time.monotonic() + _BUSY_S))

    def _overview_text(self, wanted: int, until: float) -> str:
        """The overview with so many requests. It is made with as many as the page asks for, or with all, and cut:
        whoever asks for other numbers costs nothing.
        """
        if not self._lock.acquire(timeout=_BUSY_S):
            raise TimeoutError("others wait for the event loop already")
        try:
            shown = self._shown
            if shown is None or not shown.has(wanted, time.monotonic()):
                limit = _REQUESTS if wanted <= _REQUESTS else MOST_REQUESTS
                overview = self._on_loop(lambda: self._overview.make(limit), until)
                shown = self._shown = _Shown(time.monotonic(), limit, MessageToDict(overview))
            return shown.text(wanted)
        finally:
            self._lock.release()

    def _api_trace(self, request: PageRequest) -> Page:
        try:
            return Page(to_otlp_json(self._on_loop(lambda: trace_of(self._engine, request.rest))))
        except RefusedError as error:
            return Page(error.message, "text/plain; charset=utf-8", "404 Not Found")

    def _targets_page(self, request: PageRequest) -> Page:
        """Prometheus' HTTP service discovery: https://prometheus.io/docs/prometheus/latest/http_sd/."""
        targets = {request.host: {"job": "paceline-scheduler"}, **self._on_loop(self._targets)}
        targets.pop("", None)  # whoever names no host finds it by itself
        return Page(json.dumps([{"targets": [target], "labels": labels} for target, labels in targets.items()]))

    def _on_loop(self, look: Callable[[], T], until: float | None = None) -> T:
        """What `look` returns on the event loop. Raises `TimeoutError` when that has no time for it."""

        async def call() -> T:
            return look()

        looking = asyncio.run_coroutine_threadsafe(call(), self._loop)
        try:
            return looking.result(_BUSY_S if until is None else max(0.0, until - time.monotonic()))
        except TimeoutError:
            looking.cancel()  # a loop that has been busy need not begin with looks that nobody waits for
            raise


def metrics_targets(fleet: Fleet, scaling: ScalingLease) -> dict[str, dict[str, str]]:
    """Where the metrics of executors and of the autoscaler are, and what Prometheus should call them."""
    targets = {
        member.joined.metrics_address: {"job": "paceline-executor", "executor_id": name}
        for name, member in fleet.members.items()
    }
    targets[scaling.metrics_address(time.monotonic())] = {"job": "paceline-autoscaler"}
    targets.pop("", None)  # who has none
    return targets
