"""`paceline chat` and `paceline generate` against clients that answer without a server."""

from __future__ import annotations

import io
import json
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from rich.console import Console
from typer.testing import CliRunner

import paceline
from paceline import Choice, Chunk, FinishReason, InvalidRequest, Output, Unavailable, Usage
from paceline_cli.batch import read_prompts
from paceline_cli.chat import Conversation
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.main import app
from paceline_cli.terminal import print_error, usage_line


class FakeStream:
    """Streams the words of its choices, last choice first; `interrupt_after` words the user presses Ctrl-C."""

    def __init__(self, *texts: str, interrupt_after: int | None = None, cached_count: int = 0) -> None:
        self._words = [[word + " " for word in text.split()] for text in texts]
        self._interrupt_after = interrupt_after
        self.was_left = False
        self.texts = [""] * len(texts)  # so far
        choices = tuple(
            Choice(index, "".join(words), tuple(range(len(words))), FinishReason.STOP)
            for index, words in enumerate(self._words)
        )
        usage = Usage(3, sum(map(len, self._words)), 0, 0, 0, 0, cached_count)
        first = choices[0]
        self.output = Output("r-1", first.text, first.token_ids, first.finish_reason, usage, choices)

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.was_left = True

    def __iter__(self) -> Any:
        for choice, words in reversed(list(enumerate(self._words))):
            for index, word in enumerate(words):
                if index == self._interrupt_after:
                    raise KeyboardInterrupt
                self.texts[choice] += word
                is_last = index == len(words) - 1
                yield Chunk(word, (index,), FinishReason.STOP if is_last else None, choice=choice)


class FakeClient:
    """Answers each question with what was prepared for it, and remembers what it was asked."""

    def __init__(self, *answers: FakeStream | Exception) -> None:
        self._answers = list(answers)
        self.asked: list[Any] = []
        self.settings: dict[str, Any] = {}

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def chat(self, messages: Any, **settings: Any) -> FakeStream:
        self.asked.append(list(messages))
        self.settings = settings
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    generate = chat

    def generate_batch(self, prompts: Any, *, on_progress: Any, on_error: str, **settings: Any) -> list[Any]:
        assert on_error == "return"
        self.asked, self.settings = list(prompts), settings
        on_progress(len(self.asked), len(self.asked))
        return [answer if isinstance(answer, Exception) else answer.output for answer in self._answers]


def conversation(client: FakeClient, **more: Any) -> tuple[Conversation, io.StringIO]:
    """A conversation and what it prints."""
    screen = io.StringIO()
    return Conversation(client, Console(file=screen, highlight=False), {"temperature": 0.0}, **more), screen


def test_the_model_is_given_the_whole_conversation():
    """It has no memory of its own."""
    client = FakeClient(FakeStream("Hello there"), FakeStream("I did"))
    talk, screen = conversation(client, system="Be brief")

    talk.run(iter(["Hi", "", "Did you greet me?"]))

    assert [message["role"] for message in client.asked[1]] == ["system", "user", "assistant", "user"]
    assert client.asked[1][2]["content"] == "Hello there "
    assert client.settings == {"temperature": 0.0}
    assert screen.getvalue() == "Hello there \nI did \n"


def test_reset_forgets_all_but_the_instruction():
    """A new topic without the old one in its context."""
    client = FakeClient(FakeStream("Hello"), FakeStream("Yes"))
    talk, _ = conversation(client, system="Be brief")

    talk.run(iter(["Hi", "/reset", "Anew?"]))

    assert client.asked[1] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Anew?"}]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said():
    """The stream is left, which cancels the request; the conversation goes on from what the user saw."""
    stream = FakeStream("one two three four", interrupt_after=2)
    client = FakeClient(stream, FakeStream("five"))
    talk, screen = conversation(client)

    talk.run(iter(["Count", "Go on"]))

    assert stream.was_left
    assert client.asked[1][1] == {"role": "assistant", "content": "one two "}
    assert "(stopped)" in screen.getvalue()


def test_a_turn_that_failed_was_never_said(capsys):
    """Otherwise the failed question would be part of the next."""
    client = FakeClient(InvalidRequest("too long", grpc.StatusCode.INVALID_ARGUMENT), FakeStream("Fine"))
    talk, _ = conversation(client)

    talk.run(iter(["x" * 100, "Short"]))

    assert client.asked[1] == [{"role": "user", "content": "Short"}]
    assert "too long" in capsys.readouterr().err


def test_unknown_commands_are_not_sent_to_the_model():
    """A typing mistake is not a question."""
    client = FakeClient()
    talk, screen = conversation(client)

    talk.run(iter(["/rest", "/help"]))

    assert client.asked == []
    assert "/rest is unknown" in screen.getvalue()
    assert "Ctrl-D" in screen.getvalue()


