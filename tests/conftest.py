"""What every test starts from."""

import os
import signal
from collections.abc import Iterator

import pytest
import structlog

# The tests run on a CPU, where there is a GPU too; kernels are interpreted from where they are defined on. Those marked
# `gpu` are run by benchmarks/gpu_check.sh, which says 0.
if os.environ.get("TRITON_INTERPRET") != "0":
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts the tests in the background says so
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_logs() -> Iterator[None]:
    """Logs go where this test's output goes, not to a stream that an earlier test had."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
