"""How many executors `paceline serve` runs: a fixed number, or as many as an autoscaler wants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline_cli.errors import CommandError, ExitCode

MOST_EXECUTORS = 64


@dataclass(frozen=True, slots=True)
class ExecutorRange:
    """How few and how many executors there may be; an autoscaler decides between the two."""

    min_count: int
    max_count: int  # the machine is divided by it
    scaling_file: Path | None = None  # the user's own; without it one is written

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.min_count > self.max_count:
            raise _wrong(
                f"at least {self.min_count} executors and at most {self.max_count} cannot be",
                "lower --min-executors or raise --max-executors",
            )

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to decide, and so no autoscaler."""
        return self.min_count == self.max_count and self.scaling_file is None

    @property
    def most_setting(self) -> str:
        """What says how many executors there are at most."""
        if self.scaling_file:
            return f"executors.max of {self.scaling_file} at"
        return "--executors" if self.is_fixed else "--max-executors"

    def scaling_file_in(self, folder: Path) -> Path:
        """The autoscaler's file; written into `folder` unless the user has one."""
        if self.scaling_file:
            return self.scaling_file
        path = folder / "scaling.yaml"
        path.write_text(f"executors: {{min: {self.min_count}, max: {self.max_count}}}\n")
        return path

    def __str__(self) -> str:
        """For people."""
        if self.is_fixed:
            return "1 executor" if self.max_count == 1 else f"{self.max_count} executors"
        return f"{self.min_count} to {self.max_count} executors"


def executor_range(
    executors: int | None, min_executors: int | None, max_executors: int | None, scaling_file: Path | None
) -> ExecutorRange:
    """What the flags of `paceline serve` say together; None: not given. Raises `CommandError` for a contradiction.

    Example: nothing at all is one executor, `--max-executors 4` alone is one to four.
    """
    bounds = {"--min-executors": min_executors, "--max-executors": max_executors}
    given = [name for name, value in bounds.items() if value is not None]
    if scaling_file and (given or executors is not None):
        name = given[0] if given else "--executors"
        raise _wrong(f"{name} contradicts --scaling, whose file has the number of executors", "leave one of them out")
    if executors is not None and given:
        raise _wrong(
            f"--executors is a fixed number and contradicts {given[0]}",
            "leave --executors out, or give nothing beside it",
        )
    if scaling_file:
        return _range_of(scaling_file)
    if min_executors is not None and max_executors is None:
        raise _wrong(
            f"--min-executors {min_executors} says nothing about the most there may be",
            "add --max-executors, or fix the number with --executors",
        )
    if max_executors is not None:
        return ExecutorRange(1 if min_executors is None else min_executors, max_executors)
    count = 1 if executors is None else executors
    return ExecutorRange(count, count)


def _range_of(path: Path) -> ExecutorRange:
    """What a scaling file says, checked as the autoscaler checks it. Raises `CommandError`."""
    try:
        from autoscaler_svc.scaling_file import ScalingFileError, for_processes, read_scaling_file
    except ImportError as error:
        raise CommandError(
            "--scaling needs PyYAML and pydantic", "pip install 'paceline-server[autoscaler]'"
        ) from error
    try:
        settings = for_processes(read_scaling_file(path), str(path))
    except ScalingFileError as error:
        raise CommandError(str(error), exit_code=ExitCode.USAGE) from error
    most = settings.executors.max
    if most > MOST_EXECUTORS:
        raise _wrong(f"{path}: executors.max is {most}, one machine has at most {MOST_EXECUTORS}", "lower it")
    return ExecutorRange(settings.executors.min, most, path)


def _wrong(message: str, what_to_do: str) -> CommandError:
    return CommandError(message, what_to_do, exit_code=ExitCode.USAGE)
