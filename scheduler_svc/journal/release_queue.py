"""What waits for the disk, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class ReleaseQueue:
    """Calls back in the order of arrival: each once the count that it waits for is reached, and after all before it.

    A callback that is added by another one runs after that, never inside it. What a callback raises is logged.
    """

    def __init__(self) -> None:
        """Start with nobody waiting."""
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._reached_count = 0
        self._running = False

    def add(self, count: int, callback: Callable[[], None]) -> None:
        """Have `callback` wait until `count` is reached; it runs inside this call if that is so and nobody waits."""
        self._waiting.append((count, callback))
        self._run()

    def reach(self, count: int) -> None:
        """Release whoever waits for `count` or less."""
        self._reached_count = count
        self._run()

    def _run(self) -> None:
        if self._running:
            return
        self._running = True
        try:
            while self._waiting and self._waiting[0][0] <= self._reached_count:
                _, callback = self._waiting.popleft()
                try:
                    callback()
                except Exception:
                    log.exception("a callback of the journal failed")
        finally:
            self._running = False
