"""`paceline trace`: the waterfall of built traces, and of requests of a real system."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from typer.testing import CliRunner

from paceline.v1 import observation_pb2 as pb
from paceline_cli.errors import ExitCode
from paceline_cli.main import app
from paceline_cli.sight.listing import Sort, listing, per_token_ms, slowest
from paceline_cli.sight.spans import folded, tree_of
from paceline_cli.sight.trace_view import waterfall
from paceline_cli.trace import _means
from tests.browser.sample import sample_overview
from tests.system import FAST, System, request, started, until

SLOW = replace(FAST, fake_step_us=10_000)
EVIL = "[red]x[/]\x1b[2J\x07\u202e"
SECOND = 1_000_000_000
START = 1_790_000_000 * SECOND


def span(name: str, number: int, begin_s: float, end_s: float, parent: int = 1, **more: Any) -> dict[str, Any]:
    """A span as a scheduler writes it; attributes are given by their names with `_` for `.`."""
    facts = more.pop("facts", {})
    return {
        "spanId": f"{number:016x}",
        "parentSpanId": f"{parent:016x}" if parent else "",
        "name": name,
        "startTimeUnixNano": str(START + round(begin_s * SECOND)),
        "endTimeUnixNano": str(START + round(end_s * SECOND)),
        "attributes": [{"key": key, "value": value(one)} for key, one in facts.items()],
        **more,
    }


def value(one: Any) -> dict[str, Any]:
    if isinstance(one, tuple):
        return {"arrayValue": {"values": [value(part) for part in one]}}
    kinds = {int: "intValue", float: "doubleValue", str: "stringValue"}
    return {kinds[type(one)]: str(one) if isinstance(one, int) else one}


def event(name: str, at_s: float, **facts: Any) -> dict[str, Any]:
    attributes = [{"key": key, "value": value(one)} for key, one in facts.items()]
    return {"name": name, "timeUnixNano": str(START + round(at_s * SECOND)), "attributes": attributes}


def otlp(*spans: dict[str, Any]) -> str:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "paceline-scheduler"}}]}
    return json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": list(spans)}]}]})


def chunk(number: int, begin_s: float, end_s: float, executor: str = "e0", attempt: int = 1) -> dict[str, Any]:
    facts = {"paceline.executor.id": executor, "paceline.attempt": attempt, "paceline.tokens": 100}
    return span("prefill", number, begin_s, end_s, facts=facts)


def decode(number: int, begin_s: float, end_s: float, executor: str = "e0", attempt: int = 1) -> dict[str, Any]:
    facts = {
        "paceline.executor.id": executor,
        "paceline.attempt": attempt,
        "paceline.steps": 57,
        "paceline.steps.forward_s": 0.8 * (end_s - begin_s),
        "paceline.steps.prepare_s": 0.1 * (end_s - begin_s),
        "paceline.steps.wait_s": 0.9 * (end_s - begin_s),
    }
    return span("decode", number, begin_s, end_s, facts=facts)


ROOT_FACTS = {
    "gen_ai.usage.input_tokens": 200,
    "gen_ai.usage.cache_read.input_tokens": 16,
    "gen_ai.usage.output_tokens": 58,
    "gen_ai.response.finish_reasons": ("length",),
    "gen_ai.response.time_to_first_chunk": 1.6,
}


def simple(**root: Any) -> str:
    """Queue 1.2 s, prefill 0.4 s, decode 1.8 s."""
    root = {"facts": ROOT_FACTS} | root
    return otlp(
        decode(5, 1.6, 3.4),
        span("chat fake", 1, 0, 3.4, parent=0, events=[event("first token", 1.6)], **root),
        chunk(4, 1.4, 1.6),
        chunk(3, 1.2, 1.4),
        span("queue", 2, 0, 1.2),
    )


def drawn(otlp_json: str, width: int = 120) -> list[str]:
    return [line.plain.rstrip() for line in waterfall("mine", tree_of(otlp_json), width)]


# --- reading --------------------------------------------------------------------------------------------------------


def test_spans_become_a_tree_in_the_order_of_time():
    """The file has them by process, and in no order that anybody promises."""
    (root,) = tree_of(simple())

    assert [child.name for child in root.children] == ["queue", "prefill", "prefill", "decode"]
    assert root.facts["gen_ai.response.finish_reasons"] == ("length",)


def test_a_parent_that_is_elsewhere_makes_a_root():
    """A caller with tracing of its own is the parent of the request, and its spans are not here."""
    (root,) = tree_of(otlp(span("chat fake", 1, 0, 1, parent=77), span("queue", 2, 0, 1)))

    assert root.name == "chat fake"
    assert tree_of("{}") == []


def test_many_chunks_are_folded_and_few_are_not():
    """Thirty lines of the same would push everything else off the screen."""
    chunks = [chunk(10 + number, number, number + 1) for number in range(30)]
    waits = [span("wait", 100 + number, number, number + 0.5, parent=10 + number) for number in range(30)]
    (root,) = tree_of(otlp(span("chat fake", 1, 0, 30, parent=0), *chunks, *waits))
    (prefill,) = folded(root).children

    assert (prefill.count, prefill.facts["paceline.tokens"]) == (30, 3000)
    assert [(one.name, one.count, one.busy_ns) for one in prefill.children] == [("wait", 30, 15 * SECOND)]
    assert len(root.children) == 30
    text = "\n".join(drawn(otlp(span("chat fake", 1, 0, 30, parent=0), *chunks)))
    assert "prefill ×30 3,000 tokens" in text
    (root,) = tree_of(simple())
    assert len(folded(root).children) == 4


# --- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_bars_stand_on_one_axis(width):
    """What is to the right of something happened after it: that is all a waterfall says."""
    lines = drawn(simple(), width)
    bars = [line.partition("│")[2].partition("│")[0] for line in lines if line.count("│") == 2][1:]
    begins = [len(bar) - len(bar.lstrip()) for bar in bars[:5]]
    cells = len(bars[0])

    assert max(map(len, lines)) <= width
    assert begins[0] == begins[1] == 0
    assert begins == sorted(begins)
    assert begins[4] == int(1.6 / 3.4 * cells)
    assert bars[5].index("◆") == int(1.6 / 3.4 * cells)


@pytest.mark.parametrize("width", [40, 50, 60, 64, 80])
def test_how_long_it_took_is_in_sight_however_narrow_it_is(width):
    """A column that is cut off at the right is the one that was asked for."""
    lines = drawn(simple(), width)
    heads = next(line for line in lines if line.endswith("took"))

    assert "…" not in heads
    assert [line.split("│")[2].split()[-1] for line in lines if "queue " in line and "│" in line] == ["s"]
    assert max(map(len, lines)) <= width


def test_the_slowest_fit_80_columns_with_all_that_tells_at_what():
    """Ids are shortened to what the command takes; a line that breaks is no table."""
    overview = sample_overview()
    for one in overview.requests:
        one.request_id = f"req-{one.request_id:0<32}"[:36]
    without_door = listing(overview.requests[:20], 80)[0].plain
    overview.requests[0].phases.insert(0, pb.Phase(stage=pb.REQUEST_STAGE_DOOR, end_ms=70_000))
    overview.requests[1].recomputation_count = 3
    narrow = [line.plain.rstrip() for line in listing(overview.requests[:20], 80)]
    wide = [line.plain.rstrip() for line in listing(overview.requests, 200)]

    assert max(map(len, narrow)) <= 80
    assert without_door.split() == ["request", "took", "queue", "first", "a", "token", "executor", "outcome"]
    assert narrow[0].split() == ["request", "took", "door", "queue", "first", "a", "token", "outcome"]
    assert "↻3" in narrow[2]
    assert "1 min 10 s" in narrow[1]
    assert _means(narrow[1].split()[0], overview.requests[0].request_id)
    for words in ("executor", "what went wrong", "its time"):
        assert words in wide[0]
    assert overview.requests[0].request_id in wide[1]


def test_a_long_answer_is_not_slow_by_its_length():
    """Who sorts by the whole time finds those who asked for most, and never the one that waited."""
    overview = pb.GetOverviewResponse()
    for name, tokens, first_ms, total_ms in (
        ("long", 1001, 50, 20_050), ("waited", 11, 5_000, 5_200), ("slow", 101, 50, 10_050), ("usual", 101, 50, 2_050),
    ):  # fmt: skip
        overview.requests.add(
            request_id=name, output_token_count=tokens, choice_count=1, first_token_ms=first_ms, total_ms=total_ms
        )
    order = {sort: [one.request_id for one in slowest(overview.requests, sort)] for sort in Sort}

    assert order[Sort.DELAY][:2] == ["slow", "waited"]
    assert order[Sort.FIRST_TOKEN][0] == "waited"
    assert order[Sort.PER_TOKEN][0] == "slow"
    assert order[Sort.TOTAL][0] == "long"
    assert [per_token_ms(one) for one in overview.requests] == [20, 20, 100, 20]


def test_the_account_stands_below_the_picture():
    """The answer to "why was this slow?" in sentences; they are the scheduler's, so that its page has the same."""
    account = ("ended with length after 3.40 s", "e0 was lost at +1.00 s: a pause of 1.20 s", "queue 1.20 s (35 %)")
    lines = drawn(simple(facts={**ROOT_FACTS, "paceline.account": account}))

    assert tuple(lines[-3:]) == account


