"""Serving folders and runners of tiny models, made once for all tests of the executor."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from executor_svc.config import ExecutorConfig
from executor_svc.torch_runner import TorchRunner
from tests import parity, tiny_models

HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler here, so steps run in torch")


@pytest.fixture(scope="session")
def serving_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The serving folder of an architecture."""

    @cache
    def make(architecture: str) -> Path:
        return tiny_models.save_serving_folder(architecture, tmp_path_factory.mktemp(architecture))

    return make


def load_folder(folder: Path, **settings: Any) -> TorchRunner:
    """Load a small runner of a serving folder; keyword arguments change its settings."""
    small = {
        "model": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "block_size": 4,
        "keep_checks": False,
        "cache_memory_bytes": 4 << 20,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    return TorchRunner.load(ExecutorConfig(**(small | settings)), lambda phase, fraction: None)


@pytest.fixture(scope="session")
def load_runner(serving_folder: Callable[[str], Path]) -> Callable[..., TorchRunner]:
    """Load a small runner of an architecture; keyword arguments change its settings."""

    def load(architecture: str, **settings: Any) -> TorchRunner:
        return load_folder(serving_folder(architecture), **settings)

    return load


@pytest.fixture(scope="session", autouse=True)
def ties_stay_rare() -> Iterator[None]:
    """Hold the ties of all comparisons of a test run to what chance allows."""
    yield
    parity.counter.check()
