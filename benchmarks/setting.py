"""Where and with what something was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "numpy", "paceline-server")
_TELLING_FLAGS = (  # of a processor: what products of matrices run on
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)


def setting() -> dict[str, Any]:
    """The machine, the versions, the commit and the date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }


def hardware() -> dict[str, Any]:
    """The processor, the memory and the graphics processors."""
    about = _read("/proc/cpuinfo")
    flags = set(_field(about, r"flags|Features").split())
    total = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _field(about, "model name") or platform.processor() or platform.machine(),
        "cpu_family_and_model": f"{_field(about, 'cpu family')}/{_field(about, 'model')}",  # names hide the generation
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "flags": [flag for flag in _TELLING_FLAGS if flag in flags],
        "memory_mib": int(total[1]) // 1024 if total else None,
        "gpus": [
            _field(path.read_text(), "Model") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        ],
    }


def versions() -> dict[str, str | None]:
    """Python and the packages that what is measured depends on; None: not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def commit() -> dict[str, Any]:
    """The commit of this code, and whether files differ from it; None where it is not in a repository."""
    return {"id": _git("rev-parse", "HEAD"), "is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def in_words(where: dict[str, Any]) -> str:
    """One line for beneath a table."""
    there, used, code = where["hardware"], where["versions"], where["commit"]
    parts = [f"{there['cores']} cores of {there['cpu']}", *there["gpus"], *(flag for flag in there["flags"][-2:])]
    parts += [f"{name} {used[name]}" for name in ("torch", "transformers") if used[name]]
    if code["id"]:
        parts.append(f"{code['id'][:9]}{' and changes' if code['is_dirty'] else ''}")
    return " · ".join([*parts, where["date"][:10]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    """The first value of this name in lines of `name : value`."""
    found = re.search(rf"^(?:{name})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
