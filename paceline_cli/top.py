"""`paceline top`: the whole service at a glance, live in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline_cli import terminal
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import DEFAULT_SERVER, Server, flag

if TYPE_CHECKING:
    from paceline.v1 import observation_pb2 as pb
    from paceline_cli.sight.scheduler import ObservedScheduler
    from paceline_cli.sight.screen import Screen, Wakes
    from paceline_cli.sight.top_view import Look

_WIDE = 120  # columns of a picture that goes into a file
_PAINT_S = 0.4  # least time between two pictures, unless a key is pressed
_ESCAPE = "\x1b"


def top(
    server: Server = DEFAULT_SERVER,
    interval: Annotated[
        float,
        flag(
            "--interval",
            "Time between two looks.",
            "-n",
            envvar="PACELINE_TOP_INTERVAL",
            metavar="SECONDS",
            min=0.5,
            max=3600,
        ),
    ] = 1.0,
    requests: Annotated[
        int, flag("--requests", "Most requests to ask for.", envvar=None, metavar="N", min=1, max=1000)
    ] = 50,
    once: Annotated[bool, flag("--once", "Print one picture as plain text, and end.", envvar=None)] = False,
    as_json: Annotated[
        bool, flag("--json", "Print the answer of the scheduler as JSON, and end.", envvar=None)
    ] = False,
) -> None:
    """Watch the service: is all well, what do the executors do, where does the time of requests go?

    [dim]$[/] paceline top
    [dim]$[/] paceline top --server 10.0.0.5:50051 --interval 2
    [dim]$[/] paceline top --once > seen.txt

    Keys: q or Ctrl-C ends it, p or space pauses it, s sorts the requests otherwise.

    When the scheduler does not answer, the last picture stays, in grey, until it does.
    """  # fmt: skip
    from paceline_cli.sight.scheduler import observed

    console = terminal.stdout()
    with observed(server) as scheduler:
        if as_json:
            _print_json(scheduler.overview(requests))
        elif once or not console.is_terminal or console.is_dumb_terminal:
            _print_once(scheduler.overview(requests), _WIDE if not console.is_terminal else console.width)
        else:
            _watch(scheduler, interval, requests)


def _print_json(overview: pb.GetOverviewResponse) -> None:
    """The message by the rules of protobuf, as `paceline fleet list --json` does."""
    from google.protobuf.json_format import MessageToJson

    typer.echo(MessageToJson(overview, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))


def _print_once(overview: pb.GetOverviewResponse, width: int) -> None:
    from paceline_cli.sight.top_view import Look, picture

    for line in picture(overview, Look(width=width, height=None, mono=True)):
        typer.echo(line.plain.rstrip())


# --- live -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class View:
    """What is shown, and what keys and answers do to it."""

    address: str
    has_keys: bool = False
    mono: bool = False
    clock: Callable[[], float] = time.time
    overview: pb.GetOverviewResponse | None = None
    is_paused: bool = False
    sort: int = 0
    answered_at: float | None = None  # when it answered last
    silent_since: float | None = None  # since when it does not answer; None: it does
    reason: str = ""
    ended: bool = field(default=False)

    def answered(self, overview: pb.GetOverviewResponse) -> None:
        """The scheduler has said how it is."""
        self.overview, self.answered_at, self.silent_since = overview, self.clock(), None

    def failed(self, error: CommandError) -> None:
        """It has not. What waiting does not help with is raised."""
        if error.exit_code is not ExitCode.UNREACHABLE:
            raise error
        if self.silent_since is None:
            self.silent_since = self.clock() if self.answered_at is None else self.answered_at
        self.reason = error.message

    def press(self, keys: str) -> None:
        """Somebody has pressed these keys. Arrows and the like, which begin with Escape, mean nothing here."""
        for key in "" if keys.startswith(_ESCAPE) else keys.lower():
            if key in "q\x03":
                self.ended = True
            elif key in "p ":
                self.is_paused = not self.is_paused
            elif key == "s":
                self.sort += 1

    def look(self, size: tuple[int, int]) -> Look:
        """How to show it on a terminal of that size."""
        from paceline_cli.sight.request_rows import SORTS
        from paceline_cli.sight.top_view import Look

        return Look(
            width=size[0],
            height=size[1],
            mono=self.mono or self.silent_since is not None,
            sort=SORTS[self.sort % len(SORTS)],
            is_paused=self.is_paused,
            has_keys=self.has_keys,
            trouble=self._trouble(),
        )

    def _trouble(self) -> str:
        from paceline_cli.sight.words import age, clock, plain

        if self.silent_since is None:
            return ""
        since = f"since {clock(1000 * self.silent_since)}, {age(self.clock() - self.silent_since)} ago"
        what = "no answer from" if self.overview is not None else "nobody answers at"
        return plain(f"{what} {self.address} {since}: {self.reason.removeprefix('no server answers: ')}")

    def lines(self, size: tuple[int, int]) -> list[Any]:
        """The picture."""
        from paceline_cli.sight.top_view import nothing_yet, picture

        look = self.look(size)
        return nothing_yet(look, self.address) if self.overview is None else picture(self.overview, look)


def _watch(scheduler: ObservedScheduler, interval_s: float, request_count: int) -> None:
    """Show the service until somebody has seen enough, which is no error."""
    from paceline_cli.sight.screen import Screen, Wakes, keyboard, signals, single_keys

    console = terminal.stdout()
    keys = keyboard()
    screen, wakes = Screen(console, sys.stdout), Wakes(keys)
    view = View(scheduler.address, keys is not None, mono=console.no_color or console.color_system is None)
    with ExitStack() as stack:
        stack.callback(wakes.close)
        stack.enter_context(single_keys(keys))
        stack.enter_context(signals(screen, wakes, keys))
        stack.callback(screen.leave)
        screen.enter()
        try:
            _Loop(scheduler, view, screen, wakes, interval_s, request_count).run()
        except KeyboardInterrupt:
            pass


@dataclass(slots=True)
class _Loop:
    """Asks, paints and listens, one after the other and never blocking: keys work while a call is on its way."""

    scheduler: ObservedScheduler
    view: View
    screen: Screen
    wakes: Wakes
    interval_s: float
    request_count: int
    _call: Any = None
    _ask_at: float = 0.0
    _painted_at: float = 0.0

    def run(self) -> None:
        """Until the view has ended."""
        is_new = True
        while not self.view.ended:
            now = time.monotonic()
            self._ask(now)
            if is_new or (self.view.silent_since is not None and now - self._painted_at >= 1):
                self.screen.show(self.view.lines(self.screen.size))
                self._painted_at = now
            keys = self.wakes.wait(self._patience_s(time.monotonic()))
            self.view.press(keys)
            is_new = self._take() or bool(keys) or self.screen.is_outdated

    def _ask(self, now: float) -> None:
        """Call the scheduler if it is time and the last call has ended."""
        if self._call is None and now >= self._ask_at and not self.view.is_paused:
            self._call = self.scheduler.start_overview(self.request_count)
            self._call.add_done_callback(self.wakes.wake)
            self._ask_at = now + max(_PAINT_S, self.interval_s)

    def _take(self) -> bool:
        """Take the answer to the call, if it has come; whether it has."""
        if self._call is None or not self._call.done():
            return False
        call, self._call = self._call, None
        try:
            self.view.answered(self.scheduler.result_of(call))
        except CommandError as error:
            self.view.failed(error)
        return True

    def _patience_s(self, now: float) -> float:
        """Seconds until there is something to do without being woken."""
        if self._call is not None or self.view.is_paused:
            return 1.0
        return min(1.0, self._ask_at - now)
