"""`paceline autoscaler`: keep as many executors as the load wants, or say how many that would be."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from paceline_cli import terminal
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import DEFAULT_SERVER, ExitWithParent, LogLevel, flag
from paceline_cli.services import begin

if TYPE_CHECKING:
    from autoscaler_svc.actuators.actuator import Launched
    from autoscaler_svc.decide import Decision
    from autoscaler_svc.load import PoolLoad
    from autoscaler_svc.scaling_settings import ScalingSettings

_ANSWER_S = 5.0
_OBSERVED_S = 1.0

File = Annotated[Path, typer.Argument(help="The scaling file.", metavar="FILE", show_default=False)]
Scheduler = Annotated[str, flag("--scheduler", "Address of the scheduler.", "-s", "--server", metavar="ADDRESS")]
Launcher = Annotated[
    str,
    flag("--launcher", "Launcher of `paceline serve`, instead of the file's actuator.", metavar="ADDRESS"),
]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def autoscaler() -> None:
    """Let the number of executors follow the load.

    [dim]$[/] paceline autoscaler run scaling.yaml --scheduler 10.0.0.5:50051
    [dim]$[/] paceline autoscaler explain scaling.yaml      [dim]# what would it do now?[/]
    """


@app.command()
def run(
    file: File,
    scheduler: Scheduler = DEFAULT_SERVER,
    launcher: Launcher = "",
    metrics_port: Annotated[
        int, flag("--metrics-port", "Port of /metrics; 0: none, -1: any.", metavar="PORT", min=-1, max=65535)
    ] = 0,
    log_level: LogLevel = "info",
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Watch the load of a scheduler, and start and drain executors as the file says.

    Changes of the file are picked up. When it ends, the executors go on as they are.

    [dim]$[/] paceline autoscaler run scaling.yaml
    """
    begin("autoscaler", log_level, exit_with_parent)
    from autoscaler_svc.actuators.actuator import ActuatorError
    from autoscaler_svc.main import AutoscalerConfig, serve
    from autoscaler_svc.scaling_file import ScalingFileError

    try:
        exit_code = serve(AutoscalerConfig(file, scheduler, launcher, metrics_port))
    except (ScalingFileError, ActuatorError) as error:
        raise CommandError(str(error), exit_code=ExitCode.USAGE) from error
    raise typer.Exit(exit_code)


@app.command()
def explain(file: File, scheduler: Scheduler = DEFAULT_SERVER, launcher: Launcher = "") -> None:
    """Show what the policies of a file would do now, without doing it.

    As if the load had been for ever as it is at this moment, and requests came as in the last second: windows and
    cooldowns, which look back, hold nothing back.

    [dim]$[/] paceline autoscaler explain scaling.yaml
    """
    from autoscaler_svc.autoscaler import explain as decide_now
    from autoscaler_svc.main import AutoscalerConfig, read_settings
    from autoscaler_svc.scaling_file import ScalingFileError
    from common.logs import configure_logs

    configure_logs("autoscaler", "error")  # what is to be said stands in the table
    try:
        settings = read_settings(AutoscalerConfig(file, scheduler, launcher))
    except ScalingFileError as error:
        raise CommandError(str(error), exit_code=ExitCode.USAGE) from error
    load, launched, arriving_per_s = asyncio.run(_look(settings, scheduler))
    ready = {executor.executor_id for executor in load.ready}
    starting_count = sum(not one.is_retired and one.executor_id not in ready for one in launched)
    decision = decide_now(settings, load, starting_count, time.time(), arriving_per_s)
    terminal.stdout().print(_table(decision, settings))
    for line in settings.advice:
        terminal.stdout().print(line, style="yellow", markup=False)
    terminal.stdout().print(f"{load.model}: {decision.seen}, {starting_count} starting", style="dim", markup=False)


async def _look(settings: ScalingSettings, scheduler: str) -> tuple[PoolLoad, list[Launched], float]:
    """The load now, who was launched, where an actuator can say that from here, and arrivals per second, of the last
    second. Raises `CommandError`.
    """
    from autoscaler_svc.actuators.actuator import ActuatorError
    from autoscaler_svc.actuators.make import make_actuator
    from autoscaler_svc.observe import LoadWatch

    watch = LoadWatch(scheduler, settings.times.interval_s, settings.targets)
    watching = asyncio.create_task(watch.keep())
    try:
        first, began_at = await watch.next(_ANSWER_S), time.monotonic()
        load = first
        while load is not None and time.monotonic() - began_at < _OBSERVED_S:
            load = await watch.next(_ANSWER_S)
        seconds = time.monotonic() - began_at
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    if load is None or first is None:
        message = f"{scheduler} does not tell its load within {_ANSWER_S:g} s"
        raise CommandError(message, "is it a scheduler, and the line to it open?", exit_code=ExitCode.UNREACHABLE)
    arriving_per_s = (load.arrived_request_count - first.arrived_request_count) / seconds
    try:
        actuator = make_actuator(settings)
    except ActuatorError:
        return load, [], arriving_per_s  # a file for `paceline serve`, looked at from outside
    if actuator is None:
        return load, [], arriving_per_s
    try:
        return load, list(await actuator.list()), arriving_per_s
    except ActuatorError as error:
        raise CommandError(f"the actuator does not say who is there: {error}") from error
    finally:
        await actuator.close()


def _table(decision: Decision, settings: ScalingSettings) -> Table:
    """Each policy's wish, then what becomes of them."""
    table = Table(box=None, header_style="dim")
    table.add_column("")
    table.add_column("executors", justify="right")
    table.add_column("why")
    table.add_row("there", str(decision.current), "ready or starting")
    for wish in decision.wishes:
        table.add_row(wish.policy, "?" if wish.count is None else str(wish.count), wish.reason)
    held = decision.held_by.value
    bounds = f"{settings.executors.min} to {settings.executors.max} allowed"
    table.add_row(
        "[bold]wanted[/]", f"[bold]{decision.wanted}[/]", bounds if held == "nothing" else f"held by {held}; {bounds}"
    )
    return table
