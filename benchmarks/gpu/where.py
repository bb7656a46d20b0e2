"""The device and the versions of what drives it; also whether everything is there that the check needs."""

from __future__ import annotations

import importlib
import platform
import subprocess
import tomllib
from importlib import metadata

from benchmarks import BenchmarkError
from benchmarks.gpu.given import Given, Tell
from benchmarks.setting import ROOT

_PACKAGES = ("torch", "triton", "transformers", "grpcio", "protobuf", "flashinfer-python", "flash-attn")
_NEEDED = (
    "benchmarks.gpu.client",
    "benchmarks.gpu.served",
    "benchmarks.load",
    "paceline_cli.main",
    "scheduler_svc.main",
)


def run(given: Given, tell: Tell) -> None:
    """Tell them."""
    try:
        for name in _NEEDED:
            importlib.import_module(name)
    except Exception as error:  # generated code raises its own, where grpcio or protobuf is older than it wants
        raise BenchmarkError(
            f"{type(error).__name__}: {error}; of what pyproject.toml asks for, this is missing or of another release: "
            f"{', '.join(unmet()) or 'nothing'}; put wheels of it into a folder and name that in WHEELS"
        ) from error
    import torch

    row: dict[str, object] = {"python": platform.python_version()}
    row |= {name: version for name in _PACKAGES if (version := _version(name))}
    row |= {"cuda": torch.version.cuda, "attention": given.attention}
    if given.device == "cpu":
        tell({"rehearsal": True, "device": f"{platform.machine()} CPU", **row})
        return
    if not torch.cuda.is_available():
        raise BenchmarkError(
            f"torch {torch.__version__} sees no GPU; run this where there is one, with a build of torch for it, "
            "or with --rehearse to try the check itself on a CPU"
        )
    about = torch.cuda.get_device_properties(0)
    tell(
        {
            "device": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
            "driver": _driver(),
            **row,
        }
    )


def unmet() -> list[str]:
    """What a scheduler and an executor should have beside themselves, and this environment does not."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    client = tomllib.loads((ROOT / "client/pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*client["dependencies"], *project["dependencies"], *extras["scheduler"], *extras["executor"]]
    found = []
    for text in dict.fromkeys(wanted):
        requirement = Requirement(text)
        version = _version(requirement.name)
        if requirement.name != "paceline" and (version is None or version not in requirement.specifier):
            found.append(f"{requirement.name}{requirement.specifier} (here: {version or 'none'})")
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.strip().partition("\n")[0]
