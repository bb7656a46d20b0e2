"""`paceline top`: what is drawn of an overview, and the command on a terminal beside a real scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
from dataclasses import replace
from typing import Any

import pytest
from rich.text import Text
from typer.testing import CliRunner

from paceline.v1 import fleet_pb2 as fleet
from paceline.v1 import observation_pb2 as pb
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.main import app
from paceline_cli.sight.drawing import Ink, block_map, chart, stacked_bar
from paceline_cli.sight.request_rows import chosen
from paceline_cli.sight.top_view import Look, nothing_yet, picture
from paceline_cli.sight.words import amount, duration, percent, plain, shorten
from paceline_cli.top import View
from tests.browser.sample import DECODE, ENDED, QUEUE, sample_overview
from tests.paceline_cli.terminals import Terminal
from tests.system import FAST, request, started

SLOW = replace(FAST, fake_step_us=20_000)
EVIL = "[red]x[/]\x1b[2J\x07\u202e\n:smile:"


def text_of(lines: list[Text]) -> str:
    return "\n".join(line.plain.rstrip() for line in lines)


def shown(overview: pb.GetOverviewResponse, **look: Any) -> str:
    return text_of(picture(overview, Look(**{"width": 120, "height": 40, **look})))


# --- amounts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 ms"),
        (0.00004, "0.04 ms"),
        (0.0082, "8.2 ms"),
        (0.09996, "100 ms"),
        (0.9996, "1.00 s"),
        (9.996, "10.0 s"),
        (59.96, "1 min"),
        (125, "2 min 5 s"),
        (7530, "2 h 5 min"),
        (90_000, "1 d 1 h"),
        (-1, "0 ms"),
    ],
)
def test_times_have_the_unit_that_people_read_them_in(seconds, words):
    """`1000 ms`, `60.0 s` and `1e+02 ms` are what careless rounding makes of them."""
    assert duration(seconds) == words


def test_amounts_fit_their_columns():
    """A wide number would push the columns behind it off the terminal."""
    assert [amount(value) for value in (0, 7.26, 541, 9_999, 12_345, 4_600_000, 3e9)] == [
        "0", "7.3", "541", "9,999", "12.3k", "4.6M", "3.0G",
    ]  # fmt: skip
    assert [percent(share) for share in (0, 0.0001, 0.031, 0.5, 1)] == ["0 %", "0.1 %", "3.1 %", "50 %", "100 %"]


def test_a_shortened_id_keeps_both_ends():
    """`paceline trace` finds the request by these, and ids often differ at one end only."""
    assert shorten("req-0123456789abcdef", 12) == "req-0123…def"
    assert shorten("short", 12) == "short"
    assert len(shorten("x" * 10_000, 3)) == 3


# --- drawing --------------------------------------------------------------------------------------------------------

A, B = Ink("a", "blue", "a"), Ink("b", "red", "b")


@pytest.mark.parametrize(
    ("sizes", "bar"),
    [((1, 1), "aaaaabbbbb"), ((0, 0), " " * 10), ((1, 0), "a" * 10), ((99, 3), "aaaaaaaaab"), ((1e9, 1), "a" * 10)],
)
def test_a_bar_is_exactly_as_wide_as_it_is_told(sizes, bar):
    """Whatever is to its right stands in a column; a small part is seen as long as it is not nothing."""
    assert stacked_bar(list(zip((A, B), sizes, strict=True)), 10, mono=True).plain == bar


def test_a_chart_keeps_the_peaks_of_what_it_has_no_columns_for():
    """A spike of two seconds in ten minutes is what one looks for."""
    values = [0.0] * 300
    values[150] = 8.0

    (line,) = chart(values, [0.0] * 300, ("blue", "red"), (20, 1))
    assert line.plain.count("█") == 1
    assert line.cell_len == 20


def test_a_chart_of_nothing_but_zeros_is_empty():
    """Its scale would be a division by zero."""
    assert [line.plain for line in chart([0.0] * 5, [0.0] * 5, ("", ""), (8, 2))] == [" " * 8] * 2


def test_the_map_of_a_cache_shows_what_is_where():
    """Held at its beginning, cached in the middle, free at its end."""
    cells = bytes([2] * 100 + [1] * 100 + [0] * 100)

    assert block_map(cells, 9, mono=True).plain == "███▒▒▒···"
    assert block_map(cells, 9, mono=False).cell_len == 9
    assert block_map(b"", 9, mono=False).plain == " " * 9
    assert block_map(b"\x02", 9, mono=True).plain == "█" * 9


# --- the picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (120, 40), (200, 60), (40, 12), (20, 6), (1, 1)])
@pytest.mark.parametrize("trouble", ["", "no answer"])
def test_the_picture_has_the_size_of_the_terminal(size, trouble):
    """One line too many scrolls the screen, one cell too many breaks a line."""
    width, height = size
    lines = picture(sample_overview(), Look(width=width, height=height, has_keys=True, trouble=trouble))

    assert len(lines) == height
    if width >= 40:
        assert max(line.cell_len for line in lines) <= width


def test_all_that_matters_is_legible_on_80_by_24():
    """It is what a terminal over SSH usually has."""
    text = shown(sample_overview(), width=80, height=24, has_keys=True)

    for word in (
        "Llama-3.1-8B-Instruct",
        "running 14",
        "waiting 6",
        "412 ms",
        "p95 1.39 s",
        "held 31 %",
        "durable",
        "wants 4",
        "q quit",
    ):
        assert word in text
    for column in ("executor-2", "draining", "decode", "queue", "stop"):
        assert column in text


def test_a_wide_terminal_shows_everything_about_a_request():
    """Tenant, place, cache and what went wrong."""
    overview = sample_overview()
    text = shown(overview, width=200, height=80)
    first = next(line for line in text.splitlines() if overview.requests[0].request_id in line)

    assert "decode" in first
    assert "executor-" in first
    assert f"{overview.requests[0].output_token_count:,}/" in first
    assert "its executor was lost twice" in text


def test_without_colours_letters_tell_things_apart():
    """NO_COLOR, files and readers who do not see the difference between blue and cyan."""
    text = shown(sample_overview(), mono=True)

    assert "f forward" in text
    assert re.search(r"f{5,}s", text)
    assert "▒" in text


def test_no_executor_says_what_that_means():
    """An empty table would look like a fault of the display."""
    overview = sample_overview()
    del overview.executors[:]
    assert "no executor is there: requests wait for the next one" in shown(overview)

    started = pb.GetOverviewResponse(at_unix_ms=overview.at_unix_ms)
    assert "no executor has joined yet: `paceline executor` starts one" in shown(started)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("height", [24, 50, None])
def test_figures_are_whole_or_left_out(width, height):
    """`1,319 of 12,288…` is no figure: where two lines of them do not fit, one does."""
    lines = shown(sample_overview(), width=width, height=height).splitlines()
    charts = next(number for number, line in enumerate(lines) if "running waiting" in line)
    figures = [line for line in lines[1:charts] if line]

    assert len(figures) in (1, 2)
    assert not any("…" in line for line in figures)


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_titles_are_whole_words(width):
    """`the last that e…` and `wante…` look like faults of the display."""
    lines = shown(sample_overview(), width=width).splitlines()
    titles = [line for line in lines if line.startswith("requests 1") or "running waiting" in line]

    assert len(titles) == 2
    assert not any("…" in title for title in titles)


@pytest.mark.parametrize("width", [46, 50, 60, 80])
def test_the_head_says_whether_anything_survives_before_it_says_since_when(width):
    """A narrow pane beside an editor is where one looks at it most."""
    overview = sample_overview()
    overview.load.model = "SmolLM2-135M"

    assert "✓" not in shown(overview, width=width).splitlines()[0]
    assert " durable " in shown(overview, width=width).splitlines()[0]


def test_a_scheduler_that_has_just_started_is_shown():
    """No history, no requests, no figures: nothing divides by zero, and it says what is to come."""
    text = shown(pb.GetOverviewResponse())

    assert "no history yet" in text
    assert "none yet: `paceline generate" in text
    assert "durability unknown" in text


@pytest.mark.parametrize(
    ("durability", "words", "colour"),
    [
        (fleet.DURABILITY_ON, "durable, journal 17.9 MiB", "green"),
        (fleet.DURABILITY_OFF, "no journal", "dim"),
        (fleet.DURABILITY_LOST, "JOURNAL LOST: nothing survives a restart", "bold red"),
    ],
)
def test_the_head_says_whether_anything_survives(durability, words, colour):
    """Lost durability is the one thing here that must be seen at once."""
    overview = sample_overview()
    overview.durability = durability
    head = picture(overview, Look(width=120))[0]

    assert words in head.plain
    assert any(span.style == colour for span in head.spans)


def test_refusals_are_those_of_the_last_minute_and_say_so():
    """A total since the start of the process alarms for ever after one bad night."""
    overview = sample_overview()
    assert "refused" not in shown(overview, width=200)
    overview.refused_in_last_minute_count = 5
    assert ", 5 refused in the last minute" in shown(overview, width=200)
    assert ", 5 refused in the last minute" in shown(overview, width=120, height=24)


@pytest.mark.parametrize(("running_count", "is_red"), [(1, False), (2, True)])
def test_one_request_alone_makes_no_idle_share_red(running_count, is_red):
    """In its few steps a pause of a moment is a large share, and nothing to be mended."""
    overview = sample_overview()
    overview.executors[1].executor.running_request_count = running_count
    lines = picture(overview, Look(width=160, height=60))
    (row,) = (line for line in lines if line.plain.startswith("executor-1"))

    assert "3.1 %" in row.plain
    assert any(span.style == "bold red" for span in row.spans) == is_red


def test_who_connects_has_no_cache_yet():
    """`0 of 0 blocks`, and all of them free, are both said of something that is not there."""
    overview = sample_overview()
    overview.load.block_count = overview.load.held_block_count = 0
    del overview.executors[1:]
    overview.executors[0].executor.state = fleet.EXECUTOR_STATE_CONNECTING
    text = shown(overview, width=200, height=60)

    assert "no cache is there" in text
    assert "0 of 0" not in text
    assert re.search(r"^executor-0 +connecting .* – ", text, re.MULTILINE)


def test_the_autoscaler_says_since_when_it_wants_what():
    """A decision without its time cannot be told from one that is stuck."""
    assert "wants 4, 1 starting, for 22 s: the slowest" in shown(sample_overview()).replace("\n", " ")
    overview = sample_overview()
    overview.scaling.decision.reason = "slo wants 4: 5.6 requests/s expected"
    assert "wants 4 (slo), 1 starting, for 22 s: 5.6 requests/s expected" in shown(overview)
    overview.scaling.decision.reason = "slo wants 9: too much; held at 4"
    assert ": slo wants 9: too much; held at 4" in shown(overview)
    overview.scaling.ClearField("decision")
    assert "autoscaler-7f31c0de9a has not said what it wants" in shown(overview)
    overview.ClearField("scaling")
    assert "autoscaler" not in shown(overview)


def test_a_thousand_requests_and_a_hundred_executors_fit():
    """Each kind keeps a part of the lines, and what is left out is counted."""
    overview = sample_overview()
    for _ in range(40):
        overview.executors.extend(overview.executors[:3])
        overview.requests.extend(overview.requests[:25])
    text = shown(overview)

    assert len(text.splitlines()) <= 40
    assert "more: `paceline fleet list`" in text
    assert {"decode", "queue"} <= set(text.split())


@pytest.mark.parametrize("room", [0, 1, 2, 3, 10, 20, 45, 100])
def test_those_who_run_wait_and_ended_share_the_lines(room):
    """Many that run must not hide that others wait, nor how the last ones ended."""
    requests = list(sample_overview().requests)
    some = chosen(requests, room, "stage")
    stages = [one.stage for one in some]

    assert len(some) == min(room, len(requests))
    assert stages == sorted(stages, key=lambda stage: [DECODE, QUEUE, ENDED].index(stage))
    if room >= 10:
        assert set(stages) == {DECODE, QUEUE, ENDED}


def test_requests_can_be_sorted_by_what_they_took():
    """The slow ones are what one looks for."""
    slowest = chosen(list(sample_overview().requests), 10, "slowest")
    lengths = [one.total_ms or one.phases[-1].end_ms for one in slowest]

    assert lengths == sorted(lengths, reverse=True)
    latest = chosen(list(sample_overview().requests), 10, "latest")
    assert latest[0].received_unix_ms >= latest[-1].received_unix_ms


def test_what_users_chose_reaches_the_terminal_as_text():
    """An id that is an escape sequence could otherwise write to the operator's terminal, or read from it."""
    overview = sample_overview()
    overview.load.model = overview.release = overview.scaling.decision.reason = EVIL
    overview.executors[0].executor.executor_id = EVIL
    for one in overview.requests:
        one.request_id, one.tenant, one.error = EVIL + "x" * 5_000, EVIL, EVIL
    for width in (80, 120, 200):
        lines = picture(overview, Look(width=width, height=60))
        assert all(line.plain.isprintable() for line in lines)
        assert max(line.cell_len for line in lines) <= width
    assert "[red]" in text_of(lines)
    assert ":smile:" in text_of(lines)
    assert plain(EVIL) == "[red]x[/]�[2J���:smile:"


