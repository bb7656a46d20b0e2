"""The scheduler process: read the serving folder, serve users and executors, drain."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from common.errors import RefusedError
from common.grpc_servers import Server
from common.http_pages import HttpPages
from common.processes import run_loop, stop_event
from common.serving_folder import ServingFolder
from common.spans import Origin
from paceline.v1 import fleet_pb2_grpc, inference_pb2_grpc, observation_pb2_grpc
from paceline.v1 import inference_pb2 as pb
from scheduler_svc.admission import Admission
from scheduler_svc.config import SchedulerConfig, check_settings, trace_receiver
from scheduler_svc.door import Door
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet
from scheduler_svc.fleet_service import FleetService
from scheduler_svc.interceptors import ReadContext, TellErrors
from scheduler_svc.journal.journal import Durability, Journal
from scheduler_svc.journal.restored import Restored
from scheduler_svc.load_meter import LoadMeter
from scheduler_svc.observation.metrics import SchedulerMetrics
from scheduler_svc.observation.observer import Observer
from scheduler_svc.observation.overview import SAMPLE_EVERY_S, Overview
from scheduler_svc.observation.pages import StatusPages, metrics_targets
from scheduler_svc.observation.request_spans import SCHEDULER_SERVICE
from scheduler_svc.observation.service import ObservationService
from scheduler_svc.observation.tracing import Tracing
from scheduler_svc.observation.vllm_metrics import VllmMetrics
from scheduler_svc.recorder import Recorder, answer_of, owner_of
from scheduler_svc.refusals import reason_of
from scheduler_svc.scaling_lease import LEASE_S, ScalingLease
from scheduler_svc.service import InferenceService
from scheduler_svc.tokenizer import Tokenizer

if TYPE_CHECKING:
    from common.span_exporter import OtlpSink

log = structlog.get_logger()

SERVICES = ("paceline.v1.InferenceService", "paceline.v1.FleetService", "paceline.v1.ObservationService")
DURABILITY = "paceline.durability"
"""Name under which health says whether what is accepted outlives this process."""

FAKE_FINGERPRINT = "fake"
_SWITCH_S = 0.002
"""How long the event loop may keep the interpreter from the journal's thread. Python's 5 ms, taken again and again by a
busy loop, would hold back what waits to be written for a second."""

_LAST_CHUNKS_S = 5.0  # for slow readers, once every request has ended; over as soon as they have read


def serve(config: SchedulerConfig) -> int:
    """Run a scheduler until it is told to stop; returns the exit code of the process.

    Raises `ValueError` for settings out of range, `ServingFolderError` when the model is not a serving folder,
    `AddressError` when an address cannot be listened on.
    """
    check_settings(config)
    model_name, fingerprint, tokenizer, defaults = load_model(config)
    return run_loop(_serve(config, model_name, fingerprint, tokenizer, defaults))


def load_model(config: SchedulerConfig) -> tuple[str, str, Tokenizer, dict[str, Any]]:
    """What a scheduler needs of the model: name, fingerprint, tokenizer, sampling defaults."""
    if config.model == "fake":
        return config.served_model_name or "fake", FAKE_FINGERPRINT, Tokenizer.bytes(), {}
    folder = ServingFolder.open(config.model)
    name = config.served_model_name or folder.model_name
    return name, folder.fingerprint, Tokenizer.from_folder(folder), folder.generation_defaults()


def _open_sink(config: SchedulerConfig) -> OtlpSink | None:
    """Where traces go, or None; OpenTelemetry is not even imported then."""
    endpoint = trace_receiver(config)
    if not endpoint:
        return None
    from common.span_exporter import OtlpSink

    return OtlpSink(endpoint)


def _open_journal(config: SchedulerConfig) -> Journal:
    if config.journal in ("", "off"):
        return Journal.off()
    sys.setswitchinterval(_SWITCH_S)
    return Journal.open(config.journal, max_bytes=config.journal_bytes)


class SchedulerApp:
    """A scheduler on the running event loop: what the process is made of, without the process."""

    def __init__(
        self, config: SchedulerConfig, model_name: str, fingerprint: str, tokenizer: Tokenizer, defaults: dict[str, Any]
    ) -> None:
        """Put the parts together; nothing listens yet. Raises `JournalError` when there is one that cannot be used."""
        self.journal = _open_journal(config)
        epoch = self.journal.next_epoch(int(time.time() * 1000))  # a later life has a higher epoch
        recorder = self._recorder = Recorder(self.journal, epoch, fingerprint)
        self.sink = _open_sink(config)
        origin = Origin(SCHEDULER_SERVICE, f"{socket.gethostname()}-{os.getpid()}")
        observer = Observer(
            LoadMeter(),
            Tracing(self.sink, config.trace_requests, config.trace_steps),
            origin,
            model_name,
            keep_count=config.keep_timelines,
            keeps_content=config.trace_content,
        )
        self.engine = Engine(config, recorder, observer)
        owner = (epoch, secrets.token_hex(8))
        self.fleet = Fleet(config, model_name, fingerprint, owner, self.engine, self.journal)
        self._config = config
        self._tokenizer = tokenizer
        self._server = Server(interceptors=[ReadContext(), TellErrors(self._note_unreadable)])
        self.door = Door(config, model_name, tokenizer, defaults)
        model = pb.Model(name=model_name, has_chat_template=tokenizer.has_chat_template)
        scaling = self._scaling = ScalingLease(time.monotonic() + LEASE_S if self.journal.restored.epoch else -math.inf)
        admission = Admission(self.door, self.engine, self.fleet, scaling)
        inference = InferenceService(admission, self.engine, self.fleet, model)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server.grpc)
        self._fleet_service = FleetService(self.fleet, self.engine, self.journal, scaling, model_name)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self._fleet_service, self._server.grpc)
        self._overview = Overview(self.fleet, self.engine, self.journal, scaling, model_name)
        observation = ObservationService(self._overview, self.engine)
        observation_pb2_grpc.add_ObservationServiceServicer_to_server(observation, self._server.grpc)
        self.journal.snapshot = lambda: [*self.fleet.records(), *recorder.snapshot(self.engine.answers)]
        self.journal.outputs = lambda: recorder.outputs(self.engine.answers)
        self.journal.shed = self.engine.answers.forget_oldest
        self.journal.on_change = self._tell_health

    def _note_unreadable(self, method: str, error: RefusedError) -> None:
        if method.endswith("/Generate"):  # of a batch, its own handler reads the messages
            self.engine.meter.note_refused(reason_of(error))

    def metrics(self) -> SchedulerMetrics:
        """What Prometheus is told."""
        return SchedulerMetrics(self.door.model_name, self.fleet, self.engine, self.journal, self.sink)

    def pages(self) -> HttpPages:
        """What is answered over HTTP."""
        vllm = VllmMetrics(self.door.model_name, self.fleet, self.engine)
        targets = partial(metrics_targets, self.fleet, self._scaling)
        return StatusPages(self._overview, self.engine, self.metrics(), vllm, targets).http

    async def _sample(self) -> None:
        while True:
            self._overview.sample()
            await asyncio.sleep(SAMPLE_EVERY_S)

    def _restore(self) -> None:
        """Go on where an earlier life left off."""
        restored = self.journal.restored
        self.fleet.restore(restored.joined)
        incarnations = self.fleet.incarnations()
        owners = {}
        requests = [kept for kept in restored.requests if self._recorder.can_go_on(kept)]
        if len(requests) < len(restored.requests):
            forgotten_count = len(restored.requests) - len(requests)
            log.warning("requests for another model are forgotten", request_count=forgotten_count)
        for kept in requests:
            self._recorder.restored(kept)
            answer = answer_of(kept, self._tokenizer)
            owners[answer] = [owner_of(choice, incarnations) for choice in kept.choices]
        self.engine.restore(owners)
        self.journal.restored = Restored()  # every prompt is in there once more
        if requests:
            log.warning(  # somebody killed the scheduler, and this is what became of it
                "requests taken over from the journal",
                request_count=len(requests),
                unfinished_count=self.engine.scheduler.request_count,
            )

    def _tell_health(self) -> None:
        """Serving goes on without the journal, but a watchdog may ask for it by name."""
        is_on = self.journal.durability is Durability.ON
        self._telling = asyncio.ensure_future(self._server.set_state(DURABILITY, serving=is_on))

    async def start(self) -> list[str]:
        """Take over what the journal has, and listen; returns the addresses with their real ports."""
        self._restore()
        addresses = await self._server.start(self._config.listen, SERVICES)
        await self._server.set_serving(True)
        await self._server.set_state(DURABILITY, serving=self.journal.durability is Durability.ON)
        return addresses

    async def run(self, stopping: asyncio.Event) -> None:
        """Watch over the fleet until `stopping` is set, then drain; or until another scheduler has taken over."""
        watching = asyncio.create_task(self.fleet.watch())
        sampling = asyncio.create_task(self._sample())
        events = [asyncio.create_task(event.wait()) for event in (stopping, self.engine.is_fenced)]
        await asyncio.wait((watching, *events), return_when=asyncio.FIRST_COMPLETED)
        for event in events:
            event.cancel()
        if self.engine.is_fenced.is_set():
            await self._server.set_serving(False)
        elif not watching.done():
            await self._drain()
        watching.cancel()
        sampling.cancel()
        self._fleet_service.leave()
        self.engine.close()
        self.fleet.close()
        await self._server.stop(_LAST_CHUNKS_S)
        await self.journal.close()
        if self.sink is not None:
            await asyncio.to_thread(self.sink.close)
        if not watching.cancelled() and watching.done():
            watching.result()  # a bug: nobody watched the leases any more

    async def _drain(self) -> None:
        """Refuse new requests, let those that run finish for as long as is allowed."""
        await self._server.set_serving(False)
        request_count = self.engine.scheduler.request_count
        log.info("draining", request_count=request_count, timeout_s=self._config.drain_timeout_s)
        await self.engine.drain_all(self._config.drain_timeout_s)


async def _serve(
    config: SchedulerConfig, model_name: str, fingerprint: str, tokenizer: Tokenizer, defaults: dict[str, Any]
) -> int:
    stopping = stop_event()
    app = SchedulerApp(config, model_name, fingerprint, tokenizer, defaults)
    pages = app.pages()  # first: a port that is taken ends the process before anybody relies on it
    http_port = pages.start(config.http_port, config.http_host, "--http-port") if config.http_port else 0
    addresses = await app.start()
    log.info("scheduler ready", addresses=addresses, model=model_name, http_port=http_port)
    await app.run(stopping)
    pages.stop()
    return 1 if app.engine.is_fenced.is_set() else 0
