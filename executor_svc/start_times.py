"""Where the seconds of an executor's start go."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from executor_svc.machine import process_age_s

log = structlog.get_logger()

Progress = Callable[[str, float], None]

_FIELDS = {  # how a phase begins to be called while it lasts -> in the log
    "importing": "imports_s",
    "starting the ranks": "ranks_s",
    "reading the configuration": "configuration_s",
    "building steps in C++": "build_s",
    "loading the weights": "weights_s",
    "packing the weights": "packing_s",
    "testing the model": "self_test_s",
    "running the largest step": "largest_step_s",
    "recording": "recording_s",
    "making the cache": "cache_s",
    "ready": "listening_s",
}


class StartTimes:
    """Passes progress on and adds up how long each phase takes, from the creation of the process on."""

    def __init__(
        self,
        progress: Progress,
        age_s: Callable[[], float] = process_age_s,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._progress = progress
        self._clock = clock
        self._phase = "importing"
        self._since = clock() - age_s()
        self.seconds: dict[str, float] = {}  # by field of the log, of phases that are over

    def __call__(self, phase: str, share: float) -> None:
        """A phase begins, and with it the one before it is over."""
        self._end_phase()
        self._phase = phase
        self._progress(phase, share)

    def log(self) -> None:
        """Say where the seconds went: the start is over."""
        self._end_phase()
        rounded = {field: round(seconds, 2) for field, seconds in self.seconds.items()}
        log.info("executor started", seconds=round(sum(self.seconds.values()), 2), **rounded)

    def _end_phase(self) -> None:
        now = self._clock()
        (field,) = (field for name, field in _FIELDS.items() if self._phase.startswith(name))
        self.seconds[field] = self.seconds.get(field, 0.0) + now - self._since
        self._since = now