def test_a_picture_that_is_no_longer_true_is_grey_and_says_why():
    """Nobody must take old figures for new ones."""
    lines = picture(sample_overview(), Look(width=100, height=30, mono=True, trouble="no answer from x since 12:00"))

    assert "no answer from x since 12:00" in text_of(lines)
    assert "live" not in lines[0].plain
    styles = {str(line.style) for line in lines if line.plain.strip() and "no answer" not in line.plain}
    assert styles == {"bright_black"}


# --- what answers and keys do ---------------------------------------------------------------------------------------


def test_silence_counts_from_the_last_answer():
    """That is how old the figures are."""
    now = [1000.0]
    view = View("here:1", clock=lambda: now[0])
    view.answered(sample_overview())
    for now[0] in (1010.0, 1012.0):
        view.failed(CommandError("refused", exit_code=ExitCode.UNREACHABLE))

    assert "12 s ago: refused" in view.look((80, 24)).trouble
    view.answered(sample_overview())
    assert not view.look((80, 24)).trouble


def test_what_waiting_does_not_help_with_ends_it():
    """An old scheduler would be asked for ever."""
    with pytest.raises(CommandError, match="too old"):
        View("here:1").failed(CommandError("too old"))


def test_keys_do_what_the_footer_says_and_others_nothing():
    """An arrow key arrives as Escape and letters."""
    view = View("here:1")
    view.press("\x1b[A\x1bOq")
    assert not view.ended
    view.press("p")
    assert view.is_paused
    view.press(" s")
    assert not view.is_paused
    assert view.look((80, 24)).sort == "slowest"
    view.press("Q")
    assert view.ended


