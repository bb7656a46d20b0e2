"""What is seen of the steps of an executor, and what seeing them costs."""

import asyncio
import time
from dataclasses import replace

from structlog.testing import capture_logs

from scheduler_svc import executor_link
from scheduler_svc.observation.step_meter import Phases, StepMeter
from tests.observability.test_traces import SLOW, check_tree, read, received, receiver
from tests.system import FAST, request, started, until

__all__ = ["receiver"]  # a fixture
QUIET = ("debug",)


async def test_a_step_makes_no_line_of_the_log(receiver):
    """Hundreds of steps a second would hide every other line, and cost more than the steps."""
    config = replace(FAST, fake_block_count=40, fake_step_us=0)  # so few that requests give way to each other
    async with started(executor=config, otlp_endpoint=receiver.endpoint) as system:
        (member,) = system.app.fleet.members.values()
        with capture_logs() as lines:
            await asyncio.gather(*(read(system, request(f"{n}" * 8, 100, ignore_eos=True)) for n in range(8)))
            await system.idle()
        step_count, preemption_count = member.link.steps.step_count, system.app.engine.meter.preemption_count

    assert step_count > 300
    assert preemption_count > 0
    assert [line for line in lines if line["log_level"] not in QUIET] == []


async def test_a_step_that_is_slow_anywhere_is_recorded_as_slow(receiver):
    """The scheduler may have had no time for its result: users wait for that as for a slow device."""
    async with started(executor=SLOW, otlp_endpoint=receiver.endpoint, trace_steps=1_000_000) as system:
        reading = asyncio.ensure_future(read(system, request("hello", 60, request_id="r", ignore_eos=True)))
        (member,) = system.app.fleet.members.values()
        await until(lambda: member.link.steps.step_count >= 30)
        time.sleep(1.5)  # noqa: ASYNC251  nothing happens on this event loop, and steps are on their way
        await reading
        await received(system, receiver, "r")

    slow = [root for root in receiver.roots() if root.name == "step"]
    assert any(root.seconds >= 1.4 for root in slow)
    for root in slow:
        check_tree(root)
        assert root.attributes["paceline.step.is_slow"] is True
        assert sum(child.seconds for child in root.children) < root.seconds


def test_a_step_that_waited_behind_another_is_not_slow():
    """One slow step would be told as two, and the second one had to do with nothing."""
    steps = StepMeter()
    for _ in range(20):
        steps.note(Phases(forward=0.01), goes_on=True, away_s=0.012)
    usual = steps.is_slow
    steps.note(Phases(wait=1.99, forward=0.01), goes_on=True, away_s=2.002)
    behind = steps.is_slow
    steps.note(Phases(forward=0.01), goes_on=True, away_s=2.0)
    on_the_way = steps.is_slow
    steps.note(Phases(forward=2.0), goes_on=True, away_s=2.0)
    on_the_device = steps.is_slow

    assert (usual, behind, on_the_way, on_the_device) == (False, False, True, True)


async def test_bytes_on_the_step_stream_are_those_of_its_messages(monkeypatch):
    """They are counted where messages are written: to ask one for its size would write a long prompt twice."""
    written, came = [], []

    class Counted(executor_link.ExecutorLink):
        def _to_bytes(self, message):
            data = super()._to_bytes(message)
            written.append((message.WhichOneof("message"), len(message.SerializeToString())))
            return data

        def _from_bytes(self, data):
            came.append(len(data))
            return super()._from_bytes(data)

    monkeypatch.setattr("scheduler_svc.fleet.ExecutorLink", Counted)
    async with started() as system:
        (member,) = system.app.fleet.members.values()
        await read(system, request("x" * 100, 8, ignore_eos=True))
        await system.idle()
        steps = member.link.steps
        counted = steps.sent_byte_count, steps.received_byte_count

    assert [kind for kind, _ in written].count("attach") == 1
    assert [kind for kind, _ in written].count("plan") == steps.step_count >= 8
    assert counted == (sum(size for _, size in written), sum(came))


async def test_the_time_of_a_prompt_is_counted_once_for_each_request():
    """As that in the queue is: beside each other they have to make up the time to the first token."""
    async with started(executor=replace(FAST, fake_block_count=24)) as system:
        for number in range(5):
            message = request(f"hello {number}", 20, choice_count=4, temperature=1.0, ignore_eos=True)
            await read(system, message)
        meter = system.app.engine.meter

    assert meter.preemption_count > 0, "who has to read its prompt anew would not be among them"
    assert meter.prefill.count == meter.queue.count == meter.first_token.count == 5
    assert meter.prefill.sum_s + meter.queue.sum_s <= meter.first_token.sum_s
