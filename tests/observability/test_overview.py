"""What `paceline top` and the status page are told."""

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace

import grpc
import pytest
from google.protobuf.json_format import Parse
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from common.http_pages import HttpPages, Page
from common.otlp_json import to_otlp_json
from common.processes import ANY_PORT
from common.spans import Origin, Span, SpanEvent, SpanKind, SpanLink
from paceline.v1 import fleet_pb2, observation_pb2, observation_pb2_grpc
from scheduler_svc.observation.overview import Rates
from scheduler_svc.observation.step_meter import Phases, StepMeter, idle_share
from scheduler_svc.observation.tracing import Budget, Tracing
from tests.system import FAST, request, started, until

SLOW = replace(FAST, fake_step_us=20_000)
STAGES = observation_pb2.RequestStage


async def look(system, limit=0):
    """One overview."""
    async with grpc.aio.insecure_channel(system.address) as channel:
        stub = observation_pb2_grpc.ObservationServiceStub(channel)
        return await stub.GetOverview(observation_pb2.GetOverviewRequest(request_limit=limit))


async def read(system, message):
    return [one async for one in system.generate(message)]


def stages(shown):
    return [STAGES.Name(phase.stage).removeprefix("REQUEST_STAGE_") for phase in shown.phases]


async def test_requests_are_shown_where_they_are_running_ones_first():
    """One look answers who runs, who waits, and what became of the last ones."""
    config = replace(SLOW, max_num_seqs=2)
    async with started(executor=config) as system:
        await read(system, request("done", 2, request_id="done"))
        reading = []
        for name in ("r0", "r1", "r2"):  # one after the other: their order is what is looked at
            reading.append(asyncio.ensure_future(read(system, request(name, 30, request_id=name, tenant="t"))))
            await until(lambda name=name: system.app.engine.find(name, 0) is not None)
        await until(lambda: (one := system.app.engine.find("r1", 0)) is not None and one.output_count > 2)
        overview = await look(system)
        few = await look(system, 1)
        await asyncio.gather(*reading)

    shown = {one.request_id: one for one in overview.requests}
    assert [one.request_id for one in overview.requests] == ["r0", "r1", "r2", "done"]
    assert [stage for stage in stages(shown["r0"]) if stage != "DOOR"] == ["QUEUE", "PREFILL", "DECODE"]
    assert stages(shown["r2"])[-1] == "QUEUE"
    assert (shown["done"].stage, shown["done"].outcome) == (STAGES.REQUEST_STAGE_ENDED, "length")
    assert shown["r0"].phases[-1].executor_id == "e0"
    assert shown["r0"].tenant == "t"
    assert shown["r0"].first_token_ms > 0
    assert shown["r2"].first_token_ms == 0
    assert [one.request_id for one in few.requests] == ["r0"]
    assert overview.load.running_request_count == 2
    assert overview.load.waiting_request_count == 1


async def test_the_time_of_a_request_is_shown_without_gaps():
    """What does not add up is not believed."""
    async with started() as system:
        await read(system, request("hello world", 8, request_id="r"))
        (shown,) = (await look(system)).requests

    ends = [phase.end_ms for phase in shown.phases]
    assert [phase.begin_ms for phase in shown.phases] == [0, *ends[:-1]]
    assert ends[-1] == pytest.approx(shown.total_ms)
    assert shown.output_token_count == 8


async def test_the_block_map_shows_what_is_held_and_what_is_kept():
    """Whether a cache is full of work or full of memories is the first question when it is short."""
    async with started(executor=SLOW) as system:
        await read(system, request("x" * 16, 2, request_id="before"))
        reading = asyncio.ensure_future(read(system, request("y" * 8, 30, request_id="now")))
        await until(lambda: (one := system.app.engine.find("now", 0)) is not None and one.output_count > 2)
        (executor,) = (await look(system)).executors
        await reading

    cells = executor.block_cells
    assert executor.blocks_per_cell == 1
    assert len(cells) == 64
    assert cells.count(2) == 64 - executor.executor.free_block_count
    assert cells.count(1) == executor.executor.reusable_block_count >= 4
    assert cells.count(0) == executor.empty_block_count


async def test_speeds_and_phases_of_an_executor_are_measured():
    """Where the time of its steps goes is what speed is made of."""
    async with started(executor=replace(FAST, fake_step_us=2000)) as system:
        system.app._overview.sample()
        await read(system, request("hello", 40, request_id="r"))
        (executor,) = (await look(system)).executors

    assert executor.phases.forward_us >= 2000
    assert executor.steps_per_s > 0
    assert executor.sent_bytes_per_s > 0
    assert executor.received_bytes_per_s > 0
    assert 0 <= executor.executor.idle_share < 1
    assert 0 <= executor.idle_share < 1


