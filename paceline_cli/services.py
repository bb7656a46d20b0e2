"""The services, each as a command of its own: what `paceline serve` starts on one machine and you on several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.markup import escape

from common.serving_folder import ServingFolder, ServingFolderError
from executor_svc.config import ExecutorConfig
from paceline_cli import parent, terminal
from paceline_cli.config_flags import Settings, takes_settings
from paceline_cli.errors import CommandError, ExitCode, command_error
from paceline_cli.flags import ExitWithParent, LogLevel, model_argument
from scheduler_svc.config import SchedulerConfig

FAKE_MODEL = "fake"
"""Stands for no model in the place of a folder: executors make tokens up, and everything else is real."""

ModelFolder = Annotated[str, model_argument("What `paceline prepare` printed, or 'fake'.", metavar="MODEL_FOLDER")]


@takes_settings(SchedulerConfig)
def scheduler(
    model: ModelFolder, log_level: LogLevel = "info", exit_with_parent: ExitWithParent = False, *, settings: Settings
) -> None:
    """Run the scheduler: it takes requests from users and plans what executors compute.

    [dim]$[/] paceline scheduler ~/models/smollm2 --listen 0.0.0.0:50051
    """
    _check_folder(model)
    config = SchedulerConfig(model=model, **settings)
    begin("scheduler", log_level, exit_with_parent)
    from scheduler_svc.main import serve

    with _refusals():
        exit_code = serve(config)
    raise typer.Exit(exit_code)


@takes_settings(ExecutorConfig)
def executor(
    model: ModelFolder, log_level: LogLevel = "info", exit_with_parent: ExitWithParent = False, *, settings: Settings
) -> None:
    r"""Run an executor: it holds the model and the cache and computes what a scheduler plans.

    [dim]$[/] paceline executor ~/models/smollm2 --scheduler 10.0.0.5:50051 \
        --listen 0.0.0.0:50061 --advertise 10.0.0.7:50061
    """
    _check_folder(model)
    from executor_svc.cache_home import keep_kernels
    from executor_svc.machine import calm_openmp

    config = ExecutorConfig(model=model, **settings)
    calm_openmp()
    keep_kernels()
    begin("executor", log_level, exit_with_parent)
    from executor_svc.main import serve

    with _refusals():
        exit_code = serve(config, parent.send_progress if exit_with_parent else None)
    raise typer.Exit(exit_code)


def prepare(
    source: Annotated[
        str, model_argument("Folder, GGUF file or hub id of a model; 'fake' stays what it is.", metavar="SOURCE")
    ],
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Make a serving folder of a model, once; prints its path.

    [dim]$[/] paceline prepare ./my-model
    [dim]$[/] paceline executor "$(paceline prepare smollm2)"
    """
    if exit_with_parent:
        parent.exit_with_parent()
        _prepare_for_parent(source)
        return
    if source == FAKE_MODEL:  # so that whoever is given a model need not know which
        terminal.stdout().print(FAKE_MODEL)
        return
    console = terminal.stderr()
    with terminal.activity(console, f"Preparing {source}") as report:
        from executor_svc.prepare import prepare

        folder = prepare(source, progress=report)
    console.print(f"[bold]{escape(folder.model_name)}[/] is ready to serve [dim]({escape(folder.fingerprint)})[/]")
    terminal.stdout().print(str(folder.path), markup=False)


def _prepare_for_parent(source: str) -> None:
    """Prepare, with everything there is to say in reports."""
    from executor_svc.prepare import prepare

    try:
        folder = prepare(source, progress=parent.send_progress)
    except Exception as error:
        reason = command_error(error)
        parent.send_report(error=reason.message, what_to_do=reason.what_to_do)
        raise
    parent.send_report(folder=str(folder.path))


def begin(service: str, log_level: str, exit_with_parent: bool) -> None:
    """Do what comes first in every service process."""
    from common.logs import configure_logs

    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"--log-level is debug, info, warning or error, got {log_level!r}")
    configure_logs(service, log_level)
    if exit_with_parent:
        parent.exit_with_parent()


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what a service says about its settings and its model into an exit code that nobody tries again.

    A service raises `ValueError` only at its start. An address that is taken may be free the next time.
    """
    from common.grpc_servers import AddressTakenError
    from scheduler_svc.journal.errors import JournalError

    try:
        yield
    except AddressTakenError:
        raise
    except JournalError as error:  # another process may use it, and end
        message, _, remedy = str(error).rpartition("; ")
        raise CommandError(message, remedy) from error
    except ValueError as error:
        message, _, remedy = str(error).rpartition("; ")
        raise CommandError(message or remedy, remedy if message else "", exit_code=ExitCode.USAGE) from error


def _check_folder(model: str) -> None:
    """Refuse at once what cannot be served: a supervisor does not try a wrong command line again."""
    if model == FAKE_MODEL:
        return
    try:
        ServingFolder.open(model)
    except ServingFolderError as error:
        message, _, remedy = str(error).rpartition("; ")
        raise CommandError(message, remedy, exit_code=ExitCode.USAGE) from error
