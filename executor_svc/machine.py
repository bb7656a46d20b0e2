"""What this process may use of its machine: a container's limits count, not the host's."""

import os
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_CGROUP = Path("/sys/fs/cgroup")


def usable_core_count() -> int:
    """Cores the process may run on at once, by affinity and by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory_bytes() -> int:
    """Memory the process can still take without swapping."""
    available = psutil.virtual_memory().available
    limit, used = _read("memory.max"), _read("memory.current")
    if limit.isdigit() and used.isdigit():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def _read(name: str) -> str:
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return ""


def process_age_s() -> float:
    """Seconds since this process was created, loading of its modules included."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def calm_openmp() -> None:
    """Let OpenMP's threads sleep at barriers instead of spinning; torch reads these when it is imported.

    Spinning threads that share their cores with a scheduler, a client or another executor slow a decode step tenfold.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
