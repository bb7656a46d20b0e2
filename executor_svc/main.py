"""The executor process: load, serve, join, drain."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable

import structlog

from common.grpc_servers import Server, reachable
from common.processes import run_loop, stop_event
from executor_svc.batch import Runner
from executor_svc.config import ExecutorConfig
from executor_svc.executor import Executor
from executor_svc.membership import Membership, RefusedError
from executor_svc.service import ExecutorService, ModelThread
from paceline.internal.v1 import executor_pb2_grpc

log = structlog.get_logger()

Progress = Callable[[str, float], None]


def serve(config: ExecutorConfig, progress: Progress | None = None) -> int:
    """Run an executor until it is told to stop; returns the exit code of the process.

    `progress` is called with a phase and its share done, 0 to 1, while the model loads. Raises `ValueError` with a
    remedy when the model cannot be loaded or the settings contradict each other, `AddressError` when the address
    cannot be listened on.
    """
    runner = load_runner(config, progress or (lambda _phase, _share: None))
    return run_loop(_serve(config, runner))


def load_runner(config: ExecutorConfig, progress: Progress) -> Runner:
    """Load what `config.model` names."""
    check_config(config)
    if config.model == "fake":
        from executor_svc.fake import FakeRunner

        return FakeRunner(config)
    from executor_svc.torch_runner import TorchRunner

    return TorchRunner.load(config, progress)


def check_config(config: ExecutorConfig) -> None:
    """Refuse settings that contradict each other, whatever the model is."""
    size = config.block_size
    if size < 1 or size & (size - 1):
        raise ValueError(f"--block-size must be a power of two, got {size}")
    if not 1 <= config.max_num_seqs <= 65535:
        raise ValueError(f"--max-num-seqs must be 1 to 65535, got {config.max_num_seqs}")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ValueError(
            f"--max-num-batched-tokens {config.max_num_batched_tokens} is less than --max-num-seqs "
            f"{config.max_num_seqs}: a step could not give every running request its token; raise the one or lower "
            f"the other"
        )


async def _serve(config: ExecutorConfig, runner: Runner) -> int:
    stopping = stop_event()
    broken = asyncio.Event()
    incarnation = secrets.randbits(64) | 1
    thread = ModelThread(Executor(runner), asyncio.get_running_loop())
    service = ExecutorService(thread, incarnation, on_broken=lambda _message: broken.set())
    server = Server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(service, server.grpc)
    (address,) = await server.start([config.listen], ["paceline.internal.v1.ExecutorService"])
    executor_id = config.executor_id or f"{socket.gethostname()}-{os.getpid()}"
    membership = Membership(
        config.scheduler, executor_id, incarnation, config.advertise or reachable(address), runner.info
    )
    await server.set_serving(True)
    info = runner.info
    log.info(
        "executor ready",
        executor_id=executor_id,
        address=address,
        model=info.name,
        dtype=info.dtype,
        cache_tokens=info.block_count * info.block_size,
        cache_mib=info.cache_bytes // 2**20,
    )
    keeping = asyncio.create_task(membership.keep())
    events = [asyncio.create_task(event.wait()) for event in (stopping, broken)]
    await asyncio.wait((keeping, *events), return_when=asyncio.FIRST_COMPLETED)
    if stopping.is_set() and not keeping.done():
        await _drain(config, server, membership, service, keeping)
    for task in (keeping, *events):
        task.cancel()
    refused = (await asyncio.gather(keeping, return_exceptions=True))[0]
    await server.stop()
    if broken.is_set():
        # The device may never give its thread back: do not wait for it.
        log.error("device broken, process ends")
        os._exit(1)
    if isinstance(refused, RefusedError):
        log.error("refused by the scheduler", reason=str(refused))
        return 1
    thread.stop()
    return 0


async def _drain(
    config: ExecutorConfig, server: Server, membership: Membership, service: ExecutorService, keeping: asyncio.Task
) -> None:
    """Take nothing new; wait until the scheduler says that nothing is left, or for as long as is allowed.

    What still runs after that goes on elsewhere: the end of the stream tells the scheduler.
    """
    log.info("draining", timeout_s=config.drain_timeout_s)
    await server.set_serving(False)
    membership.leave()
    if membership.joined.is_set():
        detached = asyncio.create_task(service.detached.wait())
        await asyncio.wait((detached, keeping), timeout=config.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        detached.cancel()
