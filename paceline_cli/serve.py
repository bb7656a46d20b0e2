"""`paceline serve`: scheduler and executors on one machine, started, watched and ended together."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape

from executor_svc.config import ExecutorConfig
from paceline_cli import terminal
from paceline_cli.addresses import dial_address, listen_address, reserve_port, socket_folder
from paceline_cli.children import (
    Machine,
    check_settings,
    executor_children,
    paceline_command,
    scheduler_child,
    scheduler_socket,
)
from paceline_cli.config_flags import Settings, takes_settings
from paceline_cli.demo import run_demo
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import LogLevel, flag, model_argument
from paceline_cli.readiness import ReadinessProbe, ServedModel, print_ready
from paceline_cli.supervisor import Child, ChildCommand, Supervisor
from scheduler_svc.config import SchedulerConfig

_WATCH_S = 0.1
_DRAIN_MARGIN_S = 5.0  # the children keep to the drain time-out themselves; this is for leaving
_GIVE_UP_DRAIN_S = 2.0

_WIRED_HERE = ("listen", "scheduler", "advertise", "executor_id")


@takes_settings(SchedulerConfig, ExecutorConfig, without=_WIRED_HERE)
def serve(
    model: Annotated[
        str, model_argument("Folder, GGUF file or hub id of a model; 'fake' needs none.", metavar="MODEL")
    ] = "smollm2",
    # Not PACELINE_PORT: Kubernetes sets that in every pod beside a Service named `paceline`.
    host: Annotated[
        str,
        flag("--host", "Address to listen on; 0.0.0.0: everybody.", envvar="PACELINE_SERVE_HOST", metavar="HOST"),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        flag("--port", "Port; 0 picks a free one.", envvar="PACELINE_SERVE_PORT", metavar="PORT", min=0, max=65535),
    ] = 50051,
    executors: Annotated[
        int, flag("--executors", "Executors to run; they share the machine.", metavar="N", min=1, max=64)
    ] = 1,
    demo: Annotated[bool, flag("--demo", "Stream a sample answer when ready.")] = False,
    log_level: LogLevel = "warning",
    *,
    settings: Settings,
) -> None:
    """Serve a model on this machine until Ctrl-C: one scheduler and its executors, restarted when they die.

    [dim]$[/] paceline serve                              [dim]# SmolLM2-135M, port 50051[/]
    [dim]$[/] paceline serve ./my-model --executors 2 --port 8001
    [dim]$[/] paceline serve fake --fake-step-us 5000     [dim]# all but the model[/]
    """
    _refuse_wrong(model, settings)
    port = reserve_port(host, port)
    with StopSignals() as signals, socket_folder() as sockets:
        screen = ServeScreen(terminal.stderr(), executors)
        with terminal.activity(screen.console, f"Preparing {model}") as screen.report_phase:
            folder = model if model == "fake" else _prepared(model, screen, signals)
            screen.report_phase("Starting", 0.0)
            words = ("--log-level", log_level)
            children = [
                scheduler_child(folder, sockets, listen_address(host, port), settings, words),
                *executor_children(folder, sockets, executors, settings, Machine.here(), words),
            ]
            supervisor = Supervisor(children, screen)
            try:
                supervisor.start()
                with ReadinessProbe(scheduler_socket(sockets)) as probe:
                    served = _wait_until_ready(supervisor, probe, signals)
            except BaseException:
                supervisor.drain(_GIVE_UP_DRAIN_S)
                raise
        screen.report_phase = None
        supervisor.ready = True
        _serve_until_stopped(supervisor, served, dial_address(host, port), demo, screen, signals)
        _drain(supervisor, settings["drain_timeout_s"], screen, signals)


def _refuse_wrong(model: str, settings: Settings) -> None:
    try:
        check_settings(model, settings)
    except ValueError as error:
        raise CommandError(str(error), exit_code=ExitCode.USAGE) from error


class StopSignals:
    """Counts Ctrl-C and SIGTERM instead of dying of them, while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self._came = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait(self, timeout_s: float) -> bool:
        """Sleep for `timeout_s`, or until a signal has come; whether one has."""
        return self._came.wait(timeout_s)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self._came.set()