def test_chat_without_a_terminal_takes_a_turn_for_each_line(monkeypatch):
    """So that it can stand in a pipe."""
    client = FakeClient(FakeStream("Four"), FakeStream("Six"))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    result = CliRunner().invoke(app, ["chat", "--temperature", "0"], input="2 + 2?\n3 + 3?\n")

    assert result.exit_code == ExitCode.OK, result.output
    assert result.stdout == "Four \nSix \n"
    assert client.settings == {"max_output_tokens": 1024, "temperature": 0.0}


def test_a_server_that_is_not_there_ends_a_chat_in_a_pipe(monkeypatch):
    """A script sees it in the exit code, and nobody sees a traceback."""
    client = FakeClient(Unavailable("nothing listens at localhost:50051", grpc.StatusCode.UNAVAILABLE))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    result = CliRunner().invoke(app, ["chat"], input="Hi\n")

    assert result.exit_code == ExitCode.UNREACHABLE
    assert "nothing listens" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("words", [[], ["--no-stream"]])
def test_generate_prints_the_continuation_and_nothing_else(words, monkeypatch):
    """Its output is another program's input."""
    client = FakeClient(FakeStream("Paris of course"))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    result = CliRunner().invoke(app, ["generate", "-", "--max-tokens", "4", "--stop", "x", *words], input="The capital")

    assert result.exit_code == ExitCode.OK, result.output
    assert result.stdout == "Paris of course \n"
    assert client.asked == [list("The capital")]
    assert client.settings == {"max_output_tokens": 4, "stop": ["x"]}


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ([], "── 2 of 2 ──\nLyon maybe \n── 1 of 2 ──\nParis of course \n"),
        (["--no-stream"], "── 1 of 2 ──\nParis of course \n── 2 of 2 ──\nLyon maybe \n"),
    ],
)
def test_generate_prints_every_continuation_under_its_heading(words, printed, monkeypatch):
    """Their pieces come mixed, so each is printed whole: when it has ended, or in order."""
    client = FakeClient(FakeStream("Paris of course", "Lyon maybe"))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    result = CliRunner().invoke(app, ["generate", "The capital", "--n", "2", "--max-tokens", "4", *words])

    assert result.exit_code == ExitCode.OK, result.output
    assert result.stdout == printed
    assert client.settings == {"n": 2, "max_output_tokens": 4}


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ([], "── 3 of 3 ──\nOui \n── 2 of 3, unfinished ──\nLyon maybe \n"),
        (["--no-stream"], "── 3 of 3 ──\nOui \n── 2 of 3, unfinished ──\nLyon maybe \n"),
    ],
)
def test_generate_prints_what_an_interruption_left(words, printed, monkeypatch):
    """Its tokens were computed, and the one that is wanted may be among them."""
    client = FakeClient(FakeStream("Paris", "Lyon maybe not", "Oui", interrupt_after=2))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    result = CliRunner().invoke(app, ["generate", "The capital", "--n", "3", *words])

    assert result.exit_code == ExitCode.INTERRUPTED
    assert result.stdout == printed


def test_the_help_says_what_a_file_of_prompts_looks_like():
    """Nobody should have to read the source to write one."""
    help_text = CliRunner().invoke(app, ["generate", "--help"]).output

    assert '{"prompt": "Once upon", "max_output_tokens": 8, "seed": 7, "id": "a-1"}' in help_text


def test_generate_says_for_whom_and_how_urgently(monkeypatch):
    """A priority of 0 that somebody asked for is sent as well."""
    client = FakeClient(FakeStream("Paris"))
    monkeypatch.setattr(paceline, "Client", lambda server: client)
    words = ["--priority", "0", "--tenant", "acme", "--cache-salt", "pepper"]

    assert CliRunner().invoke(app, ["generate", "The capital", *words]).exit_code == ExitCode.OK
    assert client.settings == {"priority": 0, "tenant": "acme", "cache_salt": "pepper"}


def test_the_usage_counts_all_continuations_and_what_was_cached():
    """What is paid for is what all of them took; what was cached explains a first token that came early."""
    two, one = FakeStream("Paris of course", "Lyon", cached_count=2), FakeStream("Paris")

    assert usage_line(two.output, 2.0) == "[dim]3 (2 cached) + 4 tokens · 2 tokens/s · stop[/]"
    assert usage_line(one.output, 2.0) == "[dim]3 + 1 tokens · 0 tokens/s · stop[/]"


def test_errors_are_printed_as_they_are(capsys):
    """A model that is called `:smile:` or `[red]` is named so in the error about it."""
    print_error(CommandError("no model ':smile:' in [red]", "try ':heart:'"))

    assert capsys.readouterr().err == "error: no model ':smile:' in [red]\n  → try ':heart:'\n"


