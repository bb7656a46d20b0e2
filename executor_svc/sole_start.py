"""One start at a time on a GPU that several executors share."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import structlog
import torch

from executor_svc.cache_home import default_cache_home
from executor_svc.start_times import Progress

log = structlog.get_logger()


@contextmanager
def sole_start(device: torch.device, progress: Progress) -> Iterator[None]:
    """Have other executors that start on the same GPU wait until this is left; wait for one that came before.

    What a start takes is measured by what the whole GPU has left: what another took meanwhile would count as its own
    and leave it no cache. The system lets go of the lock when the process ends, however it does.
    """
    with ExitStack() as until_the_end:
        if device.type == "cuda":
            path = default_cache_home() / "starts" / f"{torch.cuda.get_device_properties(device).uuid}.lock"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _lock(until_the_end.enter_context(path.open("wb")).fileno(), progress)
            except OSError as error:  # read-only, or a network's without locks: so be it, who starts alone needs none
                log.warning("several starts on one GPU are not kept apart", reason=str(error))
        yield


def _lock(descriptor: int, progress: Progress) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress("waiting for another executor that starts on this GPU", 0.0)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
