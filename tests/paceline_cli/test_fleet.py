"""`paceline fleet` against a scripted scheduler, and against a whole system with executors that really leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from typer.testing import CliRunner

from executor_svc.fake import FakeRunner
from paceline.v1 import fleet_pb2 as pb
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.fleet import Drainer, DrainWatch, Stage, _cells
from paceline_cli.main import app
from tests.system import FAST, System, request, run_executor, started, until

READY, DRAINING = pb.EXECUTOR_STATE_READY, pb.EXECUTOR_STATE_DRAINING
CONNECTING = pb.EXECUTOR_STATE_CONNECTING
SLOW = replace(FAST, fake_step_us=10_000)


def executor(name: str = "e0", incarnation: int = 1, state: Any = READY, running: int = 0) -> pb.Executor:
    return pb.Executor(executor_id=name, incarnation=incarnation, state=state, running_request_count=running)


def seen(*executors: pb.Executor, epoch: int = 1, **fields: Any) -> pb.ListExecutorsResponse:
    return pb.ListExecutorsResponse(executors=executors, epoch=epoch, **fields)


# --- how far a drain is ---------------------------------------------------------------------------------------------


def watch() -> DrainWatch:
    return DrainWatch(executor(running=3), epoch=1)


def test_an_executor_drains_until_it_is_no_longer_listed():
    """Then its process was told to end."""
    watched = watch()

    assert watched.look(seen(executor(state=DRAINING, running=2)), now=0) is Stage.DRAINING
    assert watched.request_count == 2
    assert watched.look(seen(executor("e1")), now=1) is Stage.GONE


def test_another_process_of_that_name_means_that_the_first_is_gone():
    """A supervisor starts it again before anybody has seen the gap."""
    assert watch().look(seen(executor(incarnation=2)), now=0) is Stage.GONE
    assert watch().look(seen(executor(incarnation=2), epoch=9), now=0) is Stage.GONE


@pytest.mark.parametrize("state", [READY, CONNECTING])
def test_who_takes_requests_again_was_forgotten(state):
    """A restarted scheduler knows the executor from its journal, and nothing of the drain."""
    assert watch().look(seen(executor(state=state), epoch=2), now=0) is Stage.FORGOTTEN


def test_a_new_scheduler_that_does_not_know_it_yet_proves_nothing():
    """Without a journal it learns of executors only when they call; taking that for the end would leave it serving."""
    watched = watch()

    assert watched.look(seen(epoch=2), now=10) is Stage.UNKNOWN
    assert watched.look(seen(executor(), epoch=2), now=11) is Stage.FORGOTTEN
    assert watched.look(seen(epoch=2), now=12) is Stage.UNKNOWN
    assert watched.look(seen(epoch=2), now=16.9) is Stage.UNKNOWN
    assert watched.look(seen(epoch=2), now=17) is Stage.GONE


# --- what is done about it ------------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """A scheduler that shows one fleet after the other, the last one for ever. An error in the script is raised."""

    script: list[Any]
    asked: list[tuple[str, int]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    now: float = 0.0

    def look(self) -> pb.ListExecutorsResponse:
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, CommandError):
            raise step
        return step

    def drain(self, executor_id: str, finish_within_s: int) -> None:
        self.asked.append((executor_id, finish_within_s))

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def drainer(self, finish_within_s: int = 0, timeout_s: float = 120) -> Drainer:
        return Drainer(self, finish_within_s, timeout_s, self.said.append, clock=lambda: self.now, sleep=self.sleep)


AWAY = CommandError("no server answers", exit_code=ExitCode.UNREACHABLE)


def test_a_drain_is_asked_for_again_after_a_restart_of_the_scheduler():
    """Otherwise it would be waited for until the time-out, while the executor takes new requests."""
    scheduler = Scripted(
        [
            seen(executor(running=2)),
            seen(executor(state=DRAINING, running=2)),
            AWAY,
            seen(executor(state=CONNECTING), epoch=2),
            seen(executor(state=DRAINING, running=1), epoch=2),
            seen(epoch=2),
        ]
    )
    scheduler.drainer(finish_within_s=30).take_out("e0")

    assert scheduler.asked == [("e0", 30), ("e0", 30)]
    assert "Waiting for the scheduler" in scheduler.said
    assert scheduler.said[0] == "Draining e0: 2 requests left"
    assert scheduler.said[-1] == "Draining e0: 1 request left"


def test_a_drain_that_does_not_end_is_an_error_that_says_what_is_left():
    """A script must not wait for ever; the time for finishing comes on top of the time-out."""
    scheduler = Scripted([seen(executor(state=DRAINING, running=2))])

    with pytest.raises(CommandError, match="e0 still has 2 requests after 150 s"):
        scheduler.drainer(finish_within_s=30).take_out("e0")
    assert scheduler.now == pytest.approx(150, abs=1)


def test_a_scheduler_that_stays_away_ends_the_waiting():
    """With the exit code for that."""
    scheduler = Scripted([seen(executor()), AWAY])

    with pytest.raises(CommandError) as raised:
        scheduler.drainer(timeout_s=10).take_out("e0")
    assert raised.value.exit_code == ExitCode.UNREACHABLE


def test_all_are_drained_one_at_a_time():
    """The fleet never lacks more than one: each successor has to take requests before the next one leaves."""
    e1 = executor("e1", 11)
    scheduler = Scripted(
        [
            seen(executor(), e1),
            seen(executor(), e1),
            seen(executor(state=DRAINING), e1),
            seen(e1),
            seen(e1),
            seen(executor(incarnation=2, state=CONNECTING), e1),
            seen(executor(incarnation=2), e1),
            seen(executor(incarnation=2), e1),
            seen(executor(incarnation=2)),
            seen(executor(incarnation=2), executor("e1", 12)),
        ]
    )
    asked_at: list[int] = []
    drain = scheduler.drain
    scheduler.drain = lambda *words: (asked_at.append(len(scheduler.script)), drain(*words))  # type: ignore[method-assign]
    scheduler.drainer().take_out_all()

    assert scheduler.asked == [("e0", 0), ("e1", 0)]
    assert asked_at == [8, 2]  # e1 only when the new e0 was ready


def test_a_successor_may_have_another_name():
    """An executor without --executor-id is called after its process."""
    scheduler = Scripted(
        [seen(executor("host-1")), seen(executor("host-1")), seen(), seen(), seen(executor("host-2", incarnation=5))]
    )

    assert "all 1 executors" in scheduler.drainer().take_out_all()[0]


def test_the_restart_of_one_is_not_taken_for_the_successor_of_another():
    """Two would be missing at once."""
    scheduler = Scripted(
        [
            seen(executor(), executor("e1", 11)),
            seen(executor(), executor("e1", 11)),
            seen(executor("e1", 12)),
            seen(executor("e1", 12)),
        ]
    )

    with pytest.raises(CommandError, match="nothing has taken the place of e0"):
        scheduler.drainer().take_out_all()


def test_without_anybody_who_starts_it_again_the_others_stay():
    """A rolling restart must not become a shutdown."""
    scheduler = Scripted([seen(executor(), executor("e1"))] * 2 + [seen(executor("e1"))])

    with pytest.raises(CommandError, match=r"place of e0 within 120 s.* 0 of 2 were replaced") as raised:
        scheduler.drainer().take_out_all()
    assert scheduler.asked == [("e0", 0)]
    assert "--timeout" in raised.value.what_to_do


def test_who_was_restarted_meanwhile_is_not_drained_again():
    """Its process is new already, and every drain costs somebody a pause."""
    e1 = executor("e1", 12)
    scheduler = Scripted(
        [
            seen(executor(), executor("e1", 11)),
            seen(executor(), executor("e1", 11)),
            seen(executor(incarnation=2), e1),
        ]
    )
    scheduler.drainer().take_out_all()

    assert scheduler.asked == [("e0", 0)]


# --- as a command, with everything real -----------------------------------------------------------------------------


async def paceline(*words: str) -> Any:
    """Run the command beside the servers of this event loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, list(words), prog_name="paceline")


