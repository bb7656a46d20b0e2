"""Building the native step with the machine's own C++ compiler, once for each processor."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from threading import Lock

from executor_svc.cache_home import default_cache_home

_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
    "-shared", "-fPIC", "-pthread", "-w",
)  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
_TIME_LIMIT_S = 120
_building = Lock()  # it may have been begun early, on another thread
_failures: dict[Path, str] = {}  # why a library could not be built: who asks again need not wait for that again


class NativeUnavailableError(Exception):
    """The native step cannot run here, or not this model; the message says why."""


def library_path() -> Path:
    """The built library, from the cache where it was built before. Raises `NativeUnavailableError`."""
    compiler = _compiler()
    try:
        path = default_cache_home() / "native" / f"step-{_key(compiler)}.so"
        with _building:
            if not path.exists():
                _build_once(compiler, path)
    except (OSError, RuntimeError) as error:
        raise NativeUnavailableError(f"the library cannot be kept: {error}; set PACELINE_CACHE") from error
    return path


def _build_once(compiler: str, path: Path) -> None:
    """Build, unless that has failed before. Another process may have managed to since."""
    if path in _failures:
        raise NativeUnavailableError(_failures[path])
    try:
        _build(compiler, path)
    except NativeUnavailableError as error:
        _failures[path] = str(error)
        raise


def library_key() -> str:
    """What the library would be kept by; empty where it cannot be built."""
    try:
        return _key(_compiler())
    except (NativeUnavailableError, OSError, RuntimeError):
        return ""


def _compiler() -> str:
    wanted = os.environ.get("CXX", "")
    for name in (wanted,) if wanted else _COMPILERS:
        if found := shutil.which(name):
            return found
    looked_for = wanted or ", ".join(_COMPILERS)
    raise NativeUnavailableError(f"there is no C++ compiler ({looked_for}); install g++, or set CXX")


def _key(compiler: str) -> str:
    """Changes with whatever may change the library: sources, flags, compiler and processor."""
    digest = hashlib.blake2b(digest_size=10)
    for source in sorted(_SOURCES.glob("*.h")) + sorted(_SOURCES.glob("*.cpp")):
        digest.update(source.read_bytes())
    for text in (*_FLAGS, compiler, str(Path(compiler).resolve().stat().st_mtime_ns), processor()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def processor() -> str:
    """What `-march=native` goes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))


def _build(compiler: str, path: Path) -> None:
    """Build beside its place and move it there: another process may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / "step.so"
        command = [compiler, *_FLAGS, "-o", str(built), str(_SOURCES / "step.cpp")]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailableError(f"{compiler} could not be run: {error}") from error
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise NativeUnavailableError(f"{compiler} cannot build it: {first}")
        built.replace(path)
