"""`paceline chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape

from paceline_cli import sampling_flags as flags
from paceline_cli import terminal
from paceline_cli.errors import CommandError, command_error
from paceline_cli.flags import DEFAULT_SERVER, Server, flag
from paceline_cli.terminal import print_error, usage_line

_HELP = """[dim]/reset   forget the conversation
/system TEXT   forget it and begin with this instruction
/help    this
Ctrl-C   stop the answer
Ctrl-D   leave[/]"""


def chat(
    server: Server = DEFAULT_SERVER,
    system: Annotated[
        str | None, flag("--system", "Instruction that the conversation begins with.", metavar="TEXT")
    ] = None,
    max_tokens: flags.MaxTokens = 1024,
    stop: flags.Stop = None,
    timeout: flags.Timeout = None,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    min_p: flags.MinP = None,
    seed: flags.Seed = None,
) -> None:
    """Talk with the model; without a terminal each line of standard input is one turn.

    [dim]$[/] paceline chat
    [dim]$[/] echo "What is 2 + 2?" | paceline chat --temperature 0
    """
    settings = flags.given(
        max_output_tokens=max_tokens, stop=stop, timeout_s=timeout,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
    )  # fmt: skip
    from paceline import Client

    interactive = sys.stdin.isatty()
    with Client(server) as client:
        conversation = Conversation(client, terminal.stdout(), settings, system=system)
        if interactive:
            model = client.model()
            terminal.stdout().print(f"[bold]{escape(model.name)}[/] at {escape(server)}  [dim]/help · Ctrl-D leaves[/]")
            conversation.run(_typed_lines(terminal.stdout()))
        else:
            conversation.run((line.rstrip("\n") for line in sys.stdin), go_on_after_errors=False)


class Conversation:
    """What was said so far, and a model to say more."""

    def __init__(self, client: Any, console: Console, settings: dict[str, Any], *, system: str | None = None) -> None:
        self._client = client
        self._console = console
        self._settings = settings
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._opening)  # user and assistant take turns after the opening

    def run(self, lines: Iterator[str], *, go_on_after_errors: bool = True) -> None:
        """Take turns until there are no more lines."""
        for line in lines:
            text = line.strip()
            if text.startswith("/"):
                self._command(text)
            elif text:
                try:
                    self.say(text)
                except CommandError as error:
                    if not go_on_after_errors:
                        raise
                    print_error(error)

    def say(self, text: str) -> None:
        """Take one turn: stream the answer to `text`. A turn that fails was never said."""
        asked = [*self.messages, {"role": "user", "content": text}]
        begun = time.perf_counter()
        said: list[str] = []
        output = None
        try:
            with self._client.chat(asked, **self._settings) as stream:
                for chunk in stream:
                    said.append(chunk.text)
                    self._write(chunk.text)
            output = stream.output
        except KeyboardInterrupt:  # leaving the `with` has cancelled the request
            self._write("\n")
            self._console.print("[dim](stopped)[/]")
        except Exception as error:
            if said:
                self._write("\n")
            raise command_error(error) from error
        if said:
            self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
        if output is not None:
            self._write("\n")
            if self._console.is_terminal:
                self._console.print(usage_line(output, time.perf_counter() - begun))

    def _command(self, text: str) -> None:
        """Do what a line with a slash says."""
        name, _, rest = text.partition(" ")
        if name == "/system" and rest:
            self._opening = [{"role": "system", "content": rest}]
        if name in ("/reset", "/system"):
            self.messages = list(self._opening)
            self._console.print("[dim]a new conversation[/]")
        elif name == "/help":
            self._console.print(_HELP)
        else:
            self._console.print(f"[dim]{escape(name)} is unknown; /help lists what there is[/]")

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def _typed_lines(console: Console) -> Iterator[str]:
    """Lines as the user types them, with editing and recall; Ctrl-C gives up a line, Ctrl-D ends."""
    try:
        import readline  # noqa: F401  gives `input` its editing
    except ImportError:
        pass
    while True:
        try:
            # The marks around the colour keep it out of readline's idea of the prompt's width.
            yield input("\n\001\033[36m\002>\001\033[0m\002 ")
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D leaves[/]")
        except EOFError:
            console.print()
            return
