"""Which GPUs `paceline serve` may use, and which of its executors gets which."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from paceline_cli.errors import CommandError, ExitCode

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""What an executor is placed by: it sees the GPUs that this names, and calls the first of them `cuda:0`."""

_NAME = re.compile(r"\d+|GPU-\S+|MIG-\S+")
_ASK_S = 30.0  # a driver that nobody uses takes seconds for each GPU to wake up


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` names them; found without torch, which takes seconds."""
    named = os.environ.get(VISIBLE)
    if named is None:
        return _listed() or _in_dev()
    names = (name.strip() for name in named.split(","))
    return tuple(itertools.takewhile(_NAME.fullmatch, names))  # CUDA too reads to the first that is none, such as -1


def gpus_of_executors(gpus: Sequence[str], executor_count: int, gpus_each: int) -> list[tuple[str, ...]]:
    """The GPUs of each executor; more executors than GPUs share them. Raises `CommandError` where several are wanted
    for each and there are too few: those cannot be shared.

    Example: 3 executors on `0`, `1` get `0`, `1` and `0` again; 2 with 2 each of four get `0`, `1` and `2`, `3`.
    """
    wanted = executor_count * gpus_each
    if gpus_each > 1 and wanted > len(gpus):
        fitting = len(gpus) // gpus_each
        executors = f"{executor_count} executor{'s' if executor_count > 1 else ''}"
        raise CommandError(
            f"{executors} with --tensor-parallel {gpus_each} need {executor_count} x {gpus_each} = {wanted} GPUs, "
            f"and there are {len(gpus)} ({', '.join(gpus)})",
            f"run at most {fitting} executor{'s' if fitting > 1 else ''}, or lower --tensor-parallel"
            if fitting
            else f"lower --tensor-parallel to {len(gpus)} or less",
            exit_code=ExitCode.USAGE,
        )
    first = range(0, wanted, gpus_each)
    return [tuple(gpus[number % len(gpus)] for number in range(at, at + gpus_each)) for at in first]


def unused_gpus_hint(gpu_count: int, executor_count: int, gpus_each: int, setting: str) -> str:
    """What to say where more executors would find GPUs of their own; empty: none would. `setting` says how many.

    Example: `1 of 4 GPUs is used; --executors 4 uses 4`.
    """
    used, possible = executor_count * gpus_each, gpu_count // gpus_each
    if executor_count >= possible:
        return ""
    verb = "is" if used == 1 else "are"
    return f"{used} of {gpu_count} GPUs {verb} used; {setting} {possible} uses {possible * gpus_each}"


def _listed() -> tuple[str, ...]:
    """What the driver says; nothing where there is none. By UUID: its order is that of the slots, and CUDA's is not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    words = (program, "--query-gpu=index,uuid", "--format=csv,noheader")
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=_ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    uuids = (line.partition(",")[2].strip() for line in said.splitlines())
    return tuple(uuid for uuid in uuids if _NAME.fullmatch(uuid))


def _in_dev() -> tuple[str, ...]:
    """As many as have a device file. In a container these keep the numbers of the host, and CUDA counts from 0."""
    count = sum(1 for entry in Path("/dev").glob("nvidia*") if entry.name.removeprefix("nvidia").isdigit())
    return tuple(str(index) for index in range(count))