def test_the_idle_share_of_the_last_seconds_forgets_what_was_before():
    """An operator who has given the scheduler a core sees at once that it helped."""
    steps = StepMeter()
    rates = Rates(steps)
    steps.note(Phases(idle=3.0, forward=1.0), goes_on=True)
    rates.sample(0.0)
    quiet = rates.now(2.0)
    steps.note(Phases(idle=1.0, forward=3.0), goes_on=True)
    rates.sample(4.0)
    starved = rates.now(4.0)
    steps.note(Phases(idle=5.0, forward=4.0), goes_on=False)
    for at in (6.0, 8.0, 10.0):
        rates.sample(at)
    later = rates.now(10.0)

    assert idle_share(quiet.starved_s, quiet.busy_s) == 0.0
    assert idle_share(starved.starved_s, starved.busy_s) == pytest.approx(0.25)
    assert idle_share(later.starved_s, later.busy_s) == 0.0
    assert later.busy_s == pytest.approx(4.0 / 6.0)
    assert steps.idle_share == pytest.approx(4.0 / 12.0)


async def test_charts_end_with_the_figures_beside_them():
    """A chart that says 2 running beside a tile that says 0 makes both of them doubtful."""
    async with started(executor=SLOW) as system:
        system.app._overview.sample()
        reading = asyncio.ensure_future(read(system, request("r", 200, request_id="r", ignore_eos=True)))
        await until(lambda: system.scheduler.executors["e0"].running)
        overview = await look(system)
        while not overview.load.running_request_count:  # looks are shared for a moment
            overview = await look(system)
        reading.cancel()

    assert overview.history[0].running_request_count == 0
    assert overview.history[-1].running_request_count == overview.load.running_request_count == 1
    assert overview.history[-1].at_unix_ms == overview.at_unix_ms


async def test_what_is_found_again_after_a_preemption_is_not_reused():
    """`reused` of an executor and the counter of Prometheus are compared, and would be two truths."""
    config = replace(FAST, fake_block_count=24, fake_step_us=2000)
    async with started(executor=config, policy="priority") as system:
        low = asyncio.ensure_future(read(system, request("a" * 40, 24, request_id="low", priority=0, ignore_eos=True)))
        await until(lambda: (one := system.app.engine.find("low", 0)) is not None and one.output_count > 2)
        await read(system, request("b" * 40, 24, request_id="high", priority=5, ignore_eos=True))
        await low
        (executor,) = system.scheduler.executors.values()
        meter = system.app.engine.meter

    assert meter.preemption_count
    assert executor.reused_count == meter.reused_token_count == 0
    assert executor.known_count == meter.placed_prompt_token_count == 80


async def test_what_the_autoscaler_decided_is_shown_as_long_as_it_has_the_right():
    """An operator sees why there are so many executors without looking for another process."""
    decision = fleet_pb2.ScalingDecision(wanted_executor_count=3, reason="slo wants 3", changed_unix_ms=5)
    async with started() as system:
        before = await look(system)
        lease = fleet_pb2.LeaseScalingRequest(holder_id="a", decision=decision, metrics_address="10.0.0.1:9102")
        await system.fleet.LeaseScaling(lease)
        await asyncio.sleep(0.3)
        during = await look(system)
        system.app._overview.sample()
        await system.fleet.LeaseScaling(fleet_pb2.LeaseScalingRequest(holder_id="a", release=True))
        await asyncio.sleep(0.3)
        after = await look(system)

    assert not before.HasField("scaling")
    assert during.scaling.decision == decision
    assert after.history[-2].wanted_executor_count == 3
    assert not after.history[-1].HasField("wanted_executor_count")  # that one is of now
    assert not after.HasField("scaling")


async def test_a_request_that_is_not_remembered_is_said_to_be_unknown():
    """The message says how many are kept and where that is set."""
    async with started(keep_timelines=1) as system:
        for name in ("first", "second"):
            await read(system, request("hello", 2, request_id=name))
        async with grpc.aio.insecure_channel(system.address) as channel:
            stub = observation_pb2_grpc.ObservationServiceStub(channel)
            kept = await stub.GetTrace(observation_pb2.GetTraceRequest(request_id="second"))
            with pytest.raises(grpc.aio.AioRpcError, match="--keep-timelines") as unknown:
                await stub.GetTrace(observation_pb2.GetTraceRequest(request_id="first"))
            with pytest.raises(grpc.aio.AioRpcError, match="at most 1000"):
                await stub.GetOverview(observation_pb2.GetOverviewRequest(request_limit=1001))

    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert "prefill" in kept.otlp_json