def test_a_request_that_was_moved_shows_both_places_and_why():
    """Two attempts, and what was between them."""
    events = [
        event("placed again", 2.5, **{"paceline.executor.id": "e1"}),
        event("executor lost", 2, **{"paceline.executor.id": "e0"}),
    ]
    text = otlp(
        span("chat fake", 1, 0, 4, parent=0, events=events, facts=ROOT_FACTS),
        span("queue", 2, 0, 0.5), chunk(3, 0.5, 1), decode(4, 1, 2),
        span("queue", 5, 2, 2.5), chunk(6, 2.5, 3, "e1", 2), decode(7, 3, 4, "e1", 2),
    )  # fmt: skip
    lines = drawn(text)
    marks = [line for line in lines if "◆" in line]

    assert ["executor lost" in marks[0], "placed again" in marks[1]] == [True, True]


def test_what_went_wrong_is_red():
    """It is what one is looking for."""
    text = simple(status={"code": 2, "message": "its executor was lost twice"})
    lines = waterfall("mine", tree_of(text), 100)
    (error,) = (line for line in lines if "its executor was lost twice" in line.plain)

    assert str(error.style) == "red" or any(one.style == "red" for one in error.spans)


def test_a_trace_without_length_is_drawn():
    """A request that was refused at once: nothing divides by zero."""
    assert drawn(otlp(span("chat fake", 1, 0, 0, parent=0)))
    assert drawn("{}") == ["the trace is empty"]


