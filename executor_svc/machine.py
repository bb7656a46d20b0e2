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


def has_nvidia_gpu() -> bool:
    """Whether there is one, whatever torch makes of it."""
    return Path("/dev/nvidiactl").exists()


def available_memory_bytes() -> int:
    """Memory the process can still take without swapping."""
    available = psutil.virtual_memory().available
    limit, used = _read("memory.max"), _read("memory.current")
    if limit.isdigit() and used.isdigit():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def resident_bytes() -> tuple[int, int]:
    """Memory that the process has now, and the most that it ever had; zeros where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return kib.get("VmRSS", 0) * 1024, kib.get("VmHWM", 0) * 1024


def _read(name: str) -> str:
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return ""


def process_age_s() -> float:
    """Seconds since this process was created, loading of its modules included."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine was
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, AttributeError):  # not Linux; psutil knows the moment to a second there
        return max(0.0, time.time() - psutil.Process().create_time())


def calm_openmp() -> None:
    """Let OpenMP's threads sleep at barriers instead of spinning; torch reads these when it is imported.

    Spinning threads that share their cores with a scheduler, a client or another executor slow a decode step tenfold.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
