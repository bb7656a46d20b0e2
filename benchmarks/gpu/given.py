"""What a part of the check is given, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IN_PROCESS, SERVED, PEER = "in process", "whole system", "transformers"
"""The ways in which a model decodes."""

Row = dict[str, Any]
Tell = Callable[[Row], None]
"""Takes one row of a part's table as soon as it is there; it stays when the part fails or runs out of time."""


@dataclass(frozen=True, slots=True)
class Given:
    """How the check runs."""

    device: str  # cuda, or cpu in a rehearsal
    rehearse: bool  # small sizes, on a CPU, with Triton's interpreter: tests the check itself
    attention: str  # as executors take it
    folder: Path  # for weights and sockets; gone when the check has ended
    shape: str = ""  # of the model, for parts that need one

    @property
    def batches(self) -> tuple[int, ...]:
        """Requests that decode at once."""
        return (1, 3) if self.rehearse else (1, 16, 64, 256)

    @property
    def prompt_count(self) -> int:
        """Tokens of each prompt."""
        return 6 if self.rehearse else 128

    @property
    def output_count(self) -> int:
        """Tokens that each request generates."""
        return 5 if self.rehearse else 256

    @property
    def step_token_count(self) -> int:
        """Tokens that a step may compute."""
        return 32 if self.rehearse else 2048