def test_names_from_outside_cannot_reach_the_terminal():
    """Tenants, errors and ids are the text of users."""
    text = otlp(
        span(EVIL, 1, 0, 1, parent=0, events=[event(EVIL, 0.5)], status={"code": 2, "message": EVIL},
             facts={"paceline.tenant": EVIL, "paceline.account": (EVIL, EVIL)}),
        span("decode", 2, 0, 1, facts={"paceline.executor.id": EVIL, "paceline.steps": 3}),
    )  # fmt: skip
    lines = waterfall(EVIL, tree_of(text), 100)

    assert all(line.plain.isprintable() for line in lines)
    overview = sample_overview()
    overview.requests[0].request_id = overview.requests[0].error = EVIL
    assert all(line.plain.isprintable() for line in listing(overview.requests, 100))


# --- finding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["req-12", "req-1…cd", "req-...abcd", "…d", "req-1234abcd…"])
def test_a_request_is_found_by_what_top_shows_of_it(wanted):
    """A shortened id is all that fits on the screen it is copied from."""
    assert _means(wanted, "req-1234abcd")


@pytest.mark.parametrize("wanted", ["1234", "req-1…ce", "req-1234ab…abcd"])
def test_another_request_is_not(wanted):
    """A trace of the wrong request would be believed."""
    assert not _means(wanted, "req-1234abcd")


