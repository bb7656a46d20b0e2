"""Where what is made once is kept: prepared models, and the native step."""

import os
from pathlib import Path


def default_cache_home() -> Path:
    """Where prepared models are kept: `$PACELINE_CACHE`, or `paceline` in the user's cache folder."""
    if own := os.environ.get("PACELINE_CACHE"):
        return Path(own).expanduser()
    if user := os.environ.get("XDG_CACHE_HOME"):
        return Path(user).expanduser() / "paceline"
    return Path.home() / ".cache" / "paceline"
