"""The sample answer that `paceline serve --demo` streams."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape

from paceline_cli.errors import command_error
from paceline_cli.readiness import ServedModel
from paceline_cli.terminal import print_error

_QUESTION = "In three sentences: why does the sky look blue?"
_BEGINNING = "The sky looks blue because"
_LENGTH = 96


def run_demo(console: Console, address: str, served: ServedModel) -> None:
    """Stream one answer to the console, then say how fast it came. A failure is shown and ends nothing else."""
    try:
        _stream(console, address, served)
    except Exception as error:  # noqa: BLE001  the server goes on, whatever the demonstration met
        print_error(command_error(error))


def _stream(console: Console, address: str, served: ServedModel) -> None:
    from paceline import Client

    with Client(address) as client:
        begun = time.perf_counter()
        if served.has_chat_template:
            console.print(f"[bold]{_QUESTION}[/]")
            stream = client.chat([{"role": "user", "content": _QUESTION}], max_output_tokens=_LENGTH)
        else:
            console.print(f"[bold]{_BEGINNING}[/]", end="")
            stream = client.generate(_BEGINNING, max_output_tokens=_LENGTH)
        with stream:
            for chunk in stream:
                console.print(escape(chunk.text), end="")
        count = len(stream.output.token_ids)
        elapsed = time.perf_counter() - begun
    console.print(f"\n[dim]{count} tokens in {elapsed:.2f} s, {count / elapsed:.0f} tokens/s[/]\n")
