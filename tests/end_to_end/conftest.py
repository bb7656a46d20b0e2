"""Tiny models for whole systems, and processes that are gone when their test is."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from executor_svc.torch_runner import TorchRunner
from tests.end_to_end.processes import Services
from tests.executor_svc.conftest import load_runner, serving_folder, ties_stay_rare

__all__ = ["load_runner", "serving_folder", "ties_stay_rare"]


@pytest.fixture
def tight_runners(load_runner: Callable[..., TorchRunner]) -> Callable[..., list[TorchRunner]]:
    """Runners of one architecture with steps of few tokens and caches of few blocks."""

    def load(architecture: str, count: int, block_count: int) -> list[TorchRunner]:
        roomy = load_runner(architecture).info
        block_bytes = roomy.cache_bytes // (roomy.block_count + 1)  # one more than counts pads
        memory = (block_count + 1) * block_bytes
        runners = [
            load_runner(architecture, cache_memory_bytes=memory, max_num_batched_tokens=16) for _ in range(count)
        ]
        assert [runner.info.block_count for runner in runners] == [block_count] * count
        return runners

    return load


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    """A scheduler process to be started, with its executors; killed and removed after the test."""
    folder = Path(tempfile.mkdtemp(prefix="paceline-"))  # a socket's path has at most 107 bytes
    running = Services(folder)
    try:
        yield running
    finally:
        running.kill_all()
        await running.close()
        await asyncio.to_thread(shutil.rmtree, folder)
