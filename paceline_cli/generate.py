"""`paceline generate`: one prompt, or a file of them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline_cli import sampling_flags as flags
from paceline_cli import terminal
from paceline_cli.batch import run_batch
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import DEFAULT_SERVER, Server, flag
from paceline_cli.terminal import usage_line

_WHO = {"rich_help_panel": "For whom, on a server that several share"}

Choices = Annotated[int | None, flag("--n", "Continuations of the prompt.", metavar="N", min=1, max=64)]
Priority = Annotated[
    int | None,
    flag("--priority", "The larger goes first, with the policy `priority`.", metavar="N", min=-1000, max=1000, **_WHO),
]
Tenant = Annotated[
    str | None, flag("--tenant", "Tenants are served equally, with the policy `fair`.", metavar="NAME", **_WHO)
]
CacheSalt = Annotated[
    str | None, flag("--cache-salt", "Reuse only what was computed with the same salt.", metavar="TEXT", **_WHO)
]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; '-' reads it from standard input.")] = None,
    server: Server = DEFAULT_SERVER,
    stream: Annotated[bool, flag("--stream/--no-stream", "Print the text as it comes.")] = True,
    input_file: Annotated[
        Path | None,
        flag("--input", "Prompts: .jsonl, or one on each line.", "-i", metavar="FILE", dir_okay=False, exists=True),
    ] = None,
    output_file: Annotated[
        Path | None, flag("--output", "Answers as .jsonl.", "-o", metavar="FILE", dir_okay=False)
    ] = None,
    n: Choices = None,
    max_tokens: flags.MaxTokens = None,
    stop: flags.Stop = None,
    stop_token_ids: flags.StopTokenIds = None,
    ignore_eos: flags.IgnoreEos = False,
    timeout: flags.Timeout = None,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    min_p: flags.MinP = None,
    seed: flags.Seed = None,
    priority: Priority = None,
    tenant: Tenant = None,
    cache_salt: CacheSalt = None,
) -> None:
    """Continue a text, or run a file of prompts as one batch.

    [dim]$[/] paceline generate "The capital of France is" --max-tokens 16
    [dim]$[/] paceline generate "Once upon a time" --n 4 --temperature 1
    [dim]$[/] cat story.txt | paceline generate - --temperature 0.8 --seed 7
    [dim]$[/] paceline generate --input prompts.jsonl --output answers.jsonl

    A line of a .jsonl file is a string, or an object: `prompt` (text or token ids)
    or `messages`, and any options under their names in the Python client. An `id`
    comes back with the answer.

    {"prompt": "Once upon", "max_output_tokens": 8, "seed": 7, "id": "a-1"}
    """
    settings = flags.given(
        max_output_tokens=max_tokens, stop=stop, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos,
        timeout_s=timeout, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        n=n, priority=priority, tenant=tenant, cache_salt=cache_salt,
    )  # fmt: skip
    if (prompt is None) == (input_file is None):
        raise _wrong_usage("give one prompt or --input FILE")
    if output_file is not None and input_file is None:
        raise _wrong_usage("--output goes with --input")
    from paceline import Client

    with Client(server) as client:
        if input_file is not None:
            run_batch(client, input_file, output_file, settings)
        else:
            _run_one(client, sys.stdin.read() if prompt == "-" else str(prompt), stream, settings)


def _wrong_usage(message: str) -> CommandError:
    return CommandError(message, "paceline generate --help", exit_code=ExitCode.USAGE)


def _run_one(client: Any, prompt: str, stream: bool, settings: dict[str, Any]) -> None:
    """Print the continuation of `prompt`, as it comes if `stream`."""
    begun = time.perf_counter()
    with client.generate(prompt, **settings) as answer:
        if settings.get("n", 1) > 1:
            _print_choices(answer, settings["n"], stream)
        else:
            _print_text(answer, stream)
    console = terminal.stderr()
    if console.is_terminal:
        console.print(usage_line(answer.output, time.perf_counter() - begun))


def _print_text(answer: Any, stream: bool) -> None:
    """Print an answer and nothing else: it may be another program's input."""
    for chunk in answer:
        if stream:
            _write(chunk.text)
    _write("\n" if stream else answer.output.text + "\n")


def _print_choices(answer: Any, count: int, stream: bool) -> None:
    """Print each of several continuations whole under a heading: as soon as it has ended if `stream`, else in order.

    What a time-out or Ctrl-C left unfinished comes last, and says so: it may be all that is wanted.
    """
    ended: set[int] = set()
    try:
        for chunk in answer:
            if chunk.finish_reason:
                ended.add(chunk.choice)
                if stream:
                    _print_choice(answer, chunk.choice, count)
    finally:
        if not stream:
            for index in sorted(ended):
                _print_choice(answer, index, count)
        for index in sorted(set(range(count)) - ended):
            if answer.texts[index]:
                _print_choice(answer, index, count, ", unfinished")


def _print_choice(answer: Any, index: int, count: int, note: str = "") -> None:
    terminal.stdout().print(f"[dim]── {index + 1} of {count}{note} ──[/]")
    _write(answer.texts[index] + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