class ServeScreen:
    """What `paceline serve` shows of its children: their lines behind their names, and how far the start is."""

    _COLOURS = ("green", "yellow", "blue", "magenta", "cyan")

    def __init__(self, console: Console, executor_count: int) -> None:
        self.console = console
        self.report_phase: terminal.ReportsPhase | None = None  # set while there is a start to watch
        self.draining = False
        self.folder = ""  # once the model is prepared
        self.failure: CommandError | None = None  # why it could not be
        self.executor_count = executor_count
        self._colour_of: dict[str, str] = {}

    def said(self, name: str, line: str) -> None:
        """Print a child's line behind its name.

        What `prepare` says is kept for its failure; that executors miss their scheduler at the end is no news.
        """
        if name != "prepare" and (name == "scheduler" or not self.draining):
            colour = self._colour_of.setdefault(name, self._COLOURS[len(self._colour_of) % len(self._COLOURS)])
            self.console.print(f"[{colour}]{name:>10}[/] [dim]│[/] {readable(line)}")

    def reported(self, name: str, report: Mapping[str, Any]) -> None:
        """Take a child's report."""
        if "phase" in report and self.report_phase:
            phase = str(report["phase"])
            label = f"{name}: {phase}" if self.executor_count > 1 and name != "prepare" else phase
            self.report_phase(label[:1].upper() + label[1:], float(report.get("fraction", 0.0)))
        elif "folder" in report:
            self.folder = str(report["folder"])
        elif "error" in report:
            self.failure = CommandError(str(report["error"]), str(report.get("what_to_do", "")))

    def restarting(self, name: str, how_it_ended: str, delay_s: float) -> None:
        """Say that a child died."""
        self.console.print(f"[yellow]{name} {escape(how_it_ended)}; starting it again in {delay_s:.3g} s[/]")


def readable(line: str) -> str:
    """A child's line as markup: its logs are JSON, because it does not write to a terminal."""
    try:
        entry = json.loads(line)
        event, level = entry.pop("event"), entry.pop("level", "info")
    except (ValueError, KeyError, AttributeError, TypeError):
        return escape(line)
    facts = " ".join(f"{key}={value}" for key, value in entry.items() if key not in ("timestamp", "service"))
    style = {"warning": "yellow", "error": "red", "critical": "red"}.get(level, "default")
    return f"[{style}]{escape(str(event))}[/] [dim]{escape(facts)}[/]"


def _prepared(model: str, screen: ServeScreen, signals: StopSignals) -> str:
    """The serving folder of `model`; made in a process of its own, which takes torch's memory with it."""
    child = Child(ChildCommand("prepare", paceline_command("prepare", model)), screen)
    child.start()
    while (code := child.reap()) is None:
        if signals.wait(_WATCH_S / 2):
            child.signal(signal.SIGTERM)
            raise KeyboardInterrupt
    if code == ExitCode.OK and screen.folder:
        return screen.folder
    said = "\n".join(f"  {line}" for line in child.last_lines)
    raise screen.failure or CommandError(f"cannot prepare {model!r}:\n{said}")


def _wait_until_ready(supervisor: Supervisor, probe: ReadinessProbe, signals: StopSignals) -> ServedModel:
    """Keep the children alive until an executor serves; raises `KeyboardInterrupt` when the user stops first."""
    while (served := probe.look()) is None:
        supervisor.watch()
        if signals.wait(_WATCH_S):
            raise KeyboardInterrupt
    return served


def _serve_until_stopped(
    supervisor: Supervisor, served: ServedModel, address: str, demo: bool, screen: ServeScreen, signals: StopSignals
) -> None:
    """Say that everything is ready and keep it so until a signal comes."""
    console = terminal.stdout()
    print_ready(console, served, address, screen.executor_count)
    if demo:
        # Beside the watch, which must go on: an executor may die in the middle of the answer.
        threading.Thread(target=run_demo, args=(console, address, served), name="demo", daemon=True).start()
    try:
        while not signals.wait(_WATCH_S):
            supervisor.watch()
    except CommandError:
        screen.console.print("[yellow]stopping the others[/]")
        supervisor.drain(_DRAIN_MARGIN_S)
        raise


def _drain(supervisor: Supervisor, timeout_s: float, screen: ServeScreen, signals: StopSignals) -> None:
    """Let running requests finish and end the children; a second signal ends them at once."""
    first_count = signals.count
    screen.draining = True
    if screen.console.is_terminal:
        screen.console.print()  # the terminal has just printed ^C
    screen.console.print("Finishing what runs [dim](Ctrl-C again stops at once)[/]")
    clean = supervisor.drain(timeout_s + _DRAIN_MARGIN_S, hurry=lambda: signals.count > first_count)
    if clean:
        screen.console.print("Stopped")
    elif signals.count > first_count:
        raise KeyboardInterrupt
    else:
        raise CommandError(f"not everything had finished after {timeout_s:g} s", "give it more with --drain-timeout")
