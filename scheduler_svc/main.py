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
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.door import Door
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet
from scheduler_svc.refuse_malformed import RefuseMalformed
from scheduler_svc.service import FleetService, InferenceService
from scheduler_svc.tokenizer import Tokenizer

log = structlog.get_logger()

SERVICES = ("paceline.v1.InferenceService", "paceline.v1.FleetService")
FAKE_FINGERPRINT = "fake"


def serve(config: SchedulerConfig) -> int:
    """Run a scheduler until it is told to stop; returns the exit code of the process.

    Raises `ServingFolderError` when the model is not a serving folder, `AddressError` when an address cannot be
    listened on.
    """
    model_name, fingerprint, tokenizer, defaults = load_model(config)
    return run_loop(_serve(config, model_name, fingerprint, tokenizer, defaults))


def load_model(config: SchedulerConfig) -> tuple[str, str, Tokenizer, dict[str, Any]]:
    """What a scheduler needs of the model: name, fingerprint, tokenizer, sampling defaults."""
    if config.model == "fake":
        return config.served_model_name or "fake", FAKE_FINGERPRINT, Tokenizer.bytes(), {}
    folder = ServingFolder.open(config.model)
    name = config.served_model_name or folder.model_name
    return name, folder.fingerprint, Tokenizer.from_folder(folder), folder.generation_defaults()


async def _serve(
    config: SchedulerConfig, model_name: str, fingerprint: str, tokenizer: Tokenizer, defaults: dict[str, Any]
) -> int:
    stopping = stop_event()
    engine = Engine(config)
    owner = (int(time.time() * 1000), secrets.token_hex(8))  # a later life has a higher epoch
    fleet = Fleet(config, model_name, fingerprint, owner, engine)
    door = Door(config, model_name, tokenizer, defaults)
    model = pb.Model(name=model_name, has_chat_template=tokenizer.has_chat_template)
    server = Server(interceptors=[RefuseMalformed()])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(door, engine, fleet, model), server.grpc)
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(FleetService(fleet, engine), server.grpc)
    addresses = await server.start(config.listen, SERVICES)
    await server.set_serving(True)
    log.info("scheduler ready", addresses=addresses, model=model_name)
    watching = asyncio.create_task(fleet.watch())
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait((watching, stopped), return_when=asyncio.FIRST_COMPLETED)
    if watching.done():
        watching.result()  # a bug: nobody watches the leases any more, so say so and end
    await server.set_serving(False)
    await _drain(config, engine)
    watching.cancel()
    fleet.close()
    await server.stop(0.5)
    return 0


async def _drain(config: SchedulerConfig, engine: Engine) -> None:
    """Refuse new requests, let those that run finish for as long as is allowed."""
    engine.draining = True
    log.info("draining", request_count=engine.scheduler.request_count, timeout_s=config.drain_timeout_s)
    try:
        await asyncio.wait_for(engine.drained(), config.drain_timeout_s)
    except TimeoutError:
        log.warning("requests are cut off", request_count=engine.scheduler.request_count)
