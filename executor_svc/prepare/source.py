"""What a model can be prepared from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from executor_svc.prepare.draft import Draft

Progress = Callable[[str, float], None]
"""Takes what is being done and the share of the whole that is over, 0 to 1."""


class Source(Protocol):
    """Where a model comes from, and what makes it another model."""

    @property
    def model_name(self) -> str:
        """What users call the model, and the beginning of its folder's name."""

    @property
    def identity(self) -> str:
        """Changes when the content of the source does."""

    @property
    def description(self) -> str:
        """For the manifest, for people."""

    def write(self, draft: Draft, progress: Progress) -> None:
        """Fill `draft` with everything but the manifest."""


def state_of(files: list[Path]) -> str:
    """Path, size and time of change of `files`: enough to notice an edited model without reading it."""
    stats = [(str(file), file.stat()) for file in files]
    return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