async def fleet(system: System, *words: str) -> Any:
    return await paceline("fleet", *words, "--server", system.address)


async def test_the_fleet_is_shown_as_a_table():
    """What an operator looks at first."""
    async with started(2) as system:
        async for _ in system.generate(request()):
            pass
        await system.idle()
        result = await fleet(system, "list")

    assert result.exit_code == ExitCode.OK, result.output
    first, second, state = (line for line in result.stdout.splitlines() if line and "executor " not in line)
    assert first.split()[:2] == ["e0", "ready"]
    assert "64 of 64" in second
    assert second.split()[-1] == "fake"  # how its steps run: that a GPU was not found shows here first
    assert "0 requests waiting" in state
    assert "journal off: what is accepted dies with the scheduler" in state


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"durability": pb.DURABILITY_ON, "journal_bytes": 1_782_000}, "journal on, 1.7 MiB"),
        ({"durability": pb.DURABILITY_LOST}, "journal LOST"),
        ({}, "journal unknown"),
    ],
)
def test_the_state_of_the_journal_is_said_in_words(monkeypatch, fields, words):
    """Whether a restart of the scheduler is safe right now."""
    show(monkeypatch, seen(waiting_request_count=1, epoch=5, **fields))
    result = CliRunner().invoke(app, ["fleet", "list"])

    assert words in result.stdout
    assert "1 request waiting · epoch 5" in result.stdout
    assert "no executor has joined" in result.stdout


