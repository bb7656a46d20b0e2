"""`paceline fleet`: which executors there are, and how to take one out, or all of them one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.table import Table
from rich.text import Text

from paceline_cli import terminal
from paceline_cli.errors import CommandError, ExitCode, command_error
from paceline_cli.flags import DEFAULT_SERVER, flag
from paceline_cli.sizes import format_size

if TYPE_CHECKING:
    from paceline.v1 import fleet_pb2 as pb

_ANSWER_S = 10.0  # for one call; it only reads or notes something
_LOOK_EVERY_S = 0.25
_REJOIN_S = 5.0  # executors call a scheduler that was restarted again within half a second; this is for slow ones
_LONGEST_FINISH_S = 86400
_WIDEST = 500  # columns of a table: a line that the terminal wraps loses nothing, a cell that is cut does

Scheduler = Annotated[
    str, flag("--server", "Address of the scheduler.", "-s", "--target", metavar="ADDRESS")
]  # `--server` as everywhere; `--target` for whoever thinks of the fleet and not of a server of answers

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def fleet() -> None:
    """Look at the executors, and take them out of service.

    [dim]$[/] paceline fleet list
    [dim]$[/] paceline fleet drain executor-0 --finish-within 30
    """


@app.command("list")
def list_executors(
    server: Scheduler = DEFAULT_SERVER,
    as_json: Annotated[bool, flag("--json", "Print the answer of the scheduler as JSON.", envvar=None)] = False,
) -> None:
    """Show the executors, who waits, and whether anything survives the scheduler.

    [dim]$[/] paceline fleet list
    [dim]$[/] paceline fleet list --server 10.0.0.5:50051 --json
    """
    with connected(server) as scheduler:
        seen = scheduler.look()
    console = terminal.stdout()
    if as_json:
        console.print(_json(seen), markup=False)
        return
    if seen.executors:
        console.width = _WIDEST
        console.print(_table(seen.executors))
    else:
        console.print("[yellow]no executor has joined[/]")
    console.print(_state_line(seen), style="dim", markup=False)


@app.command("drain")
def drain(
    executor: Annotated[str, typer.Argument(help="Its name, as `paceline fleet list` shows it.")] = "",
    all_of_them: Annotated[
        bool, flag("--all", "Every one after the other: the next when another process took the place.", envvar=None)
    ] = False,
    finish_within: Annotated[
        int,
        flag(
            "--finish-within",
            "How long requests may finish there before they move; 0: they move at once.",
            metavar="SECONDS",
            min=0,
            max=_LONGEST_FINISH_S,
        ),
    ] = 0,
    wait: Annotated[bool, flag("--wait/--no-wait", "Wait until it is gone.", envvar=None)] = True,
    timeout: Annotated[
        float,
        flag(
            "--timeout",
            "How long to wait beyond that, and with --all for the process that takes the place.",
            envvar="PACELINE_FLEET_TIMEOUT",
            metavar="SECONDS",
            min=1,
        ),
    ] = 120.0,
    server: Scheduler = DEFAULT_SERVER,
) -> None:
    """Take an executor out of service without losing a token: it gets nothing new, and ends when it has nothing left.

    What it still has moves to others, or waits for the next one. Ctrl-C ends the waiting, not the drain.

    With --all, something has to start each of them again, as `paceline serve` and orchestrators do.

    Where nothing does, that ends after --timeout with one executor gone and the others as they were.

    [dim]$[/] paceline fleet drain executor-0
    [dim]$[/] paceline fleet drain --all --finish-within 30   [dim]# a rolling restart[/]
    """
    _check_wish(executor, all_of_them, wait)
    with connected(server) as scheduler:
        if not wait:
            scheduler.drain(executor, finish_within)
            terminal.stdout().print(f"{executor} drains; `paceline fleet list` shows how far it is", markup=False)
            return
        with terminal.activity(terminal.stderr(), "Draining") as report:
            drainer = Drainer(scheduler, finish_within, timeout, lambda phase: report(phase, 0.0))
            left = drainer.take_out_all() if all_of_them else [drainer.take_out(executor)]
    for line in left:
        terminal.stdout().print(line, markup=False)


def _check_wish(executor: str, all_of_them: bool, wait: bool) -> None:
    """Refuse words of the command line that contradict each other."""
    if bool(executor) == all_of_them:
        message = "name one executor, or give --all"
    elif all_of_them and not wait:
        message = "--all waits for each executor before it takes the next; --no-wait would take all of them at once"
    else:
        return
    raise CommandError(message, "paceline fleet drain --help", exit_code=ExitCode.USAGE)


# --- asking the scheduler -------------------------------------------------------------------------------------------


class AsksScheduler(Protocol):
    """What an operator can ask of a scheduler. Both raise `CommandError`."""

    def look(self) -> pb.ListExecutorsResponse:
        """Who is there now."""
        ...

    def drain(self, executor_id: str, finish_within_s: int) -> None:
        """Take an executor out of service; returns at once."""
        ...


@contextmanager
def connected(address: str) -> Iterator[AsksScheduler]:
    """The scheduler at `address`."""
    import grpc

    # A scheduler that restarts while an executor drains is expected back any moment.
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield _Scheduler(address, channel)


class _Scheduler:
    def __init__(self, address: str, channel: Any) -> None:
        from paceline.v1.fleet_pb2_grpc import FleetServiceStub

        self._address = address
        self._stub = FleetServiceStub(channel)

    def look(self) -> pb.ListExecutorsResponse:
        from paceline.v1 import fleet_pb2 as pb

        return self._call(self._stub.ListExecutors, pb.ListExecutorsRequest())

    def drain(self, executor_id: str, finish_within_s: int) -> None:
        from paceline.v1 import fleet_pb2 as pb

        self._call(self._stub.Drain, pb.DrainRequest(executor_id=executor_id, finish_within_s=finish_within_s))

    def _call(self, method: Any, request: Any) -> Any:
        import grpc

        try:
            return method(request, timeout=_ANSWER_S)
        except grpc.RpcError as error:
            raise self._error_of(error) from error

    def _error_of(self, failure: Any) -> CommandError:
        """A failed call as the command says it. Whoever is not there now is `UNREACHABLE`."""
        import grpc

        from paceline.errors import error_of_call

        if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"{self._address} does not answer within {_ANSWER_S:g} s"
            return CommandError(message, "is it a scheduler, and the line to it open?", exit_code=ExitCode.UNREACHABLE)
        if failure.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
            message, _, remedy = failure.details().rpartition("; ")
            return CommandError(message or remedy, remedy if message else "", exit_code=ExitCode.REFUSED)
        return command_error(error_of_call(failure))


# --- draining -------------------------------------------------------------------------------------------------------


class Stage(Enum):
    """How far the drain of an executor is."""

    DRAINING = "draining"
    FORGOTTEN = "forgotten"  # it serves as before: the scheduler that was asked is no more
    UNKNOWN = "unknown"  # a scheduler that was started since does not know it, or not yet
    GONE = "gone"  # its process has left; another one may be in its place


class DrainWatch:
    """Tells from what is seen of the fleet how far the drain of one process is.

    A restarted scheduler has forgotten whom it was to drain. It also knows only the executors that have joined it or
    stood in its journal, so who is absent there may yet turn up.
    """

    def __init__(self, executor: pb.Executor, epoch: int) -> None:
        """Watch the process that `executor` is; the scheduler of `epoch` was asked to drain it."""
        self.asked_epoch = epoch
        self.request_count = executor.running_request_count  # that it still had when it was last seen
        self._executor_id, self._incarnation = executor.executor_id, executor.incarnation
        self._absent_since: float | None = None  # from a scheduler that was not asked

    def look(self, seen: pb.ListExecutorsResponse, now: float) -> Stage:
        """How far it is, by what is seen `now`."""
        from paceline.v1 import fleet_pb2 as pb

        executor = find(seen, self._executor_id)
        if executor is not None:
            self._absent_since = None
            if executor.incarnation != self._incarnation:
                return Stage.GONE
            self.request_count = executor.running_request_count
            is_draining = executor.state == pb.EXECUTOR_STATE_DRAINING
            return Stage.DRAINING if is_draining else Stage.FORGOTTEN
        if seen.epoch == self.asked_epoch:
            return Stage.GONE
        if self._absent_since is None:
            self._absent_since = now
        return Stage.GONE if now - self._absent_since >= _REJOIN_S else Stage.UNKNOWN


@dataclass(frozen=True, slots=True)
class Drainer:
    """Takes executors out of service and waits for what comes of it."""

    scheduler: AsksScheduler
    finish_within_s: int
    timeout_s: float
    report: Callable[[str], None]  # is told what is going on now
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def take_out(self, executor_id: str) -> str:
        """Drain an executor and wait until its process is gone; returns what to say then. Raises `CommandError`."""
        seen = self.scheduler.look()
        while (executor := find(seen, executor_id)) is None:  # the scheduler says, then, who is there
            self.scheduler.drain(executor_id, self.finish_within_s)
            seen = self.scheduler.look()
        self.scheduler.drain(executor_id, self.finish_within_s)
        self._await_end(executor, seen.epoch)
        return f"{executor_id} has left"

    def take_out_all(self) -> list[str]:
        """Drain every executor there is, each when the one before it has a successor that takes requests."""
        executors = self.scheduler.look().executors
        if not executors:
            raise CommandError("no executor has joined", "start one with `paceline executor`")
        names = {executor.executor_id for executor in executors}
        for replaced_count, executor in enumerate(executors):
            seen = self.scheduler.look()
            if _has(seen, executor):  # or it was restarted, or died, while others drained
                self.scheduler.drain(executor.executor_id, self.finish_within_s)
                self._await_end(executor, seen.epoch)
            names.add(self._await_successor(executor, names, f"{replaced_count} of {len(executors)}"))
        return [f"all {len(executors)} executors were drained, and others are in their places"]

    def _await_end(self, executor: pb.Executor, epoch: int) -> None:
        """Wait until the process of `executor` is gone, and ask again when a restarted scheduler has forgotten it."""
        name, limit_s = executor.executor_id, self.finish_within_s + self.timeout_s
        watch = DrainWatch(executor, epoch)
        for seen in self._looks(limit_s):
            stage = watch.look(seen, self.clock())
            if stage is Stage.GONE:
                return
            if stage is Stage.FORGOTTEN and self._ask_again(name):
                watch.asked_epoch = seen.epoch
            self.report(f"Draining {name}: {_count(watch.request_count, 'request')} left")
        raise CommandError(
            f"{name} still has {_count(watch.request_count, 'request')} after {limit_s:g} s",
            "it goes on draining: wait with the same command, or look at the log of its process",
        )

    def _ask_again(self, name: str) -> bool:
        """Drain an executor that was there a moment ago; whether it, and the scheduler, still were."""
        try:
            self.scheduler.drain(name, self.finish_within_s)
        except CommandError as error:
            if error.exit_code not in (ExitCode.REFUSED, ExitCode.UNREACHABLE):
                raise
            return False
        return True

    def _await_successor(self, executor: pb.Executor, names: set[str], progress: str) -> str:
        """Wait until a process takes requests in the place of one that has left; returns its name."""
        name = executor.executor_id
        for seen in self._looks(self.timeout_s):
            successor = next((other for other in seen.executors if _succeeds(other, executor, names)), None)
            if successor is not None:
                return successor.executor_id
            self.report(f"Waiting for a process in the place of {name}")
        raise CommandError(
            f"nothing has taken the place of {name} within {self.timeout_s:g} s after it left; "
            f"{progress} were replaced before it, the others run on as they were",
            "start it again, and then the rest with the same command; --timeout gives a slow start more time",
        )

    def _looks(self, limit_s: float) -> Iterator[pb.ListExecutorsResponse]:
        """What is seen of the fleet, again and again for so long. A scheduler that is away may come back meanwhile."""
        deadline = self.clock() + limit_s
        while True:
            is_last = self.clock() >= deadline
            try:
                yield self.scheduler.look()
            except CommandError as error:
                if is_last or error.exit_code is not ExitCode.UNREACHABLE:
                    raise
                self.report("Waiting for the scheduler")
            if is_last:
                return
            self.sleep(_LOOK_EVERY_S)


def find(seen: pb.ListExecutorsResponse, executor_id: str) -> pb.Executor | None:
    """The executor of that name."""
    return next((executor for executor in seen.executors if executor.executor_id == executor_id), None)


def _has(seen: pb.ListExecutorsResponse, executor: pb.Executor) -> bool:
    """Whether this very process is there."""
    other = find(seen, executor.executor_id)
    return other is not None and other.incarnation == executor.incarnation


def _succeeds(other: pb.Executor, executor: pb.Executor, names: set[str]) -> bool:
    """Whether `other` took the place of `executor`: under its name or, where names are generated, under a new one."""
    from paceline.v1 import fleet_pb2 as pb

    is_new = other.incarnation != executor.incarnation and other.executor_id == executor.executor_id
    return other.state == pb.EXECUTOR_STATE_READY and (is_new or other.executor_id not in names)


# --- showing --------------------------------------------------------------------------------------------------------


def _table(executors: Any) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("executor", "state", "requests", "free blocks", "reusable", "step", "step time", "idle", "mode"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("executor", "state", "mode") else "right")
    for executor in executors:
        table.add_row(*_cells(executor))
    return table


def _cells(executor: pb.Executor) -> tuple[Text | str, ...]:
    state, colour = _state_of(executor)
    is_attached = state != "connecting"  # else its blocks are no cache yet
    return (
        Text(executor.executor_id),
        Text(state, style=colour),
        f"{executor.running_request_count:,}",
        f"{executor.free_block_count:,} of {executor.capacity.block_count:,}" if is_attached else "–",
        f"{executor.reusable_block_count:,}" if is_attached else "–",
        f"{executor.step:,}",
        f"{executor.step_us / 1000:.3g} ms" if executor.step_us else "–",
        f"{executor.idle_share:.1%}",
        Text(executor.model.mode),
    )


def _state_of(executor: pb.Executor) -> tuple[str, str]:
    """The state in a word, and its colour."""
    from paceline.v1 import fleet_pb2 as pb

    word = pb.ExecutorState.Name(executor.state).removeprefix("EXECUTOR_STATE_").lower()
    return word, {"ready": "green", "draining": "yellow"}.get(word, "default")


def _state_line(seen: pb.ListExecutorsResponse) -> str:
    """What there is to say about the scheduler itself."""
    waiting = f"{_count(seen.waiting_request_count, 'request')} waiting"
    scaled = f" · scaled by {seen.scaling_holder_id}" if seen.scaling_holder_id else ""
    return f"{waiting} · epoch {seen.epoch} · journal {_durability(seen)}{scaled}"


def _durability(seen: pb.ListExecutorsResponse) -> str:
    """Whether what users were told survives the scheduler, in words."""
    from paceline.v1 import fleet_pb2 as pb

    if seen.durability == pb.DURABILITY_ON:
        return f"on, {format_size(seen.journal_bytes)}"
    if seen.durability == pb.DURABILITY_OFF:
        return "off: what is accepted dies with the scheduler"
    if seen.durability == pb.DURABILITY_LOST:
        return "LOST: what is accepted now dies with the scheduler, its disk is full or gone"
    return "unknown: the scheduler is older than this command"


def _json(seen: pb.ListExecutorsResponse) -> str:
    """The message by the rules of protobuf: numbers of 64 bits are strings, because JSON's own cannot hold them."""
    from google.protobuf.json_format import MessageToJson

    return MessageToJson(seen, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