def test_before_the_first_answer_it_says_whom_it_asks():
    """A wrong address is the usual reason."""
    assert "asking here:1" in text_of(View("here:1").lines((80, 24)))
    assert "`paceline serve` starts one" in text_of(nothing_yet(Look(trouble="nobody"), "here:1"))


# --- as a command ---------------------------------------------------------------------------------------------------


async def paceline(*words: str) -> Any:
    """Run the command beside the servers of this event loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, list(words), prog_name="paceline")


async def read(call: Any) -> None:
    async for _ in call:
        pass


async def test_one_picture_goes_into_a_pipe_as_plain_text():
    """For a bug report; nothing but text is in it, and no lines are left out."""
    async with started(2) as system:
        await read(system.generate(request(request_id="mine")))
        result = await paceline("top", "--server", system.address)

    assert result.exit_code == ExitCode.OK, result.output
    assert "\x1b" not in result.stdout
    for word in ("paceline fake", "no journal", "e0", "e1", "ready", "mine", "length", "8/8"):
        assert word in result.stdout


async def test_json_is_the_message_itself():
    """For scripts: the names and units that observation.proto explains."""
    async with started(1) as system:
        await read(system.generate(request(request_id="mine")))
        result = await paceline("top", "--server", system.address, "--json", "--requests", "1")

    answer = json.loads(result.stdout)
    assert answer["executors"][0]["executor"]["executor_id"] == "e0"
    assert [one["request_id"] for one in answer["requests"]] == ["mine"]


@pytest.mark.parametrize("words", [("--once",), ("--json",), ()])
async def test_no_scheduler_is_exit_code_3_for_scripts(words, tmp_path):
    """Only on a terminal somebody waits for one to come."""
    result = await paceline("top", "--server", f"unix:{tmp_path}/nobody.sock", *words)

    assert result.exit_code == ExitCode.UNREACHABLE, result.output
    assert "no server answers" in result.stderr


def test_help_shows_examples_and_keys():
    """Help is where people learn a command."""
    result = CliRunner().invoke(app, ["top", "--help"], prog_name="paceline")

    assert "$ paceline top" in result.output
    assert "Keys: q" in result.output


# --- on a terminal --------------------------------------------------------------------------------------------------


async def test_it_shows_what_happens_until_q_is_pressed():
    """Live figures, keys at once, another size at once; then the terminal is as it was, and that is no error."""
    async with started(1, executor=SLOW) as system:
        async with Terminal("top", "--server", system.address, "--interval", "0.5", size=(80, 24)) as terminal:
            await terminal.shows("live")
            call = system.generate(request("hello", 200, request_id="mine", ignore_eos=True))
            reading = asyncio.create_task(read(call))
            await terminal.shows(lambda text: "running 1" in text and "mine" in text and "decode" in text)
            terminal.press("p")
            paused = await terminal.shows("paused")
            await asyncio.sleep(1.0)
            assert terminal.text() == paused
            terminal.press("ps")
            await terminal.shows(lambda text: "live" in text and "sort: slowest" in text)
            terminal.resize(150, 45)
            text = await terminal.shows("tokens held")
            assert max(map(len, text.splitlines())) > 100
            terminal.press("q")
            assert await terminal.ended() == ExitCode.OK
            assert terminal.is_as_before()
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading


async def test_a_quiet_service_costs_few_bytes():
    """Over a slow line only what has changed is sent."""
    async with started(2) as system:
        async with Terminal("top", "--server", system.address, "--interval", "0.5", size=(120, 40)) as terminal:
            await terminal.shows("live")
            await asyncio.sleep(1)
            terminal.text()
            before = len(terminal.output)
            await asyncio.sleep(4)
            terminal.text()
            assert 0 < len(terminal.output) - before < 6_000


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, ExitCode.OK), (signal.SIGTERM, 143)])
async def test_a_signal_leaves_the_terminal_as_it_was(number, code, tmp_path):
    """A shell without echo and cursor is a bad thing to be left with."""
    async with Terminal("top", "--server", f"unix:{tmp_path}/nobody.sock") as terminal:
        await terminal.shows("nobody answers at")
        assert not terminal.is_as_before()
        terminal.process.send_signal(number)
        assert await terminal.ended() == code
        assert terminal.is_as_before()


async def test_it_outlives_the_scheduler_and_goes_on_with_the_next():
    """It is looked at when something goes wrong: then it must say so, and come back without anybody's help."""
    address = f"127.0.0.1:{free_port()}"
    async with Terminal("top", "--server", address, "--interval", "0.5") as terminal:
        await terminal.shows(f"nobody answers at {address} since")
        async with started(1, listen=(address,)) as system:
            await read(system.generate(request(request_id="mine")))
            await terminal.shows("mine")
        text = await terminal.shows(f"no answer from {address} since")
        assert "mine" in text
        assert "live" not in text
        async with started(1, listen=(address,)):
            await terminal.shows(lambda text: "live" in text and "no answer" not in text and "mine" not in text)
            terminal.press("q")
            assert await terminal.ended() == ExitCode.OK


async def test_no_color_is_respected():
    """Some cannot see them, and some terminals cannot show them."""
    async with started(1) as system:
        words = ("top", "--server", system.address)
        async with Terminal(*words, environment={"NO_COLOR": "1"}) as terminal:
            await terminal.shows("f forward")
            codes = {code for codes in re.findall(r"\x1b\[([\d;]*)m", terminal.output) for code in codes.split(";")}
            terminal.press("q")
            await terminal.ended()

    assert not codes & {str(code) for code in (*range(30, 49), *range(90, 108))}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