def test_an_interrupted_answer_leaves_with_130(monkeypatch):
    """As the shell expects."""
    client = FakeClient(FakeStream("one two", interrupt_after=1))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    assert CliRunner().invoke(app, ["generate", "Count"]).exit_code == ExitCode.INTERRUPTED


def test_a_batch_writes_an_answer_or_an_error_for_every_prompt(tmp_path, monkeypatch):
    """One bad prompt among thousands costs one line."""
    prompts, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "Once", "id": 7}\n\n"Twice"\n')
    client = FakeClient(FakeStream("upon"), InvalidRequest("empty", grpc.StatusCode.INVALID_ARGUMENT))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    result = CliRunner().invoke(app, ["generate", "-i", str(prompts), "-o", str(answers), "--seed", "0"])

    first, second = (json.loads(line) for line in answers.read_text().splitlines())
    assert (first["prompt"], first["id"], first["text"], first["finish_reason"]) == ("Once", 7, "upon ", "stop")
    assert second == {"prompt": "Twice", "error": "empty"}
    assert client.settings == {"seed": 0}
    assert client.asked == [{"prompt": "Once"}, "Twice"]
    assert result.exit_code == ExitCode.REFUSED
    assert "1 of 2 prompts failed" in result.stderr
    assert "1 answers, 1 tokens in" in result.stderr
    assert "tokens/s" in result.stderr


def test_a_batch_writes_every_continuation_of_a_prompt(tmp_path, monkeypatch):
    """The place of each is its number, also for prompts that ask for their own count."""
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "Once", "n": 2, "tenant": "acme", "priority": 3, "cache_salt": "x"}\n"Twice"\n')
    client = FakeClient(FakeStream("upon", "ago"), FakeStream("thrice"))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    result = CliRunner().invoke(app, ["generate", "-i", str(prompts)])

    two, one = (json.loads(line) for line in result.stdout.splitlines())
    assert client.asked[0] == {"prompt": "Once", "n": 2, "tenant": "acme", "priority": 3, "cache_salt": "x"}
    assert [choice["text"] for choice in two["choices"]] == ["upon ", "ago "]
    assert {choice["finish_reason"] for choice in two["choices"]} == {"stop"}
    assert two["text"] == "upon "
    assert "choices" not in one
    assert "2 answers, 3 tokens" in result.stderr


def test_a_file_that_cannot_be_written_is_named_before_anything_is_sent(tmp_path, monkeypatch):
    """Finding out afterwards would cost every answer of a batch that took hours."""
    prompts = tmp_path / "in.txt"
    prompts.write_text("Once\n")
    client = FakeClient(FakeStream("upon"))
    monkeypatch.setattr(paceline, "Client", lambda server: client)

    result = CliRunner().invoke(app, ["generate", "-i", str(prompts), "-o", str(tmp_path / "nowhere" / "out.jsonl")])

    assert result.exit_code == ExitCode.USAGE
    assert "out.jsonl: No such file or directory" in result.stderr
    assert "--output" in result.stderr
    assert client.asked == []


def test_earlier_answers_stay_until_there_are_new_ones(tmp_path, monkeypatch):
    """A batch that is interrupted leaves what the one before it wrote; one that ends replaces all of it."""
    prompts, answers = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_text("Once\n")
    answers.write_text("earlier answers\n")
    client = FakeClient(FakeStream("upon"))
    monkeypatch.setattr(paceline, "Client", lambda server: client)
    words = ["generate", "-i", str(prompts), "-o", str(answers)]

    with monkeypatch.context() as patch:
        patch.setattr(client, "generate_batch", Mock(side_effect=KeyboardInterrupt))
        assert CliRunner().invoke(app, words).exit_code == ExitCode.INTERRUPTED
    kept = answers.read_text()
    assert CliRunner().invoke(app, words).exit_code == ExitCode.OK

    assert kept == "earlier answers\n"
    assert json.loads(answers.read_text())["text"] == "upon "


def test_prompts_are_read_from_text_and_json(tmp_path):
    """A list of lines is the least one can ask for; JSON says more."""
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("One\u2028still one\n\nTwo\n", encoding="utf-8")
    lines.write_text('"One"\n{"messages": [{"role": "user", "content": "Hi"}]}\n')

    assert read_prompts(text) == ["One\u2028still one", "Two"]
    assert read_prompts(lines) == ["One", {"messages": [{"role": "user", "content": "Hi"}]}]


@pytest.mark.parametrize("content", ["", "{", '{"text": "Once"}', '{"prompt": "Once", "max_token": 3}', "[1, 2]"])
def test_a_line_without_a_prompt_is_named(content, tmp_path):
    """The file may have a million lines."""
    file = tmp_path / "bad.jsonl"
    file.write_text(f'"fine"\n{content}\n' if content else "")

    with pytest.raises(CommandError, match=r"bad.jsonl:2" if content else "no prompts") as failure:
        read_prompts(file)

    assert failure.value.exit_code == ExitCode.USAGE
