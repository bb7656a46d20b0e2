"""How flags are made, so that all of them look alike and each can be set in the environment."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_LOG_LEVELS = ("debug", "info", "warning", "error")


def flag(name: str, text: str, *more_names: str, **options: Any) -> Any:
    """A flag of a command; `--max-num-seqs` is also read from `PACELINE_MAX_NUM_SEQS`."""
    options.setdefault("envvar", variable_of(name))
    return typer.Option(name, *more_names, help=text, show_envvar=False, **options)


def variable_of(name: str) -> str:
    """The environment variable that stands for a flag."""
    return "PACELINE_" + name.partition("/")[0].removeprefix("--").replace("-", "_").upper()


def model_argument(text: str, **options: Any) -> Any:
    """The model as a word of the command line."""
    return typer.Argument(help=text, envvar="PACELINE_MODEL", show_envvar=False, **options)


def _log_level(value: str) -> str:
    """Refuse a level that is none before anything is started with it."""
    if value.lower() not in _LOG_LEVELS:
        raise typer.BadParameter(f"must be debug, info, warning or error, got {value!r}")
    return value.lower()


DEFAULT_SERVER = "localhost:50051"
Server = Annotated[str, flag("--server", "Address of the server.", "-s", metavar="ADDRESS")]
LogLevel = Annotated[str, flag("--log-level", "debug, info, warning or error.", metavar="LEVEL", callback=_log_level)]
ExitWithParent = Annotated[
    bool, flag("--exit-with-parent", "Drain when standard input ends, and report progress on standard output.")
]
