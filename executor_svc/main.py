"""The executor process: load, serve, join, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import threading
import time

import structlog

from common.grpc_servers import Server, reachable
from common.http_pages import HttpPages
from common.processes import run_loop, stop_event
from executor_svc.batch import Runner
from executor_svc.config import ExecutorConfig, check_settings
from executor_svc.executor import BrokenDeviceError, Executor
from executor_svc.machine import has_nvidia_gpu, process_age_s
from executor_svc.membership import Membership, RefusedError
from executor_svc.metrics import ExecutorMetrics
from executor_svc.model_thread import ModelThread
from executor_svc.service import ExecutorService
from executor_svc.start_times import Progress, StartTimes
from paceline.internal.v1 import executor_pb2_grpc

log = structlog.get_logger()

_LAST_STEP_S = 5.0
"""How long the step that runs may still take when everything else has ended."""

_LOCAL = ("127.0.0.1", "localhost", "[::1]")


def serve(config: ExecutorConfig, progress: Progress | None = None) -> int:
    """Run an executor until it is told to stop; returns the exit code of the process.

    `progress` is called with a phase and its share done, 0 to 1, while the model loads. Raises `ValueError` with a
    remedy when the model cannot be loaded or the settings contradict each other, `AddressError` when the address
    cannot be listened on.
    """
    times = StartTimes(progress or (lambda _phase, _share: None))
    runner = load_runner(config, times)
    return run_loop(_serve(config, runner, times))


def load_runner(config: ExecutorConfig, progress: Progress) -> Runner:
    """Load what `config.model` names."""
    check_settings(config)
    if config.model == "fake":
        from executor_svc.fake import FakeRunner

        time.sleep(config.fake_load_us / 1e6)
        return FakeRunner(config)
    if config.tensor_parallel > 1:
        from executor_svc.ranks.runner import RankedRunner

        return RankedRunner.load(config, progress)
    _begin_building(config)
    from executor_svc.torch_runner import TorchRunner

    return TorchRunner.load(config, progress)


def _begin_building(config: ExecutorConfig) -> None:
    """Let the compiler work while libraries are imported, where a CPU may want steps in C++.

    Whoever asks for the library later waits for this one, or learns then why there is none.
    """
    from executor_svc.native.build import NativeUnavailableError, library_path

    def build() -> None:
        with contextlib.suppress(NativeUnavailableError):
            library_path()

    if config.native and (config.device == "cpu" or (config.device == "auto" and not has_nvidia_gpu())):
        threading.Thread(target=build, name="native-build", daemon=True).start()


class ExecutorApp:
    """An executor on the running event loop: what the process is made of, without the process."""

    def __init__(self, config: ExecutorConfig, runner: Runner) -> None:
        """Put the parts together; nothing listens yet."""
        self.executor_id = config.executor_id or f"{socket.gethostname()}-{os.getpid()}"
        self.broken = asyncio.Event()  # the device is beyond help
        self._config = config
        self._runner = runner
        self._startup_s = process_age_s()
        self._incarnation = secrets.randbits(64) | 1
        self._metrics = ExecutorMetrics(self.executor_id, runner) if config.metrics_port else None
        self._thread = ModelThread(Executor(runner), asyncio.get_running_loop(), self._metrics)
        self._service = ExecutorService(
            self._thread, self._incarnation, config.resume_window_s, on_broken=lambda _message: self.broken.set()
        )
        self._server = Server()
        executor_pb2_grpc.add_ExecutorServiceServicer_to_server(self._service, self._server.grpc)

    async def start(self) -> str:
        """Listen; returns the address with its real port."""
        (address,) = await self._server.start([self._config.listen], ["paceline.internal.v1.ExecutorService"])
        advertised = self._config.advertise or reachable(address, self._config.scheduler)
        self._membership = Membership(
            self._config.scheduler,
            self.executor_id,
            self._incarnation,
            advertised,
            self._runner.info,
            self._startup_s,
            self._serve_metrics(advertised),
        )
        await self._server.set_serving(True)
        return address

    def _serve_metrics(self, advertised: str) -> str:
        """Answer Prometheus where that is wanted; returns the address for the scheduler to tell. As far as the executor
        itself can be reached, its metrics can.
        """
        if self._metrics is None:
            return ""
        host = "127.0.0.1" if advertised.startswith("unix:") else advertised.rpartition(":")[0]
        everywhere = "::" if host.startswith("[") else "0.0.0.0"
        pages = HttpPages([self._metrics])
        port = pages.start(self._config.metrics_port, host if host in _LOCAL else everywhere)
        return f"{host}:{port}"

    async def run(self, stopping: asyncio.Event) -> None:
        """Be a member of the fleet until `stopping` is set, then drain; or until the scheduler lets it go.

        Raises `RefusedError` when there is no place in the fleet for this executor, `BrokenDeviceError` when the device
        is beyond help.
        """
        keeping = asyncio.create_task(self._membership.keep())
        events = [asyncio.create_task(event.wait()) for event in (stopping, self.broken, self._service.let_go)]
        try:
            await asyncio.wait((keeping, *events), return_when=asyncio.FIRST_COMPLETED)
            if self._service.let_go.is_set():
                log.info("drained: the scheduler lets this executor go")
            elif stopping.is_set() and not keeping.done():
                await self._drain(keeping)
        finally:
            for task in (keeping, *events):
                task.cancel()
            (outcome, *_) = await asyncio.gather(keeping, *events, return_exceptions=True)
            await self._server.stop()
            self._thread.stop()
        if self.broken.is_set():
            raise BrokenDeviceError("the device does not work any more")
        if isinstance(outcome, Exception):
            raise outcome

    def join_thread(self) -> bool:
        """Wait a little for the step that runs now; returns whether it has ended."""
        return self._thread.join(_LAST_STEP_S)

    async def _drain(self, keeping: asyncio.Task[None]) -> None:
        """Take nothing new; wait until the scheduler detaches because nothing is left, or for as long as is allowed.

        What still runs after that goes on elsewhere: the end of the stream tells the scheduler.
        """
        log.info("draining", timeout_s=self._config.drain_timeout_s)
        await self._server.set_serving(False)
        self._membership.leave()
        detached = asyncio.create_task(self._service.detached.wait())
        waiting = (detached, keeping)
        await asyncio.wait(waiting, timeout=self._config.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        detached.cancel()


async def _serve(config: ExecutorConfig, runner: Runner, times: StartTimes) -> int:
    stopping = stop_event()
    app = ExecutorApp(config, runner)
    address = await app.start()
    info = runner.info
    log.info(
        "executor ready",
        executor_id=app.executor_id,
        address=address,
        model=info.name,
        dtype=info.dtype,
        mode=info.mode,
        devices=info.device_count,
        cache_blocks=info.block_count,
        block_tokens=[group.block_size for group in info.layer_groups],
        cache_mib=info.cache_bytes // 2**20,
    )
    times.log()
    exit_code, is_broken = 0, False
    try:
        await app.run(stopping)
    except (RefusedError, BrokenDeviceError) as error:
        log.error("the executor ends", reason=str(error))
        exit_code, is_broken = 1, isinstance(error, BrokenDeviceError)
    has_ended = await asyncio.to_thread(app.join_thread)
    if not has_ended or is_broken or info.device_count > 1:
        # A stuck device never gives its thread back, a broken one its memory, nor NCCL a process that others expect.
        os._exit(exit_code)
    return exit_code
