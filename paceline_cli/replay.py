"""`paceline replay`: generates a request of a journal again and compares each token: why did it say that?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from executor_svc.config import ExecutorConfig
from paceline_cli import terminal
from paceline_cli.config_flags import Settings, takes_settings
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import flag

if TYPE_CHECKING:
    from executor_svc.batch import Runner, RunnerInfo
    from paceline.v1.fleet_pb2 import JoinRequest
    from scheduler_svc.journal.restored import Restored, RestoredChoice, RestoredRequest
    from scheduler_svc.tokenizer import Tokenizer

_SHOWN_DIFFERENCES = 20
_CONTEXT = 6  # tokens of text around a difference, on either side
_NAMED_REQUESTS = 5
_SETTINGS = (
    *("device", "dtype", "weights", "threads", "native", "attention", "graphs"),
    *("max_model_len", "block_size"),
    *("cache_memory_bytes", "memory_utilization", "max_num_batched_tokens"),
)  # what may change a token, or is needed for the model to fit
_OTHER_SETTINGS = [setting.name for setting in fields(ExecutorConfig) if setting.name not in _SETTINGS]


@takes_settings(ExecutorConfig, without=_OTHER_SETTINGS)
def replay(
    journal: Annotated[Path, typer.Argument(help="The file of `paceline scheduler --journal`; it is only read.")],
    request: Annotated[str, typer.Argument(help="Id of the request.")],
    model: Annotated[
        str,
        flag(
            "--model",
            "Serving folder of the model that it was, or 'fake'. The journal does not know where it lies.",
            metavar="MODEL_FOLDER",
        ),
    ],
    as_json: Annotated[bool, flag("--json", "Print the outcome as JSON.", envvar=None)] = False,
    *,
    settings: Settings,
) -> None:
    """Generate a request of a journal again and compare each token: why did it say that?

    Every position is judged by itself, after the tokens that were recorded before it.

    In float32 the same tokens come; in narrower types candidates that lie close together may change places.

    Exit code 0: all tokens are the same; 1: some are not; 2: it cannot be replayed.

    [dim]$[/] paceline replay journal.db chat-4711 --model ~/models/smollm2
    [dim]$[/] paceline replay journal.db chat-4711 --model ~/models/smollm2 --dtype float32 --json
    """
    with _cannot_be_replayed():
        restored, recorded = _read(journal, request)
        tokenizer = _tokenizer_of(model)
        runner = _load(model, settings)
    said = Recording(recorded, restored, runner.info, tokenizer)
    if not as_json:
        _print_facts(said)
    outcomes = _replay_all(said, runner)
    if as_json:
        terminal.stdout().print(json.dumps(_as_json(said, outcomes)), markup=False)
    else:
        for outcome in outcomes:
            _print_outcome(said, outcome)
    if any(outcome.differences for outcome in outcomes):
        raise typer.Exit(ExitCode.FAILED)


@dataclass(frozen=True, slots=True)
class Recording:
    """A request of a journal, and the model with which it is replayed."""

    request: RestoredRequest
    journal: Restored
    model: RunnerInfo
    tokenizer: Tokenizer

    @property
    def choices(self) -> list[RestoredChoice]:
        """Those that have generated something."""
        return [choice for choice in self.request.choices if choice.output_ids]

    def ran_on(self, choice: RestoredChoice) -> JoinRequest | None:
        """The executor that had this choice last, as it joined; None when it has left since."""
        from paceline.v1.fleet_pb2 import JoinRequest

        joined = map(JoinRequest.FromString, self.journal.joined)
        where = (choice.executor_id, choice.incarnation)
        return next((one for one in joined if (one.executor_id, one.incarnation) == where), None)


@dataclass(frozen=True, slots=True)
class Difference:
    """A place where another token comes now."""

    index: int  # in the output
    recorded: int
    replayed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one choice."""

    choice: RestoredChoice
    differences: list[Difference]


# --- reading and loading --------------------------------------------------------------------------------------------


@contextmanager
def _cannot_be_replayed() -> Iterator[None]:
    """Turn what is wrong with the journal, the model or the settings into wrong usage: 1 says that tokens differ."""
    from scheduler_svc.journal.errors import JournalError

    try:
        yield
    except (JournalError, ValueError) as error:
        message, _, remedy = str(error).rpartition("; ")
        raise CommandError(message or remedy, remedy if message else "", exit_code=ExitCode.USAGE) from error


