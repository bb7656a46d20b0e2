"""What a start found out about a model on this machine, kept so that the next one need not find it out again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import structlog

from executor_svc.cache_home import default_cache_home

log = structlog.get_logger()

_SOURCES = Path(__file__).parent
_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "triton", "flashinfer-python")


@dataclass(frozen=True, slots=True)
class Checks:
    """The results of a start at which the model passed; what failed is never kept, and tried again."""

    mode: str  # whose steps passed the self-test: native, fused or packed
    largest_step_bytes: int  # memory that the largest step took at its peak, beside the weights
    made_at: str  # date and time, UTC

    def __post_init__(self) -> None:
        """Refuse what no start can have found out. Raises `ValueError`."""
        if self.mode not in ("native", "fused", "packed") or not isinstance(self.made_at, str):
            raise ValueError(f"not the results of a start: {self}")
        if type(self.largest_step_bytes) is not int or self.largest_step_bytes < 0:
            raise ValueError(f"the largest step cannot have taken {self.largest_step_bytes!r} bytes")


@dataclass(frozen=True, slots=True)
class CheckFile:
    """Where the results for one subject are kept: everything that could change them, by name."""

    subject: dict[str, Any]

    @property
    def path(self) -> Path:
        """The file; another subject has another one."""
        text = json.dumps(self.subject, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
        return default_cache_home() / "checks" / f"{digest}.json"

    def read(self) -> Checks | None:
        """The results; None where there are none, or none that can be read."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return Checks(**content["checks"]) if content["subject"] == self.subject else None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError):
            return None

    def write(self, checks: Checks) -> None:
        """Keep the results. Where nothing can be written the next start finds out again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                written = Path(folder) / self.path.name
                written.write_text(
                    json.dumps({"subject": self.subject, "checks": asdict(checks)}, indent=1), encoding="utf-8"
                )
                os.replace(written, self.path)
        except (OSError, RuntimeError) as error:  # there may be no home
            log.info("the checks of this start cannot be kept", reason=str(error), way_out="set PACELINE_CACHE")


def versions() -> dict[str, str]:
    """The libraries that compute, and our own sources."""
    return {name: _version(name) for name in _LIBRARIES} | {"executor_svc": _source_digest()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a CPU does without Triton, and most do without FlashInfer
        return ""


@cache
def _source_digest() -> str:
    digest = hashlib.blake2b(digest_size=10)
    for path in sorted(_SOURCES.rglob("*")):
        if path.suffix in (".py", ".h", ".cpp"):
            digest.update(path.relative_to(_SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
