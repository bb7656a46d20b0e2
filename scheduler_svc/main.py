"""The scheduler process: read the serving folder, serve users and executors, drain."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import structlog

from common.grpc_servers import Server
from common.processes import run_loop, stop_event
from common.serving_folder import ServingFolder
from paceline.v1 import fleet_pb2_grpc, inference_pb2_grpc
from paceline.v1 import inference_pb2 as pb
from scheduler_svc.config import SchedulerConfig, check_settings
from scheduler_svc.door import Door
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet
from scheduler_svc.refuse_malformed import RefuseMalformed
from scheduler_svc.service import FleetService, InferenceService
from scheduler_svc.tokenizer import Tokenizer

log = structlog.get_logger()

SERVICES = ("paceline.v1.InferenceService", "paceline.v1.FleetService")
FAKE_FINGERPRINT = "fake"
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


class SchedulerApp:
    """A scheduler on the running event loop: what the process is made of, without the process."""

    def __init__(
        self, config: SchedulerConfig, model_name: str, fingerprint: str, tokenizer: Tokenizer, defaults: dict[str, Any]
    ) -> None:
        """Put the parts together; nothing listens yet."""
        self.engine = Engine(config)
        owner = (int(time.time() * 1000), secrets.token_hex(8))  # a later life has a higher epoch
        self.fleet = Fleet(config, model_name, fingerprint, owner, self.engine)
        self._config = config
        self._server = Server(interceptors=[RefuseMalformed()])
        self.door = Door(config, model_name, tokenizer, defaults)
        model = pb.Model(name=model_name, has_chat_template=tokenizer.has_chat_template)
        inference = InferenceService(self.door, self.engine, self.fleet, model)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server.grpc)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(FleetService(self.fleet, self.engine), self._server.grpc)

    async def start(self) -> list[str]:
        """Listen; returns the addresses with their real ports."""
        addresses = await self._server.start(self._config.listen, SERVICES)
        await self._server.set_serving(True)
        return addresses

    async def run(self, stopping: asyncio.Event) -> None:
        """Watch over the fleet until `stopping` is set, then drain."""
        watching = asyncio.create_task(self.fleet.watch())
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait((watching, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not watching.done():
            await self._drain()
            watching.cancel()
        self.fleet.close()
        await self._server.stop(_LAST_CHUNKS_S)
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
    addresses = await app.start()
    log.info("scheduler ready", addresses=addresses, model=model_name)
    await app.run(stopping)
    return 0