def _read(journal: Path, request_id: str) -> tuple[Restored, RestoredRequest]:
    """The journal and a request in it that has output."""
    from scheduler_svc.journal.store import Store

    restored = Store.read(journal)
    recorded = next((one for one in restored.requests if one.request_id == request_id), None)
    if recorded is None:
        raise _unknown(request_id, journal, [one.request_id for one in restored.requests])
    if not any(choice.output_ids for choice in recorded.choices):
        message = f"request '{request_id}' has no output in '{journal}' yet"
        raise CommandError(message, "replay it when it has some", exit_code=ExitCode.USAGE)
    return restored, recorded


def _unknown(request_id: str, journal: Path, known: Sequence[str]) -> CommandError:
    latest = ", ".join(f"'{one}'" for one in reversed(known[-_NAMED_REQUESTS:]))
    there = f"the latest there: {latest}" if known else "it holds none at all"
    return CommandError(
        f"no request '{request_id}' in '{journal}'; {there}",
        "answers are kept after their end for --keep-results of the scheduler: replay it sooner, or raise that",
        exit_code=ExitCode.USAGE,
    )


def _tokenizer_of(model: str) -> Tokenizer:
    from common.serving_folder import ServingFolder
    from scheduler_svc.tokenizer import Tokenizer

    return Tokenizer.bytes() if model == "fake" else Tokenizer.from_folder(ServingFolder.open(model))


def _load(model: str, settings: Settings) -> Runner:
    """The model, with room for one request."""
    from common.logs import configure_logs
    from executor_svc.machine import calm_openmp

    calm_openmp()  # the machine may be serving
    from executor_svc.main import load_runner

    configure_logs("replay", "error")  # what is to be said stands in the table, or in the JSON
    config = ExecutorConfig(model=model, max_num_seqs=1, fake_step_us=0, fake_token_us=0, **settings)
    with terminal.activity(terminal.stderr(), f"Loading {model}") as report:
        return load_runner(config, lambda phase, fraction: report(phase[:1].upper() + phase[1:], fraction))


# --- comparing ------------------------------------------------------------------------------------------------------


def _replay_all(said: Recording, runner: Runner) -> list[Outcome]:
    """Replay every choice that has output."""
    from paceline_cli.replay_steps import Replayer

    replayer = Replayer(runner)
    with terminal.activity(terminal.stderr(), "Replaying") as report:
        return [
            Outcome(choice, list(_differences(replayer.tokens(said.request, choice.choice), choice, report)))
            for choice in said.choices
        ]


def _differences(
    tokens: Iterator[int], choice: RestoredChoice, report: Callable[[str, float], None]
) -> Iterator[Difference]:
    count = len(choice.output_ids)
    for index, (recorded, replayed) in enumerate(zip(choice.output_ids, tokens, strict=True)):
        report(f"Replaying choice {choice.choice}, {count} tokens", index / count)
        if recorded != replayed:
            yield Difference(index, recorded, replayed)


# --- showing --------------------------------------------------------------------------------------------------------


def _print_facts(said: Recording) -> None:
    """Say what is replayed, and where it may not be the same as it was."""
    console, request = terminal.stderr(), said.request
    prompt = _count(len(request.prompt_ids), "prompt token")
    facts = f"request '{request.request_id}': {prompt} · {_sampling(request.parameters['sampling'])}"
    console.print(facts, style="bold", markup=False)
    console.print(f"  here: {said.model.name}, {said.model.dtype}", markup=False)
    for choice in said.choices:
        end = choice.finish_reason or "not ended"
        ran = f"ran on {choice.executor_id or 'no executor'}"
        joined = said.ran_on(choice)
        if joined is not None:
            ran += f" with {joined.model.name}, {joined.model.dtype}"
        line = f"  choice {choice.choice}: {_count(len(choice.output_ids), 'token')} · {end} · {ran}"
        console.print(line, markup=False)
    for warning in sorted({warning for choice in said.choices for warning in _warnings(said, choice)}):
        console.print(f"  {warning}", style="yellow", markup=False)


