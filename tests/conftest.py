"""What every test starts from."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are interpreted or not from where they are defined on
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts the tests in the background says so
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_logs() -> Iterator[None]:
    """Logs go where this test's output goes, not to a stream that an earlier test had."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
