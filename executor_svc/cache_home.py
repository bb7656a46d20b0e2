"""Where what is made once is kept: prepared models, the native step, and kernels for a GPU."""

import os
from pathlib import Path


def default_cache_home() -> Path:
    """Where prepared models are kept: `$PACELINE_CACHE`, or `paceline` in the user's cache folder."""
    if own := os.environ.get("PACELINE_CACHE"):
        return Path(own).expanduser()
    if user := os.environ.get("XDG_CACHE_HOME"):
        return Path(user).expanduser() / "paceline"
    return Path.home() / ".cache" / "paceline"


def keep_kernels() -> None:
    """Let the next start find the kernels that this one compiles for a GPU; Triton and FlashInfer read these variables.

    Their own places are in the home folder, which in a container is `/tmp`: gone with it, or not to be executed from.
    """
    home = str(default_cache_home())
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(home, "triton"))
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", os.path.join(home, "flashinfer"))
