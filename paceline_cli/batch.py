"""A file of prompts in, a file of answers out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paceline_cli import terminal
from paceline_cli.errors import CommandError, ExitCode, command_error
from paceline_cli.terminal import token_count


def run_batch(client: Any, input_file: Path, output_file: Path | None, settings: dict[str, Any]) -> None:
    """Generate for every prompt of `input_file`, write the answers in the same order, say how fast it went."""
    prompts = read_prompts(input_file)
    console = terminal.stderr()
    with _opened(output_file) as answers:  # first: a file that cannot be written must not cost the answers
        begun = time.perf_counter()
        outcomes = _generate(client, [_without_id(prompt) for prompt in prompts], settings, console)
        elapsed = time.perf_counter() - begun
        if output_file is not None and output_file.is_file():
            answers.truncate(0)
        answers.writelines(answer_line(*answer) for answer in zip(prompts, outcomes, strict=True))
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    console.print(throughput_line([outcome for outcome in outcomes if not isinstance(outcome, Exception)], elapsed))
    if errors:
        first = command_error(errors[0])
        message = (
            f"{len(errors)} of {len(prompts)} prompts failed; their lines have an `error`; the first: {first.message}"
        )
        raise CommandError(message, first.what_to_do, exit_code=first.exit_code)


def _opened(file: Path | None) -> AbstractContextManager[TextIO]:
    """Where the answers go, standard output if None; what a file has already stays until it is truncated."""
    if file is None:
        return nullcontext(sys.stdout)
    try:
        return file.open("a", encoding="utf-8")
    except OSError as error:
        raise CommandError(
            f"cannot write {file}: {error.strerror}", "name another file with --output", exit_code=ExitCode.USAGE
        ) from None


def _generate(client: Any, prompts: Sequence[Any], settings: dict[str, Any], console: Console) -> list[Any]:
    """An output or an error for each of `prompts`; shows on `console` how far it is."""
    columns = (TextColumn("Generating"), BarColumn(bar_width=40), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(prompts))
        outcomes: list[Any] = client.generate_batch(
            prompts,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            on_error="return",
            **settings,
        )
    return outcomes


def read_prompts(file: Path) -> list[Any]:
    """The prompts of a file: of a `.jsonl` one on each line, of other files each line as it is.

    A line of JSON is a string, or an object with a `prompt` (text or token ids) or `messages`, and whatever else
    `Client.generate` takes: `{"prompt": "Once", "max_output_tokens": 8, "n": 2}`. An `id` comes back with the answer.
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
        if len(outcome.choices) > 1:
            answer["choices"] = [
                {"text": choice.text, "finish_reason": choice.finish_reason} for choice in outcome.choices
            ]
    return json.dumps({**asked, **answer}, ensure_ascii=False) + "\n"


def throughput_line(outputs: Sequence[Any], elapsed_s: float) -> str:
    """What a batch did, for people."""
    count = sum(map(token_count, outputs))
    return (
        f"[bold]{len(outputs):,}[/] answers, {count:,} tokens in {elapsed_s:.2f} s: "
        f"[bold]{count / elapsed_s:,.0f} tokens/s[/], {len(outputs) / elapsed_s:,.1f} answers/s"
    )
