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
) -> None:
    """Continue a text, or run a file of prompts as one batch.

    [dim]$[/] paceline generate "The capital of France is" -n 16
    [dim]$[/] cat story.txt | paceline generate - --temperature 0.8 --seed 7
    [dim]$[/] paceline generate --input prompts.jsonl --output answers.jsonl
    """
    settings = flags.given(
        max_output_tokens=max_tokens, stop=stop, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos,
        timeout_s=timeout, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
    )  # fmt: skip
    if (prompt is None) == (input_file is None):
        raise CommandError("give one prompt or --input FILE", "paceline generate --help", exit_code=ExitCode.USAGE)
    if output_file is not None and input_file is None:
        raise CommandError("--output goes with --input", "paceline generate --help", exit_code=ExitCode.USAGE)
    from paceline import Client

    with Client(server) as client:
        if input_file is not None:
            run_batch(client, input_file, output_file, settings)
        else:
            _run_one(client, sys.stdin.read() if prompt == "-" else str(prompt), stream, settings)


def _run_one(client: Any, prompt: str, stream: bool, settings: dict[str, Any]) -> None:
    """Print the continuation of `prompt`, as it comes if `stream`."""
    begun = time.perf_counter()
    with client.generate(prompt, **settings) as answer:
        for chunk in answer:
            if stream:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    sys.stdout.write("\n" if stream else answer.output.text + "\n")
    sys.stdout.flush()
    console = terminal.stderr()
    if console.is_terminal:
        console.print(usage_line(answer.output, time.perf_counter() - begun))
