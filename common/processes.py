"""What every service process does around its work: an event loop, stop signals, a release number."""

import asyncio
import importlib.metadata
import os
import signal
from collections.abc import Coroutine
from typing import TypeVar

PROTOCOL_VERSION = 1
"""Newest version of `paceline.internal.v1` that this release speaks."""

OLDEST_PROTOCOL_VERSION = 1
"""Oldest version of it: that of the release before, so that a rolling restart works in either order."""


def common_protocol(newest: int, oldest: int) -> int | None:
    """The newest version that this release and one that speaks `oldest` to `newest` both speak; None: there is none."""
    version = min(newest, PROTOCOL_VERSION)
    return version if version >= max(oldest, OLDEST_PROTOCOL_VERSION) else None


ANY_PORT = -1
"""Stands for a port that the system picks, where 0 means none."""


def _release() -> str:
    try:
        return importlib.metadata.version("paceline-server")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # it runs from a checkout that is only on the path


RELEASE = _release()

T = TypeVar("T")


def run_loop(main: Coroutine[None, None, T]) -> T:
    """Run `main` on uvloop where there is one, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def stop_event() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets: the process should drain. A second signal ends it at once."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return event