def test_what_is_written_for_jaeger_is_otlp():
    """Read back by the contract's own parser: nothing is lost, nothing has another type."""
    origin = Origin("paceline-scheduler", "here")
    span = Span(
        name="chat model",
        trace_id=bytes(range(16)),
        span_id=bytes(range(8)),
        parent_id=b"12345678",
        origin=origin,
        begin_ns=1,
        end_ns=2**62,
        kind=SpanKind.SERVER,
        attributes={"text": "é", "whole": 2**40, "half": 0.5, "yes": True, "list": ("a", "b")},
        events=(SpanEvent(5, "first token"),),
        links=(SpanLink(b"x" * 16, b"y" * 8),),
        error="broken",
    )
    # protobuf's JSON has ids in base64 where OTLP/JSON has hexadecimal: read them as what they are.
    data = json.loads(to_otlp_json([span]))
    (written,) = data["resourceSpans"][0]["scopeSpans"][0]["spans"]
    ids = [written.pop(name) for name in ("traceId", "spanId", "parentSpanId")]
    links = written.pop("links")
    read_back = Parse(json.dumps(data), TracesData()).resource_spans[0].scope_spans[0].spans[0]

    assert ids == [span.trace_id.hex(), span.span_id.hex(), span.parent_id.hex()]
    assert links == [{"traceId": (b"x" * 16).hex(), "spanId": (b"y" * 8).hex()}]
    assert (read_back.kind, read_back.end_time_unix_nano, read_back.status.message) == (2, 2**62, "broken")
    assert [one.value.WhichOneof("value") for one in read_back.attributes] == [
        "string_value",
        "int_value",
        "double_value",
        "bool_value",
        "array_value",
    ]


def test_a_budget_lets_so_many_through_a_second():
    """Bursts up to a second's worth, then the rate; none at all where that is said."""
    now = 0.0
    budget, none = Budget(4.0, lambda: now), Budget(0.0, lambda: now)
    burst = sum(budget.take() for _ in range(100))
    now = 1.5
    later = sum(budget.take() for _ in range(100))

    assert (burst, later) == (4, 4)
    assert not any(none.take() for _ in range(10))


def test_a_caller_that_records_is_always_followed_and_one_that_does_not_never_becomes_a_parent():
    """A parent that nobody exported would leave the request's span without a root in every viewer."""

    class Sink:
        def send(self, spans):
            """Not called."""

    tracing, off = Tracing(Sink(), requests_per_s=0.0), Tracing(None)
    header = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-{}"

    asked, unasked, nonsense = (tracing.accept(one) for one in (header.format("01"), header.format("00"), "nonsense"))
    assert (asked.flags, asked.parent_id.hex()) == (1, "0123456789abcdef")
    assert (unasked.flags, unasked.parent_id) == (0, b"")
    assert unasked.trace_id == asked.trace_id != nonsense.trace_id
    assert off.accept(header.format("01")).flags == 1


def test_means_and_shares_of_steps_are_of_what_was_measured():
    """Idle time counts only while there was something to go on with."""
    steps = StepMeter()
    assert (steps.median_s, steps.mean, steps.idle_share) == (0.0, Phases(), 0.0)
    steps.note(Phases(idle=5.0, forward=1.0), goes_on=False)
    steps.note(Phases(idle=1.0, wait=0.5, prepare=0.25, forward=0.5, sample=0.25), goes_on=True)

    assert steps.idle_share == pytest.approx(1.0 / 3.0)
    assert steps.mean == Phases(idle=0.5, wait=0.25, prepare=0.125, forward=0.75, sample=0.125)
    assert steps.total.since(Phases(forward=1.0)).forward == 0.5


@pytest.fixture
def pages():
    """A server with one page that says what it was asked."""
    served = HttpPages(
        [], {"/": lambda _: Page("home", "text/plain"), "/of/": lambda r: Page(f"{r.rest} {r.parameters}")}
    )
    port = served.start(ANY_PORT, "127.0.0.1")
    yield f"http://127.0.0.1:{port}"
    served.stop()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/", "home"),
        ("/of/a?b=c&b=d", "a {'b': 'd'}"),
        (f"/of/{urllib.parse.quote('é/<x> %', safe='')}", "é/<x> % {}"),
    ],
)
def test_pages_are_found_by_their_paths(pages, path, said):
    """Request ids are whatever users chose, slashes and percent signs included."""
    with urllib.request.urlopen(pages + path) as answer:
        assert answer.read().decode() == said
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_what_is_no_page_is_refused_and_said(pages):
    """Whoever guesses a path is told which there are; nothing can be sent here."""
    with pytest.raises(urllib.error.HTTPError, match="404") as unknown:
        urllib.request.urlopen(f"{pages}/nowhere")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"{pages}/", data=b"x")
    head = urllib.request.Request(f"{pages}/", method="HEAD")

    assert b"there are: / /metrics /of/" in unknown.value.read()
    with urllib.request.urlopen(head) as answer:
        assert (answer.read(), answer.headers["Content-Length"]) == (b"", "4")
