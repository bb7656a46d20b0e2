"""The terminal as a screen: keys come in, pictures go out, and whatever happens it is left as it was."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J"  # another screen, no cursor, no wrapping
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


class Screen:
    """Shows lines of text on the terminal's other screen, and writes only those that have changed.

    A line that is the same as before costs nothing: over a slow connection most of a picture is.
    """

    def __init__(self, console: Console, out: TextIO) -> None:
        """Show on `out` what `console` says that it can show."""
        self._console = console
        self._out = out
        self._shown: list[str] = []
        self._size = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now."""
        with contextlib.suppress(OSError, ValueError):
            columns, lines = os.get_terminal_size(self._out.fileno())
            if columns and lines:
                return columns, lines
        return 80, 24

    @property
    def is_outdated(self) -> bool:
        """Whether what is shown was made for another size, or is gone."""
        return self._size != self.size

    def enter(self) -> None:
        """Begin; the screen is empty."""
        self._size = (0, 0)
        self._write(_ENTER)

    def leave(self) -> None:
        """Show again what was there before."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._write(_LEAVE)

    def show(self, lines: Sequence[Text]) -> None:
        """Bring these lines to the screen."""
        size = self.size
        written = [self._encoded(line, size[0]) for line in lines[: size[1]]]
        parts = []
        if size != self._size:
            self._size, self._shown = size, []
            parts.append("\x1b[2J")
        before = self._shown + [""] * (len(written) - len(self._shown))
        for number, (new, old) in enumerate(zip(written, before, strict=False), 1):
            if new != old:
                parts.append(f"\x1b[{number};1H{new}")
        if len(before) > len(written):
            parts.append(f"\x1b[{len(written) + 1};1H\x1b[J")
        self._shown = written
        if parts:
            self._write("".join(parts))

    def _encoded(self, line: Text, width: int) -> str:
        encoder = Console(
            file=io.StringIO(),
            force_terminal=True,
            color_system=self._console.color_system,  # type: ignore[arg-type]
            no_color=self._console.no_color,
            width=width,
            highlight=False,
            emoji=False,
        )
        line = line.copy()
        line.rstrip()
        line.truncate(width)
        with encoder.capture() as captured:
            encoder.print(line, end="", soft_wrap=True)
        is_full = line.cell_len >= width  # then there is nothing to clear, and no cell to clear it from
        return captured.get() + ("" if is_full else "\x1b[K")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Wakes:
    """Waits for a key, for a call of `wake` from any thread, or for a time to pass: whatever is first."""

    def __init__(self, keys: TextIO | None) -> None:
        """Read keys from that terminal, if there is one."""
        self._keys = keys
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        os.set_blocking(self._reader, False)

    def wake(self, *_: Any) -> None:
        """End the waiting. What is waited for may be given to it; it is not looked at."""
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody waits any more
            os.write(self._writer, b".")

    def wait(self, limit_s: float) -> str:
        """Wait, at most so long; returns the keys that were pressed."""
        sources = [self._reader, *([self._keys.fileno()] if self._keys else [])]
        ready, _, _ = select.select(sources, [], [], max(0.0, limit_s))
        if self._reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._reader, 4096)
        if self._keys is None or self._keys.fileno() not in ready:
            return ""
        pressed = os.read(self._keys.fileno(), 1024)
        if not pressed:  # the terminal is gone
            self._keys = None
        return pressed.decode(errors="replace")

    def close(self) -> None:
        """End."""
        os.close(self._reader)
        os.close(self._writer)


@contextlib.contextmanager
def single_keys(terminal: TextIO | None) -> Iterator[None]:
    """Let keys arrive as they are pressed, and unseen; afterwards the terminal is as before."""
    if terminal is None:
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextlib.contextmanager
def signals(screen: Screen, wakes: Wakes, terminal: TextIO | None) -> Iterator[None]:
    """React to a resize at once, leave the screen before SIGTERM ends the process, and while it is stopped (Ctrl-Z)."""

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    def stop(_number: int, _frame: Any) -> None:
        screen.leave()
        with _as_it_was(terminal):
            os.kill(os.getpid(), signal.SIGSTOP)  # goes on here with SIGCONT
            time.sleep(0.01)
        screen.enter()
        wakes.wake()

    reactions = {signal.SIGWINCH: wakes.wake, signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGTSTP: stop}
    before = {number: signal.signal(number, reaction) for number, reaction in reactions.items()}
    try:
        yield
    finally:
        for number, reaction in before.items():
            signal.signal(number, reaction)


@contextlib.contextmanager
def _as_it_was(terminal: TextIO | None) -> Iterator[None]:
    """Let keys go to the shell meanwhile, which shows them."""
    if terminal is None:
        yield
        return
    import termios

    keys = termios.tcgetattr(terminal)
    shell = termios.tcgetattr(terminal)
    shell[3] |= termios.ECHO | termios.ICANON
    termios.tcsetattr(terminal, termios.TCSADRAIN, shell)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, keys)


def keyboard() -> TextIO | None:
    """The terminal that keys come from; None where standard input is none."""
    try:
        return sys.stdin if sys.stdin.isatty() else None
    except (AttributeError, ValueError):
        return None
