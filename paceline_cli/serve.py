"""`paceline serve`: scheduler and executors on one machine, started, watched and ended together."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape

from common.processes import ANY_PORT
from executor_svc.config import ExecutorConfig
from paceline_cli import terminal
from paceline_cli.addresses import dial_address, listen_address, reserve_port, socket_folder
from paceline_cli.children import (
    LEAVING_S,
    Machine,
    autoscaler_child,
    check_settings,
    executor_children,
    launcher_socket,
    paceline_command,
    scheduler_child,
    scheduler_socket,
)
from paceline_cli.config_flags import LOOKING, Settings, takes_settings
from paceline_cli.demo import run_demo
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import LogLevel, flag, model_argument
from paceline_cli.gpus import gpus_of_executors, unused_gpus_hint
from paceline_cli.readiness import ReadinessProbe, ServedModel, print_ready
from paceline_cli.scaling import MOST_EXECUTORS, ExecutorRange, executor_range
from paceline_cli.supervisor import Child, ChildCommand, Supervisor
from scheduler_svc.config import SchedulerConfig

_WATCH_S = 0.1
_GIVE_UP_DRAIN_S = 2.0

_WIRED_HERE = ("listen", "scheduler", "advertise", "executor_id", "http_host", "metrics_port")


def _executor_count(name: str, text: str, least: int = 1) -> Any:
    return flag(name, text, metavar="N", min=least, max=MOST_EXECUTORS)


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
        int | None, _executor_count("--executors", "Executors to run, 1 by default; each has a GPU, or they share.")
    ] = None,
    min_executors: Annotated[
        int | None, _executor_count("--min-executors", "Fewest executors; more come and go with the load.", least=0)
    ] = None,
    max_executors: Annotated[
        int | None, _executor_count("--max-executors", "Most executors; the machine is divided by it.")
    ] = None,
    scaling: Annotated[
        Path | None, flag("--scaling", "YAML file that says when executors come and go.", metavar="FILE")
    ] = None,
    http_host: Annotated[
        str | None,
        flag("--http-host", "Address that the status page is on; unset: --host.", metavar="HOST", **LOOKING),
    ] = None,
    demo: Annotated[bool, flag("--demo", "Stream a sample answer when ready.")] = False,
    log_level: LogLevel = "warning",
    *,
    settings: Settings,
) -> None:
    """Serve a model on this machine until Ctrl-C: one scheduler and its executors, restarted when they die.

    [dim]$[/] paceline serve                              [dim]# SmolLM2-135M, port 50051[/]
    [dim]$[/] paceline serve ./my-model --executors 2 --port 8001
    [dim]$[/] paceline serve --min-executors 0 --max-executors 4
    [dim]$[/] paceline serve fake --fake-step-us 5000     [dim]# all but the model[/]
    """
    settings |= _pages(http_host or host, settings["http_port"])
    wanted = executor_range(executors, min_executors, max_executors, scaling)
    machine = _divisible_machine(model, wanted, settings)
    public = (host, reserve_port(host, port))
    if public == (settings["http_host"], settings["http_port"]):
        raise CommandError(f"--port and --http-port are both {port}", "choose two", exit_code=ExitCode.USAGE)
    _run(model, wanted, public, machine, demo, ("--log-level", log_level), settings)


def _pages(host: str, port: int) -> Settings:
    """Where the scheduler has its page; whoever finds it is told there where the metrics of the others are.

    Its port is checked here, as the public one is: a child that dies of it would be started again.
    """
    if port:
        port = reserve_port(host, 0 if port == ANY_PORT else port, "--http-host", "--http-port")
    return {"http_host": host, "http_port": port, "metrics_port": ANY_PORT if port else 0}


def _run(
    model: str,
    wanted: ExecutorRange,
    public: tuple[str, int],
    machine: Machine,
    demo: bool,
    words: Sequence[str],
    settings: Settings,
) -> None:
    """Prepare, start, serve and drain. `public` is the host and port for users, `words` go to every child."""
    with StopSignals() as signals, socket_folder() as sockets, ExitStack() as until_the_end:
        screen = ServeScreen(terminal.stderr(), wanted.max_count)
        with terminal.activity(screen.console, f"Preparing {model}") as screen.report_phase:
            folder = model if model == "fake" else _prepared(model, screen, signals)
            screen.report_phase("Starting", 0.0)
            scheduler = scheduler_child(folder, sockets, listen_address(*public), settings, words)
            executors = executor_children(folder, sockets, wanted.max_count, settings, machine, words)
            if wanted.is_fixed:
                supervisor = Supervisor([scheduler, *executors], screen)
            else:
                from paceline_cli.launcher import launching

                autoscaler = autoscaler_child(wanted.scaling_file_in(sockets), sockets, settings["metrics_port"], words)
                supervisor = Supervisor([scheduler, autoscaler], screen)
                until_the_end.enter_context(launching(supervisor, executors, launcher_socket(sockets)))
            try:
                supervisor.start()
                with ReadinessProbe(scheduler_socket(sockets), wanted.min_count) as probe:
                    served = _wait_until_ready(supervisor, probe, signals)
            except BaseException:
                supervisor.drain(_GIVE_UP_DRAIN_S)
                raise
        screen.report_phase = None
        supervisor.ready = True
        gpus_each = settings["tensor_parallel"]
        if hint := unused_gpus_hint(len(machine.gpus), wanted.max_count, gpus_each, wanted.most_setting):
            screen.console.print(f"[yellow]{escape(hint)}[/]")
        page = f"http://{dial_address(settings['http_host'], settings['http_port'])}" if settings["http_port"] else ""
        _say_ready(served, wanted, dial_address(*public), page, demo)
        _watch_until_stopped(supervisor, screen, signals)
        _drain(supervisor, settings["drain_timeout_s"], screen, signals)


def _divisible_machine(model: str, wanted: ExecutorRange, settings: Settings) -> Machine:
    """The machine here, which has what is wanted. Raises `CommandError` before anything is downloaded."""
    try:
        check_settings(model, settings)
    except ValueError as error:
        raise CommandError(str(error), exit_code=ExitCode.USAGE) from error
    machine = Machine.here(model, settings["device"])
    if machine.gpus:
        gpus_of_executors(machine.gpus, wanted.max_count, settings["tensor_parallel"])
    return machine


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

    def gave_up(self, name: str, reason: str) -> None:
        """Say that an executor that the autoscaler wanted does not run."""
        self.console.print(f"[red]{escape(reason)}[/]")


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


def _say_ready(served: ServedModel, wanted: ExecutorRange, address: str, page: str, demo: bool) -> None:
    """Say that requests are taken, and show one if that was asked for."""
    console = terminal.stdout()
    print_ready(console, served, address, wanted, page)
    if demo:
        # Beside the watch, which must go on: an executor may die in the middle of the answer.
        threading.Thread(target=run_demo, args=(console, address, served), name="demo", daemon=True).start()


def _watch_until_stopped(supervisor: Supervisor, screen: ServeScreen, signals: StopSignals) -> None:
    """Keep everything alive until a signal comes."""
    try:
        while not signals.wait(_WATCH_S):
            supervisor.watch()
    except CommandError:
        screen.console.print("[yellow]stopping the others[/]")
        supervisor.drain(LEAVING_S)
        raise


def _drain(supervisor: Supervisor, timeout_s: float, screen: ServeScreen, signals: StopSignals) -> None:
    """Let running requests finish and end the children; a second signal ends them at once."""
    first_count = signals.count
    screen.draining = True
    if screen.console.is_terminal:
        screen.console.print()  # the terminal has just printed ^C
    screen.console.print("Finishing what runs [dim](Ctrl-C again stops at once)[/]")
    clean = supervisor.drain(timeout_s + LEAVING_S, hurry=lambda: signals.count > first_count)
    if clean:
        screen.console.print("Stopped")
    elif signals.count > first_count:
        raise KeyboardInterrupt
    else:
        raise CommandError(f"not everything had finished after {timeout_s:g} s", "give it more with --drain-timeout")
