"""The thread on which the journal's file is written, so that no step waits for a disk."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable

Work = tuple[Callable[[], None], Callable[[Exception | None], None]]
"""What is to be done, and whom to tell on the loop how it went: with None, or with what it raised."""


class JournalThread:
    """Does one thing after another; the loop is told about each when it is done."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread."""
        self._loop = loop
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None], done: Callable[[Exception | None], None]) -> None:
        """Do `work` after what was submitted before, then call `done` on the loop."""
        self._work.put((work, done))

    def stop(self) -> None:
        """End after what was submitted; returns when the thread has ended."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, done = item
            error = _outcome(work)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                self._loop.call_soon_threadsafe(done, error)
            del item, work, done, error  # records are not kept while the thread waits


def _outcome(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001  whatever it is, the journal lives on without what it did not write
        return error
    return None