def test_a_long_name_is_shown_whole(monkeypatch):
    """It is what `drain` wants, and a pipe has no width."""
    name = "executor-" + "x" * 110
    show(monkeypatch, seen(executor(name)))

    assert name in CliRunner().invoke(app, ["fleet", "list"]).stdout


def show(monkeypatch, answer: pb.ListExecutorsResponse) -> None:
    """Let a scripted scheduler answer."""
    scheduler = contextlib.nullcontext(Scripted([answer]))
    monkeypatch.setattr("paceline_cli.fleet.connected", lambda _address: scheduler)


def test_who_connects_has_no_blocks_yet():
    """`4,096 of 4,096` free would be taken for room."""
    one = pb.Executor(executor_id="e0", free_block_count=4096, capacity=pb.ExecutorCapacity(block_count=4096))
    one.state = pb.EXECUTOR_STATE_CONNECTING
    connecting = _cells(one)
    one.state = pb.EXECUTOR_STATE_READY

    assert connecting[3:5] == ("–", "–")
    assert _cells(one)[3:5] == ("4,096 of 4,096", "0")


async def test_json_is_the_message_itself():
    """For scripts: the names and units that fleet.proto explains."""
    async with started(1) as system:
        result = await fleet(system, "list", "--json")

    answer = json.loads(result.stdout)
    assert answer["executors"][0]["executor_id"] == "e0"
    assert answer["executors"][0]["running_request_count"] == 0
    assert answer["durability"] == "DURABILITY_OFF"


async def test_a_drained_executor_ends_and_its_requests_go_on():
    """The point of it: nobody notices."""
    async with started(2, executor=SLOW) as system:
        texts = [asyncio.create_task(length_of(system, number)) for number in range(4)]
        await until(lambda: all(len(one.running) for one in system.scheduler.executors.values()))
        result = await fleet(system, "drain", "e0")
        lengths = await asyncio.gather(*texts)
        await left(system)

        assert result.exit_code == ExitCode.OK, result.output
        assert "e0 has left" in result.stdout
        assert list(system.scheduler.executors) == ["e1"]
    assert lengths == [40] * 4


