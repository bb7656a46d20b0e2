"""What the scheduler answers over HTTP: the status page and what it reads, and Prometheus."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable
from importlib import resources
from typing import TypeVar

from google.protobuf.json_format import MessageToJson

from common.errors import RefusedError
from common.http_pages import HttpPages, Page, PageRequest
from scheduler_svc.fleet import Fleet
from scheduler_svc.observation.metrics import SchedulerMetrics
from scheduler_svc.observation.observer import Observer
from scheduler_svc.observation.overview import MOST_REQUESTS, Overview
from scheduler_svc.observation.service import trace_json
from scheduler_svc.observation.vllm_metrics import VllmMetrics
from scheduler_svc.scaling_lease import ScalingLease

_LOOP_S = 5.0
"""How long a reader waits for the event loop, which has better things to do."""

_REQUESTS = 100
_FRESH_S = 0.5
"""Age of an overview that is shown once more: any number of people may look."""

T = TypeVar("T")


class StatusPages:
    """The pages of a scheduler. What they show is read on its event loop, whoever asks from which thread."""

    def __init__(
        self,
        overview: Overview,
        observer: Observer,
        metrics: SchedulerMetrics,
        vllm: VllmMetrics,
        targets: Callable[[], dict[str, dict[str, str]]],
    ) -> None:
        """Show these; called on the event loop. `targets` are addresses of other processes' metrics, each with its
        labels.
        """
        self._overview, self._observer = overview, observer
        self._targets = targets
        self._texts: dict[str, tuple[float, str]] = {}  # overviews by the requests wanted, and when each was made
        self._lock = threading.Lock()
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
        with self._lock:
            made_at, text = self._texts.get(wanted, (-math.inf, ""))
            if time.monotonic() - made_at > _FRESH_S:  # writing it costs more than making it
                overview = self._on_loop(lambda: self._overview.make(int(wanted)))
                text = MessageToJson(overview, indent=None)
                self._texts = {wanted: (time.monotonic(), text)}
        return Page(text)

    def _api_trace(self, request: PageRequest) -> Page:
        try:
            return Page(self._on_loop(lambda: trace_json(self._observer, request.rest)))
        except RefusedError as error:
            return Page(error.message, "text/plain; charset=utf-8", "404 Not Found")

    def _targets_page(self, request: PageRequest) -> Page:
        """Prometheus' HTTP service discovery: https://prometheus.io/docs/prometheus/latest/http_sd/."""
        targets = {request.host: {"job": "paceline-scheduler"}, **self._on_loop(self._targets)}
        targets.pop("", None)  # whoever names no host finds it by itself
        return Page(json.dumps([{"targets": [target], "labels": labels} for target, labels in targets.items()]))

    def _on_loop(self, look: Callable[[], T]) -> T:
        async def call() -> T:
            return look()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(_LOOP_S)


def metrics_targets(fleet: Fleet, scaling: ScalingLease) -> dict[str, dict[str, str]]:
    """Where the metrics of executors and of the autoscaler are, and what Prometheus should call them."""
    targets = {
        member.joined.metrics_address: {"job": "paceline-executor", "executor_id": name}
        for name, member in fleet.members.items()
    }
    targets[scaling.metrics_address(time.monotonic())] = {"job": "paceline-autoscaler"}
    targets.pop("", None)  # who has none
    return targets