def _warnings(said: Recording, choice: RestoredChoice) -> Iterator[str]:
    """Why a difference would mean little."""
    joined = said.ran_on(choice)
    if joined is None:
        return
    if joined.model.fingerprint != said.model.fingerprint:
        theirs, ours = joined.model.fingerprint[:12], said.model.fingerprint[:12]
        yield f"it ran with another serving folder ({theirs}, here {ours}): name that one with --model"
    if joined.model.dtype != said.model.dtype:
        yield f"it ran in {joined.model.dtype}, here in {said.model.dtype}: --dtype and --weights make it the same"


def _sampling(sampling: dict[str, Any]) -> str:
    """How tokens were chosen, without what changes nothing."""
    if not sampling["temperature"]:
        return "greedy"
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return ", ".join(
        f"{name} {value:g}" if name != "seed" else f"{name} {value}"
        for name, value in sampling.items()
        if value != off.get(name)
    )


def _print_outcome(said: Recording, outcome: Outcome) -> None:
    """The verdict on a choice."""
    console, count = terminal.stdout(), len(outcome.choice.output_ids)
    prefix = f"choice {outcome.choice.choice}: " if len(said.request.choices) > 1 else ""
    differences = outcome.differences
    if not differences:
        console.print(f"[green]{prefix}{'all ' if count > 1 else ''}{_count(count, 'token')} the same[/]")
        return
    console.print(f"[bold red]{prefix}{len(differences):,} of {_count(count, 'token')} differ[/]")
    console.print(_table(said, outcome.choice, differences[:_SHOWN_DIFFERENCES]), soft_wrap=False)
    if len(differences) > _SHOWN_DIFFERENCES:
        console.print(f"[dim]… and {len(differences) - _SHOWN_DIFFERENCES:,} more; --json shows all of them[/]")


def _table(said: Recording, choice: RestoredChoice, differences: Sequence[Difference]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("index", "recorded", "replayed", "text around"):
        table.add_column(name, overflow="fold", justify="right" if name == "index" else "left")
    for difference in differences:
        before, after = _text_around(said, choice, difference.index)
        around = Text.assemble(
            (_quoted(before), "dim"), ("⟦", "bold"), _text_of(said.tokenizer, difference.recorded), ("⟧", "bold"),
            (_quoted(after), "dim"),
        )  # fmt: skip
        tokens = (_token(said.tokenizer, token) for token in (difference.recorded, difference.replayed))
        table.add_row(str(difference.index), *map(Text, tokens), around)
    return table


def _text_around(said: Recording, choice: RestoredChoice, index: int) -> tuple[str, str]:
    """The text before and after an output token, a few tokens of each."""
    known, place = said.request.prompt_ids + choice.output_ids, len(said.request.prompt_ids) + index
    before, after = known[max(0, place - _CONTEXT) : place], known[place + 1 : place + 1 + _CONTEXT]
    return said.tokenizer.decode(before.tolist()), said.tokenizer.decode(after.tolist())


def _token(tokenizer: Tokenizer, token_id: int) -> str:
    return f"{token_id} '{_text_of(tokenizer, token_id)}'"


def _text_of(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token in one line; of one without text, such as the end, its name."""
    return _quoted(tokenizer.decode([token_id]) or tokenizer.token(token_id) or "")


def _quoted(text: str) -> str:
    """`text` in one line."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(said: Recording, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The outcome for programs."""
    return {
        "request_id": said.request.request_id,
        "same": not any(outcome.differences for outcome in outcomes),
        "model": said.model.name,
        "dtype": said.model.dtype,
        "sampling": said.request.parameters["sampling"],
        "prompt_token_count": len(said.request.prompt_ids),
        "choices": [_choice_as_json(said, outcome) for outcome in outcomes],
    }


def _choice_as_json(said: Recording, outcome: Outcome) -> dict[str, Any]:
    choice, joined = outcome.choice, said.ran_on(outcome.choice)
    return {
        "choice": choice.choice,
        "token_count": len(choice.output_ids),
        "finish_reason": choice.finish_reason,
        "executor_id": choice.executor_id,
        "executor_dtype": joined.model.dtype if joined else None,
        "warnings": list(_warnings(said, choice)),
        "differences": [
            {
                "index": difference.index,
                "recorded": {"id": difference.recorded, "text": said.tokenizer.decode([difference.recorded])},
                "replayed": {"id": difference.replayed, "text": said.tokenizer.decode([difference.replayed])},
            }
            for difference in outcome.differences
        ],
    }


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