# --- as a command ---------------------------------------------------------------------------------------------------


async def trace(system: System, *words: str) -> Any:
    """Run the command beside the servers of this event loop."""
    words = ("trace", *words, "--server", system.address)
    return await asyncio.to_thread(CliRunner().invoke, app, list(words), prog_name="paceline")


async def read(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_request_is_explained_as_text():
    """Where its time went, in a picture and in words; in a pipe without control codes."""
    async with started(1) as system:
        await read(system.generate(request("hello there", 8, request_id="mine-1")))
        await read(system.generate(request("hello there", 8, request_id="other")))
        result = await trace(system, "mine")

    assert result.exit_code == ExitCode.OK, result.output
    assert "\x1b" not in result.stdout
    for word in ("mine-1", "queue", "prefill", "forward", "decode", "◆ first token", "ended with length", "on e0"):
        assert word in result.stdout


async def test_a_request_whose_executor_died_shows_both_attempts():
    """The pause that its user saw has a name and a place."""
    async with started(2, executor=SLOW) as system:
        reading = asyncio.create_task(read(system.generate(request("hello", 40, request_id="mine", ignore_eos=True))))
        await until(lambda: any(one.running for one in system.scheduler.executors.values()))
        (name,) = (one.executor_id for one in system.scheduler.executors.values() if one.running)
        await asyncio.sleep(0.1)
        next(task for task in system.tasks if task.get_name() == name).cancel()
        await reading
        result = await trace(system, "mine")

    other = {"e0": "e1", "e1": "e0"}[name]
    assert "placed again" in result.stdout
    assert "computed again once" in result.stdout
    assert f"on {name} and {other}" in result.stdout
    assert re.search(rf"{name} was (lost|cut off) at \+\S+ m?s.*: a pause of \d", result.stdout)
    decodes = [line for line in result.stdout.splitlines() if line.startswith("  decode")]
    assert [line.split("│")[0].split()[-1] for line in decodes] == [name, other]


def in_base64(value: Any) -> Any:
    """OTLP/JSON as the JSON of protobuf: ids, which must be hexadecimal there, are in base64 here."""
    if isinstance(value, list):
        return [in_base64(one) for one in value]
    if not isinstance(value, dict):
        return value
    for name in {"traceId", "spanId", "parentSpanId"} & value.keys():
        assert len(value[name]) == (32 if name == "traceId" else 16)
    return {
        key: base64.b64encode(bytes.fromhex(one)).decode() if key.endswith("Id") else in_base64(one)
        for key, one in value.items()
    }


def without_empty_lists(value: Any) -> Any:
    """Without empty lists, which protobuf leaves out."""
    if isinstance(value, list):
        return [without_empty_lists(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: without_empty_lists(one) for key, one in value.items() if one != []}


async def test_the_file_follows_the_rules_of_otlp_json_to_the_letter(tmp_path):
    """Read strictly and written again by protobuf itself, a trace of everything there is comes out as it went in.

    So no field has a name that nobody knows, 64-bit integers are texts, enums are numbers, and ids are hexadecimal.
    """
    file = tmp_path / "trace.json"
    async with started(2, executor=SLOW) as system:
        call = system.generate(
            request("hello " * 10, 30, request_id="mine", seed=2**64 - 1, choice_count=2, ignore_eos=True)
        )
        reading = asyncio.create_task(read(call))
        await until(lambda: any(one.running for one in system.scheduler.executors.values()))
        (name, *_) = (one.executor_id for one in system.scheduler.executors.values() if one.running)
        next(task for task in system.tasks if task.get_name() == name).cancel()
        await reading
        await trace(system, "mine", "--output", str(file))

    data = in_base64(json.loads(file.read_text(), parse_constant=pytest.fail))
    message = ParseDict(data, TracesData())
    assert MessageToDict(message, use_integers_for_enums=True) == without_empty_lists(data)
    names = {span.name for part in message.resource_spans for scope in part.scope_spans for span in scope.spans}
    assert {"queue", "prefill", "decode"} <= names


async def test_the_file_is_what_the_scheduler_said(tmp_path, monkeypatch):
    """Jaeger's page reads OTLP/JSON; a copy that was written anew could differ from it."""
    async with started(1) as system:
        await read(system.generate(request(request_id="mine")))
        real = (await trace(system, "mine", "--output", "-")).stdout
        said = '{"resourceSpans": [ ], "of": "\u00fcber"}'
        monkeypatch.setattr("scheduler_svc.observation.service.to_otlp_json", lambda *_: said)
        printed = await trace(system, "mine", "--output", "-")
        result = await trace(system, "mine", "-o", str(tmp_path / "trace.json"))
        refused = await trace(system, "mine", "-o", str(tmp_path))

    assert json.loads(real)["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert (tmp_path / "trace.json").read_text() == said
    assert printed.stdout == said + "\n"
    assert result.stdout == ""
    assert "Jaeger's page opens it" in result.stderr
    assert refused.exit_code == ExitCode.USAGE
    assert "cannot write" in refused.stderr


async def test_without_an_id_the_slowest_are_listed():
    """Who asks why "a" request was slow has no id yet; the columns say which part it was."""
    async with started(1, executor=replace(FAST, fake_step_us=10_000)) as system:
        empty = await trace(system)
        for number, length in enumerate((2, 120, 50)):
            await read(system.generate(request(f"{number}", length, request_id=f"r{number}", ignore_eos=True)))
        result = await trace(system)
        while result.stdout.count("  length") < 3:  # looks are shared for a moment
            result = await trace(system)

        by_total = await trace(system, "--sort", "total")
        wrong = await trace(system, "--sort", "length")

    assert "no request yet" in empty.stdout
    assert [line.split()[0] for line in by_total.stdout.splitlines()] == ["request", "r1", "r2", "r0"]
    assert "the slowest 3 of 3 by total" in by_total.stderr
    assert "the slowest 3 of 3 by delay (time beyond" in result.stderr
    assert wrong.exit_code == ExitCode.USAGE
    assert "--sort is one of delay, first-token, per-token, total, got 'length'" in wrong.stderr


async def test_an_unknown_or_ambiguous_id_is_refused_with_the_way_out():
    """An exit code for scripts, a remedy for people."""
    async with started(1) as system:
        for name in ("twin-a", "twin-b"):
            await read(system.generate(request(request_id=name)))
        results = [await trace(system, wanted) for wanted in ("nobody", "nobody…x", "twin")]

    assert [result.exit_code for result in results] == [ExitCode.REFUSED] * 3
    assert "request 'nobody' does not run" in results[0].stderr
    assert "without an id lists" in results[0].stderr
    assert "2 requests are called 'twin'" in results[2].stderr
    assert "twin-a" in results[2].stderr


async def test_no_scheduler_is_exit_code_3(tmp_path):
    """As everywhere."""
    words = ["trace", "mine", "--server", f"unix:{tmp_path}/nobody.sock"]
    result = await asyncio.to_thread(CliRunner().invoke, app, words, prog_name="paceline")

    assert result.exit_code == ExitCode.UNREACHABLE, result.output
    assert "no server answers" in result.stderr


def test_a_file_without_an_id_is_wrong_usage():
    """It would hold nothing."""
    assert CliRunner().invoke(app, ["trace", "-o", "x.json"], prog_name="paceline").exit_code == ExitCode.USAGE


def test_help_shows_examples():
    """Help is where people learn a command."""
    assert "$ paceline trace" in CliRunner().invoke(app, ["trace", "--help"], prog_name="paceline").output
