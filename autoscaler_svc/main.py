"""The autoscaler process: watch a scheduler, keep as many executors as are wanted, answer KEDA."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from autoscaler_svc.actuators.make import make_actuator
from autoscaler_svc.arrivals import ArrivalHistory
from autoscaler_svc.autoscaler import Autoscaler
from autoscaler_svc.fleet_client import FleetClient
from autoscaler_svc.keda import ExternalScaler
from autoscaler_svc.metrics import AutoscalerMetrics
from autoscaler_svc.observe import LoadWatch
from autoscaler_svc.scaling_file import ScalingFileError, for_processes, read_scaling_file
from autoscaler_svc.scaling_settings import ScalingSettings
from common.grpc_servers import Server, own_host
from common.http_pages import HttpPages
from common.processes import run_loop, stop_event
from externalscaler import externalscaler_pb2_grpc

log = structlog.get_logger()

_SAVE_EVERY_S = 60.0
_LAST_ANSWERS_S = 1.0


@dataclass(frozen=True, slots=True)
class AutoscalerConfig:
    """What an operator can set on the command line; the rest stands in the scaling file."""

    file: Path
    """The scaling file."""

    scheduler: str = "127.0.0.1:50051"
    """Address of the scheduler: `host:port` or `unix:/path`."""

    launcher: str = ""
    """Address of the launcher of `paceline serve`, in place of the actuator of the file. Empty: what the file says."""

    metrics_port: int = 0
    """Port on which Prometheus finds `/metrics`; the scheduler tells it. 0: none, -1: any."""


def serve(config: AutoscalerConfig) -> int:
    """Run an autoscaler until it is told to stop; returns the exit code of the process.

    Raises `ScalingFileError` for a file that cannot be used, `ActuatorError` where what the actuator needs is not
    installed.
    """
    settings = read_settings(config)
    return run_loop(_serve(config, settings))


def read_settings(config: AutoscalerConfig) -> ScalingSettings:
    """The scaling file, with what the command line puts in its place. Raises `ScalingFileError`."""
    settings = read_scaling_file(config.file)
    return for_processes(settings, str(config.file), config.launcher) if config.launcher else settings


class SettingsFile:
    """The scaling file, read again when it has changed."""

    def __init__(self, config: AutoscalerConfig, on_change: Callable[[ScalingSettings], None]) -> None:
        """Tell `on_change` of every new content that can be used."""
        self._config = config
        self._on_change = on_change
        self._stamp = self._look()

    def check(self) -> None:
        """Look whether it has changed; what is wrong with it is said, and the old content stays."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            settings = read_settings(self._config)
        except ScalingFileError as error:
            log.error("the scaling file is wrong; what it said before holds", reason=str(error))
            return
        log.info("the scaling file has changed", file=str(self._config.file))
        self._on_change(settings)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._config.file)  # follows links: Kubernetes exchanges those
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino


async def _serve(config: AutoscalerConfig, settings: ScalingSettings) -> int:
    stopping = stop_event()
    app = AutoscalerApp(config, settings)
    for line in settings.advice:
        log.warning(line)
    if config.metrics_port:
        app.serve_metrics(config.metrics_port)
    await app.run(stopping)
    return 0


class AutoscalerApp:
    """An autoscaler on the running event loop: what the process is made of, without the process."""

    def __init__(self, config: AutoscalerConfig, settings: ScalingSettings) -> None:
        """Put the parts together. Raises `ActuatorError` where what the actuator needs is not installed."""
        holder = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._watch = LoadWatch(config.scheduler, settings.times.interval_s, settings.targets)
        self._scheduler = config.scheduler
        self._fleet = FleetClient(config.scheduler, holder)
        actuator = make_actuator(settings)
        self.autoscaler = Autoscaler(settings, self._fleet, actuator, history=_load_history(settings.history))
        self._file = SettingsFile(config, self.autoscaler.change_settings)
        self._keda = ExternalScaler(self.autoscaler)
        self._server = Server() if settings.keda is not None else None

    def serve_metrics(self, port: int) -> None:
        """Answer Prometheus, and have the scheduler say where. Raises `AddressError` when the port is taken."""
        try:
            host = own_host(self._scheduler)
        except OSError as error:
            host = ""
            log.warning("the scheduler cannot tell Prometheus of this autoscaler", reason=str(error))
        pages = HttpPages([AutoscalerMetrics(self.autoscaler)])
        port = pages.start(port, "127.0.0.1" if host == "127.0.0.1" else "0.0.0.0")
        self._fleet.metrics_address = f"{host}:{port}" if host else ""

    async def run(self, stopping: asyncio.Event) -> None:
        """Go round until `stopping` is set. What was launched goes on without it."""
        await self._serve_keda()
        loop = asyncio.get_running_loop()
        watching = asyncio.create_task(self._watch.keep())
        leasing = asyncio.create_task(self._fleet.keep())
        stop = asyncio.create_task(stopping.wait())
        saved_at = loop.time()
        try:
            while not stopping.is_set():
                coming = asyncio.create_task(self._watch.next(2 * self.autoscaler.settings.times.interval_s))
                await asyncio.wait((coming, stop, watching, leasing), return_when=asyncio.FIRST_COMPLETED)
                for keeping in (watching, leasing):
                    if keeping.done():
                        keeping.result()  # a bug: it goes on until it is cancelled
                if stopping.is_set():
                    coming.cancel()
                    break
                self._file.check()
                await self.autoscaler.look(await coming or self._watch.load)
                if loop.time() - saved_at > _SAVE_EVERY_S:
                    saved_at = loop.time()
                    await asyncio.to_thread(self._save_history)
        finally:
            for task in (watching, leasing, stop):
                task.cancel()
            await asyncio.gather(watching, leasing, stop, return_exceptions=True)
            if self.autoscaler.hands is not None:
                await self.autoscaler.hands.close()
            await asyncio.to_thread(self._save_history)
            await self._leave_keda()
            await self._fleet.close()

    async def _serve_keda(self) -> None:
        keda = self.autoscaler.settings.keda
        if self._server is None or keda is None:
            return
        externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(self._keda, self._server.grpc)
        addresses = await self._server.start([keda.listen], ["externalscaler.ExternalScaler"])
        await self._server.set_serving(True)
        log.info("answering KEDA", addresses=addresses)

    async def _leave_keda(self) -> None:
        if self._server is not None:
            await self._server.set_serving(False)
            self._keda.close()
            await self._server.stop(_LAST_ANSWERS_S)

    def _save_history(self) -> None:
        path = self.autoscaler.settings.history
        if path:
            try:
                self.autoscaler.history.save(Path(path))
            except OSError as error:
                log.error(
                    "cannot keep what arrived; forecasts by day will be missing after a restart", reason=str(error)
                )


def _load_history(path: str) -> ArrivalHistory:
    if not path or not Path(path).exists():
        return ArrivalHistory()
    try:
        return ArrivalHistory.load(Path(path))
    except (ValueError, OSError) as error:
        log.error("begins without history", reason=str(error))
    return ArrivalHistory()
