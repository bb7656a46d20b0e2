"""A terminal for the commands under test: a pseudo-terminal, and as much of an emulator as it takes to read it."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from typing import Any

from tests.paceline_cli.conftest import PATIENCE_S, REPOSITORY

_PIECES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])", re.DOTALL)
_KNOWN = "HKJmhl"


class Terminal:
    """Runs the command on a terminal of its own, and knows what is on its screen."""

    def __init__(self, *words: str, size: tuple[int, int] = (100, 30), environment: Mapping[str, str] | None = None):
        self.ours, self.theirs = pty.openpty()
        self.size = size
        termios.tcsetwinsize(self.ours, size[::-1])
        os.set_blocking(self.ours, False)
        self.modes_before = termios.tcgetattr(self.theirs)
        self.output = ""
        self.cells: dict[int, dict[int, str]] = {}
        self.modes: set[str] = set()
        path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "client")))
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paceline_cli", *words],
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            start_new_session=True,
            env={**inherited, "PYTHONPATH": path, "TERM": "xterm-256color", **(environment or {})},
        )

    async def __aenter__(self) -> Terminal:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        import signal

        self.size = columns, lines
        termios.tcsetwinsize(self.ours, (lines, columns))
        self.process.send_signal(signal.SIGWINCH)  # the kernel tells only who has it as its controlling terminal

    def screen(self) -> list[str]:
        """The lines of the screen."""
        self._read()
        lines = []
        for number in range(1, self.size[1] + 1):
            row = self.cells.get(number, {})
            lines.append("".join(row.get(column, " ") for column in range(1, max(row, default=0) + 1)).rstrip())
        return lines

    def text(self) -> str:
        return "\n".join(self.screen())

    async def shows(self, condition: str | Callable[[str], Any]) -> str:
        """Wait until the screen holds a text, or fulfils a condition; returns it."""
        is_there = (lambda text: condition in text) if isinstance(condition, str) else condition
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not is_there(text := self.text()):
                    assert self.process.poll() is None, f"it has ended: {self.output[-2000:]}"
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{condition} is not on the screen:\n{self.text()}") from None
        return text

    async def ended(self) -> int:
        """The exit code, once it has ended."""
        async with asyncio.timeout(PATIENCE_S):
            while self.process.poll() is None:
                self._read()
                await asyncio.sleep(0.02)
        self._read()
        return self.process.returncode

    def is_as_before(self) -> bool:
        """Whether keys and screen are as the command found them."""
        return termios.tcgetattr(self.theirs) == self.modes_before and not self.modes & {"?1049", "?25 off", "?7 off"}

    def _read(self) -> None:
        try:
            while some := os.read(self.ours, 65536):
                text = some.decode(errors="replace")
                self.output += text
                self._show(text)
        except (BlockingIOError, OSError):
            pass

    def _show(self, text: str) -> None:
        text = getattr(self, "_rest", "") + text
        self._rest = ""
        if (begun := text.rfind("\x1b")) >= 0 and not _PIECES.match(text, begun):
            text, self._rest = text[:begun], text[begun:]
        for numbers, verb, letter in _PIECES.findall(text):
            if letter:
                self._put(letter)
            else:
                assert verb in _KNOWN, f"an escape sequence that nobody expects: {numbers}{verb}"
                self._obey(numbers, verb)

    def _put(self, letter: str) -> None:
        row, column = getattr(self, "_at", (1, 1))
        if letter == "\r":
            self._at = row, 1
        elif letter == "\n":
            self._at = row + 1, column
        else:
            self.cells.setdefault(row, {})[column] = letter
            self._at = row, min(self.size[0], column + 1)

    def _obey(self, numbers: str, verb: str) -> None:
        row, column = getattr(self, "_at", (1, 1))
        if verb == "H":
            row, column = (int(number or 1) for number in (numbers + ";").split(";")[:2])
            self._at = row, column
        elif verb == "K":
            line = self.cells.setdefault(row, {})
            self.cells[row] = {at: letter for at, letter in line.items() if at < column}
        elif verb == "J":
            self.cells = {} if numbers == "2" else {at: line for at, line in self.cells.items() if at < row}
        elif verb in "hl" and numbers in ("?1049", "?25", "?7"):
            normal = numbers != "?1049"
            name = f"{numbers} off" if normal else numbers
            (self.modes.add if (verb == "h") is not normal else self.modes.discard)(name)
