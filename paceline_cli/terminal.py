"""What the commands print: answers to stdout, everything about them to stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from paceline_cli.errors import CommandError

ACCENT = "cyan"


def stdout() -> Console:
    """The console for what was asked for. Made anew each time, so that a replaced `sys.stdout` is respected."""
    return Console(highlight=False, emoji=False, soft_wrap=True)


def stderr() -> Console:
    """The console for what is said about it."""
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def print_error(error: CommandError) -> None:
    """Say what went wrong in red and what to do about it beneath."""
    console = stderr()
    console.print(f"[bold red]error:[/] [red]{escape(error.message)}[/]")
    if error.what_to_do:
        console.print(f"  [dim]→[/] {escape(error.what_to_do)}")


class ReportsPhase(Protocol):
    """Called with what is being done now and which share of that is over, 0 to 1."""

    def __call__(self, phase: str, fraction: float, /) -> None: ...


@contextmanager
def activity(console: Console, phase: str) -> Iterator[ReportsPhase]:
    """Show that something is going on: one moving line on a terminal, a line for each new phase elsewhere."""
    if not console.is_terminal:
        yield _PhaseLines(console, phase)
        return
    columns = (
        SpinnerColumn(style=ACCENT),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28, complete_style=ACCENT, finished_style=ACCENT),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(phase, total=None)

        def report(phase: str, fraction: float) -> None:
            total = 1.0 if 0 < fraction < 1 else None  # without a share to show the bar only moves
            progress.update(task, description=phase, total=total, completed=fraction)

        yield report


class _PhaseLines:
    """Progress where nothing can move: in log files and pipes."""

    def __init__(self, console: Console, phase: str) -> None:
        self._console = console
        self._phase = ""
        self(phase, 0.0)

    def __call__(self, phase: str, _fraction: float) -> None:
        if phase != self._phase:
            self._phase = phase
            self._console.print(f"{escape(phase)} …")


def usage_line(output: Any, elapsed_s: float) -> str:
    """What an answer used, faintly."""
    usage, count = output.usage, token_count(output)
    cached = f" ({usage.cached_prompt_token_count} cached)" if usage.cached_prompt_token_count else ""
    parts = [f"{usage.prompt_token_count}{cached} + {count} tokens"]
    if usage.first_token_us:
        parts.append(f"first after {usage.first_token_us / 1000:.0f} ms")
    parts.append(f"{count / max(elapsed_s, 1e-9):.0f} tokens/s")
    parts += dict.fromkeys(choice.finish_reason for choice in output.choices)
    return f"[dim]{' · '.join(parts)}[/]"


def token_count(output: Any) -> int:
    """Tokens of an answer, of all its choices together."""
    return sum(len(choice.token_ids) for choice in output.choices)
