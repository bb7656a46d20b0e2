"""`paceline trace`: where the time of one request went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline_cli import terminal
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import DEFAULT_SERVER, Server, flag

if TYPE_CHECKING:
    from paceline_cli.sight.scheduler import ObservedScheduler

_ALL = 1000  # requests that a scheduler tells of at most
_LISTED = 15
_WIDE = 120  # columns of a picture that goes into a file
_ELLIPSES = ("…", "...")


def trace(
    request_id: Annotated[
        str, typer.Argument(help="Id of a request, or as much of its beginning as is needed; '…' stands for a gap.")
    ] = "",
    server: Server = DEFAULT_SERVER,
    output: Annotated[
        str, flag("--output", "Write the trace as OTLP/JSON instead; '-': here.", "-o", envvar=None, metavar="FILE")
    ] = "",
    sort: Annotated[
        str, flag("--sort", "Without an id: slow at what? delay, first-token, per-token or total.", envvar=None)
    ] = "delay",
) -> None:
    """Tell why a request took as long as it did: a line for each part of it, what happened to it, and a summary.

    [dim]$[/] paceline trace                      [dim]# the most delayed of late, and at what they were slow[/]
    [dim]$[/] paceline trace --sort first-token
    [dim]$[/] paceline trace req-5b8e19c3
    [dim]$[/] paceline trace req-5b8e…37ce        [dim]# as `paceline top` shows it[/]
    [dim]$[/] paceline trace req-5b8e19c3 --output trace.json

    The scheduler knows the requests that run and those that ended last (--keep-timelines).
    """
    from paceline_cli.sight.scheduler import observed

    if output and not request_id:
        raise CommandError("--output goes with the id of a request", "paceline trace --help", exit_code=ExitCode.USAGE)
    with observed(server) as scheduler:
        if not request_id:
            _list_slowest(scheduler, sort)
            return
        found, otlp_json = _find(scheduler, request_id)
    if output:
        _write(otlp_json, output)
    else:
        _show(found, otlp_json)


def _find(scheduler: ObservedScheduler, wanted: str) -> tuple[str, str]:
    """The id that is meant, and the trace of that request."""
    is_cut = any(mark in wanted for mark in _ELLIPSES)
    if not is_cut:
        try:
            return wanted, scheduler.trace(wanted)
        except CommandError as error:
            if error.exit_code is not ExitCode.REFUSED:
                raise
            unknown = error
    matching = [one.request_id for one in scheduler.overview(_ALL).requests if _means(wanted, one.request_id)]
    if len(matching) == 1:
        return matching[0], scheduler.trace(matching[0])
    if not matching and not is_cut:
        raise unknown
    what = f"{len(matching)} requests are called '{wanted}'" if matching else f"no request is called '{wanted}'"
    remedy = f"give more of the id: {', '.join(matching[:5])}" if matching else "`paceline trace` lists those it knows"
    raise CommandError(what, remedy, exit_code=ExitCode.REFUSED)


def _means(wanted: str, request_id: str) -> bool:
    """Whether `wanted` is the beginning of an id, or its beginning and its end with a gap between them."""
    for mark in _ELLIPSES:
        head, gap, tail = wanted.partition(mark)
        if gap:
            return len(request_id) >= len(head + tail) and request_id.startswith(head) and request_id.endswith(tail)
    return request_id.startswith(wanted)


def _list_slowest(scheduler: ObservedScheduler, wanted: str) -> None:
    """Show the slowest requests of those that the scheduler knows."""
    from paceline_cli.sight.listing import Sort, listing, slowest, usual_per_token_ms
    from paceline_cli.sight.words import milliseconds

    if wanted not in {sort.value for sort in Sort}:
        choices = ", ".join(sort.value for sort in Sort)
        raise CommandError(f"--sort is one of {choices}, got '{wanted}'", exit_code=ExitCode.USAGE)
    requests = scheduler.overview(_ALL).requests
    if not requests:
        terminal.stdout().print("the scheduler knows of no request yet", style="dim")
        return
    shown = slowest(requests, Sort(wanted))[:_LISTED]
    console = terminal.stdout()
    _print(listing(shown, _width(), mono=console.no_color or not console.is_terminal))
    usual = milliseconds(usual_per_token_ms(requests))
    by = f" (time beyond {usual} for each of its own tokens, as usual)" if wanted == Sort.DELAY.value else ""
    note = f"the slowest {len(shown)} of {len(requests):,} by {wanted}{by}; `paceline trace ID` explains one"
    terminal.stderr().print(f"\n[dim]{note}[/]")


def _show(request_id: str, otlp_json: str) -> None:
    from paceline_cli.sight.spans import tree_of
    from paceline_cli.sight.trace_view import waterfall

    _print(waterfall(request_id, tree_of(otlp_json), _width()))


def _width() -> int:
    """Columns that there are."""
    console = terminal.stdout()
    return console.width if console.is_terminal else _WIDE


def _print(lines: list[Any]) -> None:
    console = terminal.stdout()
    for line in lines:
        line.rstrip()
        console.print(line)


def _write(otlp_json: str, output: str) -> None:
    """Write a trace for other programs."""
    if output == "-":
        typer.echo(otlp_json)
        return
    try:
        Path(output).write_text(otlp_json)
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}", exit_code=ExitCode.USAGE) from error
    console = terminal.stderr()
    console.print(f"wrote {output}", markup=False)
    console.print("  [dim]→[/] Jaeger's page opens it: http://localhost:16686, Search, Upload; if you have none yet:")
    console.print("    docker run --rm -p 16686:16686 jaegertracing/jaeger", markup=False)
