"""A file of prompts in, a file of answers out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paceline_cli import terminal
from paceline_cli.errors import CommandError, ExitCode, command_error


def run_batch(client: Any, input_file: Path, output_file: Path | None, settings: dict[str, Any]) -> None:
    """Generate for every prompt of `input_file`, write the answers in the same order, say how fast it went."""
    prompts = read_prompts(input_file)
    console = terminal.stderr()
    columns = (TextColumn("Generating"), BarColumn(bar_width=40), MofNCompleteColumn(), TimeRemainingColumn())
    begun = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(prompts))
        outcomes = client.generate_batch(
            [_without_id(prompt) for prompt in prompts],
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            on_error="return",
            **settings,
        )
    elapsed = time.perf_counter() - begun

    lines = [answer_line(*answer) for answer in zip(prompts, outcomes, strict=True)]
    if output_file is None:
        sys.stdout.writelines(lines)
    else:
        output_file.write_text("".join(lines), encoding="utf-8")
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    console.print(throughput_line([outcome for outcome in outcomes if not isinstance(outcome, Exception)], elapsed))
    if errors:
        first = command_error(errors[0])
        message = (
            f"{len(errors)} of {len(prompts)} prompts failed; their lines have an `error`; the first: {first.message}"
        )
        raise CommandError(message, first.what_to_do, exit_code=first.exit_code)


def read_prompts(file: Path) -> list[Any]:
    """The prompts of a file: of a `.jsonl` one on each line, of other files each line as it is.

    A line of JSON is a string, or an object with a `prompt` (text or token ids) or `messages`, and whatever else
    `Client.generate` takes: `{"prompt": "Once", "max_output_tokens": 8}`. An `id` comes back with the answer.
    """
    lines = [(number, line) for number, line in enumerate(_lines_of(file), start=1) if line.strip()]
    if not lines:
        raise CommandError(f"{file} has no prompts", exit_code=ExitCode.USAGE)
    if file.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_of(line, f"{file}:{number}") for number, line in lines]


def _lines_of(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is not UTF-8: {error}", exit_code=ExitCode.USAGE) from None


def _prompt_of(line: str, where: str) -> Any:
    """The prompt in one line of JSON."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise CommandError(f"{where} is not JSON: {error}", exit_code=ExitCode.USAGE) from None
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise CommandError(
            f"{where} has no prompt",
            'write {"prompt": "some text"} or {"messages": [{"role": "user", "content": "some text"}]}',
            exit_code=ExitCode.USAGE,
        )
    from paceline.types import Options

    known = [*Options.__annotations__, "prompt", "messages", "id"]
    if unknown := set(entry) - set(known):
        raise CommandError(
            f"{where} has the unknown key {min(unknown)!r}", f"known are {', '.join(known)}", exit_code=ExitCode.USAGE
        )
    return entry


def _without_id(prompt: Any) -> Any:
    """The prompt as the SDK takes it."""
    return {key: value for key, value in prompt.items() if key != "id"} if isinstance(prompt, dict) else prompt


def answer_line(prompt: Any, outcome: Any) -> str:
    """One line of the file of answers: what was asked and what came of it."""
    asked = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    if isinstance(outcome, Exception):
        answer: dict[str, Any] = {"error": command_error(outcome).message}
    else:
        answer = {
            "text": outcome.text,
            "finish_reason": outcome.finish_reason,
            "request_id": outcome.request_id,
            "usage": asdict(outcome.usage),
        }
    return json.dumps({**asked, **answer}, ensure_ascii=False) + "\n"


def throughput_line(outputs: Sequence[Any], elapsed_s: float) -> str:
    """What a batch did, for people."""
    token_count = sum(len(output.token_ids) for output in outputs)
    return (
        f"[bold]{len(outputs):,}[/] answers, {token_count:,} tokens in {elapsed_s:.2f} s: "
        f"[bold]{token_count / elapsed_s:,.0f} tokens/s[/], {len(outputs) / elapsed_s:,.1f} answers/s"
    )
