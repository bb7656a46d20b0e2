"""The `paceline` command and its verbs."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from paceline_cli.autoscaler import app as autoscaler
from paceline_cli.bench import app as bench
from paceline_cli.chat import chat
from paceline_cli.errors import ExitCode, command_error
from paceline_cli.fleet import app as fleet
from paceline_cli.generate import generate
from paceline_cli.health import health
from paceline_cli.replay import replay
from paceline_cli.serve import serve
from paceline_cli.services import executor, prepare, scheduler
from paceline_cli.terminal import print_error
from paceline_cli.top import top
from paceline_cli.trace import trace

_EPILOG = (
    "Exit codes: 0 done · 1 the server or the model failed · 2 wrong usage · 3 no server answers · "
    "4 the request was refused · 130 interrupted.\n\n"
    "Flags can be set in the environment: PACELINE_MAX_NUM_SEQS for --max-num-seqs, PACELINE_MODEL for the model."
)
_DEBUG = "PACELINE_DEBUG"


class _Verbs(TyperGroup):
    """Ends every verb the same way: an error becomes two lines and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader of our output has left, which is no error
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click"):
                _name_variable(error)
                raise  # its own way to print usage errors and to leave
            if os.environ.get(_DEBUG):
                traceback.print_exc()
            reason = command_error(error)
            print_error(reason)
            raise typer.Exit(reason.exit_code) from None


def _name_variable(error: Any) -> None:
    """Let a usage error name the environment variable that a wrong value came from, beside its flag."""
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    if parameter is None or context is None or not parameter.envvar:
        return
    source = context.get_parameter_source(parameter.name)
    if source is not None and source.name == "ENVIRONMENT":
        flag = next((name for name in parameter.opts if name.startswith("--")), parameter.metavar or parameter.name)
        error.param_hint = f"{parameter.envvar} in the environment, which is {flag}"


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _show_release(wanted: bool) -> None:
    """Answer `--version` while the command line is read: it needs no verb."""
    if wanted:
        typer.echo(f"paceline {_release()}")
        raise typer.Exit()


@app.callback()
def paceline(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar=_DEBUG)] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the release and leave.", is_eager=True, callback=_show_release)
    ] = False,
) -> None:
    """Serve large language models and talk to them.

    [dim]$[/] paceline serve          [dim]# scheduler and executor on this machine[/]
    [dim]$[/] paceline chat           [dim]# in another terminal[/]
    """
    if debug:
        os.environ[_DEBUG] = "1"  # children inherit it


app.command(rich_help_panel="Serve")(serve)
app.command(rich_help_panel="Talk")(chat)
app.command(rich_help_panel="Talk")(generate)
app.command(rich_help_panel="Parts")(prepare)
app.command(rich_help_panel="Parts")(scheduler)
app.command(rich_help_panel="Parts")(executor)
app.add_typer(autoscaler, name="autoscaler", rich_help_panel="Parts")
app.add_typer(fleet, name="fleet", rich_help_panel="Operate")
app.command(rich_help_panel="Operate")(top)
app.command(rich_help_panel="Operate")(trace)
app.command(rich_help_panel="Operate")(health)
app.command(rich_help_panel="Operate")(replay)
app.add_typer(bench, name="bench", rich_help_panel="Measure")


def run() -> None:
    """The entry point of the `paceline` command."""
    try:
        app(prog_name="paceline")
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)


def _release() -> str:
    try:
        return metadata.version("paceline-server")
    except metadata.PackageNotFoundError:
        return "(not installed)"
