"""Which processes `paceline serve` runs on one machine, and how they find each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from executor_svc import config as executor_config
from executor_svc.config import ExecutorConfig
from paceline_cli.config_flags import Settings, flags_for
from paceline_cli.gpus import VISIBLE, gpus_of_executors, visible_gpus
from paceline_cli.supervisor import ChildCommand
from scheduler_svc import config as scheduler_config
from scheduler_svc.config import SchedulerConfig

LEAVING_S = 5.0
"""Children keep to their drain time-out themselves; this is for what comes after it."""

_ANY_GPU = ("auto", "cuda")
_CPU_CACHE_LIMIT = 4 << 30  # as of one executor alone: what all of them together take by default


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to share between executors."""

    core_count: int
    gpus: tuple[str, ...]  # none where executors are not placed on any
    available_bytes: int  # memory

    @classmethod
    def here(cls, model: str, device: str) -> Machine:
        """What executors of `model` on `device` may use here.

        Where the user names one GPU (`cuda:1`) it is for all executors.
        """
        affinity = getattr(os, "sched_getaffinity", None)
        from executor_svc.machine import available_memory_bytes

        return cls(
            core_count=len(affinity(0)) if affinity else os.cpu_count() or 1,
            gpus=visible_gpus() if model != "fake" and device in _ANY_GPU else (),
            available_bytes=available_memory_bytes(),
        )


def paceline_command(verb: str, *words: str) -> tuple[str, ...]:
    """A command line of this same program for a child process."""
    return (sys.executable, "-m", "paceline_cli", verb, *words, "--exit-with-parent")


def scheduler_child(
    folder: str, sockets: Path, public_address: str, settings: Settings, more_words: Sequence[str] = ()
) -> ChildCommand:
    """The scheduler: executors reach it over a socket in `sockets`, users at `public_address`."""
    own = _part(SchedulerConfig, settings)
    if not own.get("journal"):
        own["journal"] = f"{sockets}/journal.db"  # for as long as `serve` runs: it restarts the scheduler
    config = SchedulerConfig(model=folder, listen=(scheduler_socket(sockets), public_address), **own)
    return ChildCommand("scheduler", paceline_command("scheduler", folder, *flags_for(config), *more_words))


def executor_children(
    folder: str, sockets: Path, count: int, settings: Settings, machine: Machine, more_words: Sequence[str] = ()
) -> list[ChildCommand]:
    """`count` executors that share the cores and the GPUs of this machine, whether all of them are started or not.

    Raises `CommandError` where there are too few GPUs.
    """
    children = []
    places = _places(count, settings, machine)
    for index, gpus in enumerate(places):
        name = f"executor-{index}"
        shared = _part(ExecutorConfig, settings) | _share(places.count(gpus), count, settings, machine)
        config = ExecutorConfig(
            model=folder,
            scheduler=scheduler_socket(sockets),
            listen=f"unix:{sockets}/{name}.sock",
            executor_id=name,
            **shared,
        )
        command = paceline_command("executor", folder, *flags_for(config), *more_words)
        environment = {VISIBLE: ",".join(gpus)} if gpus else {}
        children.append(ChildCommand(name, command, environment, end_within_s=config.drain_timeout_s + LEAVING_S))
    return children


def autoscaler_child(
    scaling_file: Path, sockets: Path, metrics_port: int = 0, more_words: Sequence[str] = ()
) -> ChildCommand:
    """The autoscaler: it asks the scheduler how much there is to do, and the launcher for executors."""
    addresses = ("--scheduler", scheduler_socket(sockets), "--launcher", launcher_socket(sockets))
    metrics = ("--metrics-port", str(metrics_port))  # PACELINE_METRICS_PORT, which it would inherit, is the scheduler's
    command = paceline_command("autoscaler", "run", str(scaling_file), *addresses, *metrics, *more_words)
    return ChildCommand("autoscaler", command, is_vital=False)  # without it the executors stay as they are


def check_settings(model: str, settings: Settings) -> None:
    """Refuse settings that a child would refuse, before anything is prepared or started. Raises `ValueError`."""
    scheduler_config.check_settings(SchedulerConfig(model=model, **_part(SchedulerConfig, settings)))
    executor_config.check_settings(ExecutorConfig(model=model, **_part(ExecutorConfig, settings)))


def scheduler_socket(sockets: Path) -> str:
    """Where the scheduler listens for the executors of this machine."""
    return f"unix:{sockets}/scheduler.sock"


def launcher_socket(sockets: Path) -> str:
    """Where the autoscaler of this machine asks for executors."""
    return f"unix:{sockets}/launcher.sock"


def _places(count: int, settings: Settings, machine: Machine) -> list[tuple[str, ...]]:
    """The GPUs of each of `count` executors, by name; none where the machine has none for them."""
    if not machine.gpus:
        return [()] * count
    return gpus_of_executors(machine.gpus, count, settings["tensor_parallel"])


def _share(neighbour_count: int, count: int, settings: Settings, machine: Machine) -> Settings:
    """The part of the machine that one of `count` executors takes, where the user did not say. So many have its GPU.

    Example: 4 executors on 8 cores and 2 GPUs get 2 threads each; the first and the third share a GPU, and each of
    them takes half of what one alone would take of its memory.
    """
    if count == 1:
        return {}
    share: Settings = {"threads": settings["threads"] or max(1, machine.core_count // count)}
    if machine.gpus:
        share["device"] = "cuda"  # one whose torch finds no GPU says so, and is not slow beside the others
    if machine.gpus or settings["device"].startswith("cuda"):
        share["memory_utilization"] = settings["memory_utilization"] / neighbour_count
    elif not settings["cache_memory_bytes"]:
        share["cache_memory_bytes"] = min(_CPU_CACHE_LIMIT, machine.available_bytes // 4) // count
    return share


def _part(config: type, settings: Settings) -> dict[str, Any]:
    """Those of `settings` that `config` has."""
    names = {setting.name for setting in fields(config)}
    return {name: value for name, value in settings.items() if name in names}