async def left(system: System) -> None:
    """Wait until an executor has ended by itself; cancelling one that is about to would leave half of it."""
    await until(lambda: any(task.done() for task in system.tasks))


async def length_of(system: System, number: int) -> int:
    """Tokens that a user receives."""
    messages = [message async for message in system.generate(request(f"hello {number}", max_output_tokens=40))]
    return sum(len(message.token_ids) // 4 for message in messages)


async def test_no_wait_returns_while_it_drains():
    """A script may have other things to do."""
    async with started(1, executor=SLOW) as system:
        reading = asyncio.create_task(length_of(system, 0))
        await until(lambda: bool(system.scheduler.executors["e0"].running))
        result = await fleet(system, "drain", "e0", "--no-wait", "--finish-within", "60")
        shown = await fleet(system, "list")
        length = await reading
        await left(system)

    assert result.exit_code == ExitCode.OK, result.output
    assert "e0 drains" in result.stdout
    assert "draining" in shown.stdout
    assert length == 40


async def test_an_unknown_executor_is_refused_with_the_names_there_are():
    """The list saves a second command."""
    async with started(2) as system:
        result = await fleet(system, "drain", "e7")

    assert result.exit_code == ExitCode.REFUSED
    assert "no executor 'e7' has joined" in result.stderr
    assert "there are: e0, e1" in result.stderr


async def test_all_executors_are_replaced_under_traffic():
    """A new release on every machine, and no user who notices."""
    async with started(0) as system:
        keepers = [asyncio.create_task(keep_alive(system, f"e{number}")) for number in range(2)]
        system.tasks.update(keepers)
        await system.ready(2)
        before = incarnations(system)
        stop = asyncio.Event()
        users = [asyncio.create_task(keep_asking(system, number, stop.is_set)) for number in range(3)]
        result = await fleet(system, "drain", "--all")
        after = incarnations(system)
        stop.set()
        lengths = [length for user in users for length in await user]

    assert result.exit_code == ExitCode.OK, result.output
    assert "all 2 executors were drained" in result.stdout
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    assert len(lengths) >= 3
    assert set(lengths) == {40}


def incarnations(system: System) -> dict[str, int]:
    return {name: member.joined.incarnation for name, member in system.app.fleet.members.items()}


async def keep_alive(system: System, name: str) -> None:
    """A supervisor of one executor."""
    config = replace(SLOW, scheduler=system.address, executor_id=name)
    while True:
        await run_executor(config, FakeRunner(config))


async def keep_asking(system: System, number: int, stopped: Callable[[], bool]) -> list[int]:
    """A user who reads one answer after the other."""
    lengths = []
    while not stopped():
        lengths.append(await length_of(system, number))
    return lengths


@pytest.mark.parametrize("words", [(), ("e0", "--all"), ("--all", "--no-wait"), ("e0", "--finish-within", "90000")])
def test_wishes_that_contradict_each_other_are_wrong_usage(words):
    """One of them would be ignored, and a drain cannot be taken back."""
    result = CliRunner().invoke(app, ["fleet", "drain", *words], prog_name="paceline")

    assert result.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("words", [("list",), ("drain", "e0"), ("drain", "--all")])
async def test_no_scheduler_is_exit_code_3(words, tmp_path):
    """As everywhere."""
    result = await paceline("fleet", *words, "--target", f"unix:{tmp_path}/nobody.sock")

    assert result.exit_code == ExitCode.UNREACHABLE, result.output
    assert "no server answers" in result.stderr


@pytest.mark.parametrize("verb", ["list", "drain"])
def test_every_verb_of_the_fleet_explains_itself_with_an_example(verb):
    """Help is where people learn a command."""
    result = CliRunner().invoke(app, ["fleet", verb, "--help"], prog_name="paceline")

    assert f"$ paceline fleet {verb}" in result.output
