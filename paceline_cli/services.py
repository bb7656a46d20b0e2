"""The services, each as a command of its own: what `paceline serve` starts on one machine and you on several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from executor_svc.config import ExecutorConfig
from paceline_cli import parent, terminal
from paceline_cli.config_flags import Settings, takes_settings
from paceline_cli.errors import CommandError, ExitCode
from scheduler_svc.config import SchedulerConfig

ServingFolder = Annotated[
    str, typer.Argument(metavar="MODEL_FOLDER", help="What `paceline prepare` printed, or 'fake'.", envvar="PACELINE_MODEL")
]
ExitWithParent = Annotated[
    bool,
    typer.Option(
        "--exit-with-parent", help="Drain when standard input ends; report progress to it.", envvar="PACELINE_EXIT_WITH_PARENT"
    ),
]


@takes_settings(SchedulerConfig)
def scheduler(model: ServingFolder, exit_with_parent: ExitWithParent = False, *, settings: Settings) -> None:
    """Run the scheduler: it takes requests from users and plans what executors compute.

    [dim]$[/] paceline scheduler ~/models/smollm2 --listen 0.0.0.0:50051
    """
    _check_folder(model)
    config = SchedulerConfig(model=model, **settings)
    if exit_with_parent:
        parent.exit_with_parent()
    from scheduler_svc.main import serve

    raise typer.Exit(serve(config))


@takes_settings(ExecutorConfig)
def executor(model: ServingFolder, exit_with_parent: ExitWithParent = False, *, settings: Settings) -> None:
    """Run an executor: it holds the model and the cache and computes what a scheduler plans.

    [dim]$[/] paceline executor ~/models/smollm2 --scheduler 10.0.0.5:50051 --listen 0.0.0.0:50061 --advertise 10.0.0.7:50061
    """
    _check_folder(model)
    config = ExecutorConfig(model=model, **settings)
    _calm_openmp()
    if exit_with_parent:
        parent.exit_with_parent()
    from executor_svc.main import serve

    raise typer.Exit(serve(config, parent.send_progress if exit_with_parent else None))


def prepare(
    source: Annotated[
        str, typer.Argument(help="Folder, GGUF file or hub id of a model, or 'smollm2'.", envvar="PACELINE_MODEL")
    ],
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Make a serving folder of a model, once; prints its path.

    [dim]$[/] paceline executor "$(paceline prepare smollm2)"
    """
    if exit_with_parent:
        parent.exit_with_parent()
        from executor_svc.prepare import prepare

        folder = prepare(source, progress=parent.send_progress)
        parent.send_report(folder=str(folder.path))
        return
    console = terminal.stderr()
    with terminal.activity(console, f"Preparing {source}") as report:
        from executor_svc.prepare import prepare

        folder = prepare(source, progress=report)
    console.print(f"[bold]{escape(folder.model_name)}[/] is ready to serve [dim]({escape(folder.fingerprint)})[/]")
    terminal.stdout().print(str(folder.path), markup=False)


def _check_folder(model: str) -> None:
    """Refuse at once what cannot be served: a supervisor does not try a wrong command line again."""
    if model != "fake" and not Path(model).is_dir():
        raise CommandError(
            f"{model!r} is not a serving folder",
            f"make one with: paceline prepare {model}",
            exit_code=ExitCode.USAGE,
        )


def _calm_openmp() -> None:
    """Let OpenMP's threads sleep at barriers instead of spinning; torch reads these when it is imported.

    Spinning threads that share their cores with a scheduler, a client or another executor slow a decode step tenfold.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
