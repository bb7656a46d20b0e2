"""Readers that come, go and come back: one request behind one id, read from any place, by anybody."""

import asyncio
import re
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, generate_latest

from paceline.v1 import fleet_pb2, inference_pb2
from scheduler_svc.journal.errors import JournalError
from scheduler_svc.journal.store import Store
from tests.scheduler_svc.test_service import expected_text, status_of
from tests.system import FAST, request, started, until

SLOW = replace(FAST, fake_step_us=20_000)


def named(text="hello", count=20, *, resume_from=(), detach_timeout_s=30, **fields):
    """A request under the id `r` that outlives its call; `resume_from` are (choice, tokens, code points)."""
    message = request(text, count, request_id="r", **fields)
    message.detach_timeout_s = detach_timeout_s
    for choice, token_count, text_length in resume_from:
        message.resume_from.add(choice=choice, output_token_count=token_count, text_length=text_length)
    return message


async def read_choices(call, count=1):
    """(text, tokens, finish reason, messages) of each choice."""
    texts, tokens, reasons = [""] * count, [b""] * count, [0] * count
    async for message in call:
        texts[message.choice] += message.text
        tokens[message.choice] += message.token_ids
        reasons[message.choice] = message.finish_reason or reasons[message.choice]
    return texts, tokens, reasons


async def test_the_same_request_is_run_once_and_read_by_all():
    """A client that is not sure whether its request arrived sends it again, and must not pay twice."""
    async with started(1, SLOW) as system:
        calls = [system.generate(named()) for _ in range(3)]
        answers = await asyncio.gather(*(read_choices(call) for call in calls))
        late = await read_choices(system.generate(named()))
        executor = system.scheduler.executors["e0"]
        step_count = executor.step

    assert [answer[0] for answer in (*answers, late)] == [[expected_text("hello", 20)]] * 4
    assert step_count <= 21


@pytest.mark.parametrize("choice_count", [1, 3])
async def test_a_reader_goes_on_from_any_place_without_loss_or_repetition(choice_count):
    """A line may break between any two messages; what was read stays read."""
    async with started() as system:
        fields = {"choice_count": choice_count, "seed": 7, "temperature": 1.0}
        messages = [message async for message in system.generate(named(**fields))]
        whole = await read_choices(system.generate(named(**fields)), choice_count)
        for cut in range(0, len(messages), 2 * choice_count):
            places, texts, tokens = {}, [""] * choice_count, [b""] * choice_count
            for message in messages[:cut]:
                if message.output_token_count:
                    places[message.choice] = (message.choice, message.output_token_count, message.text_length)
                texts[message.choice] += message.text
                tokens[message.choice] += message.token_ids
            rest = await read_choices(system.generate(named(resume_from=places.values(), **fields)), choice_count)

            assert [a + b for a, b in zip(texts, rest[0], strict=True)] == whole[0]
            assert [a + b for a, b in zip(tokens, rest[1], strict=True)] == whole[1]
            assert rest[2] == whole[2]


async def test_a_reader_finds_the_end_where_a_stop_string_was_found_while_it_was_away():
    """The text that a stop string ended must not grow by what the model had said beyond it."""
    whole = expected_text("hello", 40)
    async with started(1, SLOW) as system:
        call = system.generate(named(count=40, stop=[whole[20:23]]))
        first = await call.read()
        second = await call.read()
        call.cancel()
        await until(lambda: not system.scheduler.request_count)
        place = (0, second.output_token_count, second.text_length)
        texts, _, _ = await read_choices(system.generate(named(count=40, stop=[whole[20:23]], resume_from=[place])))

    assert first.request_id == "r"
    assert second.text + texts[0] == whole[:20]


async def test_a_request_that_nobody_reads_runs_on_and_is_cancelled_when_nobody_comes_back():
    """A cut line looks like a client that left; it gets the time that it asked for, and not more."""
    async with started(1, SLOW) as system:
        call = system.generate(named(count=200, detach_timeout_s=1))
        await call.read()
        call.cancel()
        await asyncio.sleep(0.4)
        running = system.scheduler.request_count
        again = system.generate(named(count=200, detach_timeout_s=1))
        for _ in range(20):
            await again.read()
        again.cancel()
        await asyncio.sleep(0.8)
        still_running = system.scheduler.request_count
        await system.idle()
        late = await status_of(system.generate(named(count=200, resume_from=[(0, 1, 1)])))
        anew, _, _ = await read_choices(system.generate(named(count=30)))

    assert (running, still_running) == (1, 1)
    assert late.code() is grpc.StatusCode.DATA_LOSS
    assert anew == [expected_text("hello", 30)]


async def test_cancel_ends_a_request_that_nobody_reads():
    """Whoever left for good says so, and frees its blocks at once."""
    async with started(1, SLOW) as system:
        call = system.generate(named(count=200))
        await call.read()
        call.cancel()
        await asyncio.sleep(0.1)
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="r"))
        await system.idle()


async def test_a_request_ends_although_its_reader_does_not_read():
    """Generation waits for no reader: one that sleeps holds neither blocks nor a slot."""
    async with started() as system:
        call = system.generate(named(count=200))
        await call.read()
        await system.idle()
        texts, _, _ = await read_choices(call)

    assert texts == [expected_text("hello", 200)]


async def test_results_are_kept_for_as_long_as_was_asked_and_no_longer():
    """A reader that comes back late is told that it is too late, not given another answer."""
    async with started(keep_results_s=0.3) as system:
        whole, _, _ = await read_choices(system.generate(named()))
        kept, _, _ = await read_choices(system.generate(named(resume_from=[(0, 5, 5)])))
        await asyncio.sleep(0.5)
        assert not list(system.app.engine.answers)
        error = await status_of(system.generate(named(resume_from=[(0, 5, 5)])))

    assert kept[0] == whole[0][5:]
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert "the answer to request 'r' cannot be continued: its result has expired, nobody came back" in error.details()


async def test_answers_without_an_id_of_the_callers_are_not_kept():
    """Nobody could ask for them; they would fill the memory of a busy server."""
    async with started() as system:
        await read_choices(system.generate(request()))
        assert not list(system.app.engine.answers)


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (named(resume_from=[(0, 30, 3)]), "DATA_LOSS", "choice 0 has 20 tokens and 20 characters here, resume_from na"),
        (named(resume_from=[(0, 3, 90)]), "DATA_LOSS", "resume_from names 3 and 90; send it again from the start"),
        (named(resume_from=[(1, 3, 3)]), "INVALID_ARGUMENT", "resume_from names choice 1, the request has 1"),
        (named(resume_from=[(0, 3, 3)] * 2), "INVALID_ARGUMENT", "resume_from has 2 entries for 1 choices"),
        (named("other"), "ALREADY_EXISTS", "another request with the id 'r' has ended and is kept; choose another"),
        (named(seed=3), "ALREADY_EXISTS", "another request with the id 'r'"),
        (named(detach_timeout_s=3601), "INVALID_ARGUMENT", "detach_timeout_s is 3601, at most 3600 are possible"),
    ],
)
async def test_refuses_a_place_that_is_not_there_and_an_id_that_is_anothers(message, code, reason):
    """Whatever a client mixes up, it must not be given the text of another answer."""
    if code == "INVALID_ARGUMENT" and "detach" in reason:
        message.request_id = "new"
    async with started() as system:
        await read_choices(system.generate(named()))
        error = await status_of(system.generate(message))

    assert error.code() is grpc.StatusCode[code]
    assert reason in error.details()


async def test_refuses_to_detach_a_request_that_nobody_could_find_again():
    """It would run on for nobody."""
    message = request()
    message.detach_timeout_s = 30
    async with started() as system:
        error = await status_of(system.generate(message))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "detach_timeout_s is 30, but without a request_id nobody could come back; set one" in error.details()


async def test_a_batch_that_is_cut_finds_its_requests_when_it_is_sent_again():
    """A batch of thousands must not begin again because its line broke once."""
    async with started(1, SLOW) as system:
        messages = []
        for index in range(6):
            message = named(f"p{index}", 30)
            message.request_id = f"b{index}"
            messages.append(inference_pb2.GenerateBatchRequest(index=index, request=message))
        call = system.inference.GenerateBatch()
        for message in messages:
            await call.write(message)
        await until(lambda: system.scheduler.request_count == 6)
        call.cancel()
        await asyncio.sleep(0.2)
        again = system.inference.GenerateBatch(iter(messages))
        outputs = {answer.index: answer.output.choices[0].text async for answer in again}
        step_count = system.scheduler.executors["e0"].step

    assert outputs == {index: expected_text(f"p{index}", 30) for index in range(6)}
    assert step_count < 45


@pytest.mark.parametrize("finish_within_s", [0, 30])
async def test_drain_lets_an_executor_go_and_nobody_notices(finish_within_s):
    """An executor is exchanged for one of the next release in the middle of everybody's answers."""
    async with started(2, replace(SLOW, max_num_seqs=16)) as system:
        calls = [system.generate(request(f"p{n}", 40)) for n in range(12)]
        reading = [asyncio.create_task(read_choices(call)) for call in calls]
        await until(lambda: all(len(e.running) > 2 for e in system.scheduler.executors.values()))
        leaver = next(task for task in system.tasks if task.get_name() == "e0")
        await system.fleet.Drain(fleet_pb2.DrainRequest(executor_id="e0", finish_within_s=finish_within_s))
        await asyncio.wait_for(leaver, 20)
        answers = await asyncio.gather(*reading)
        await until(lambda: list(system.app.fleet.members) == ["e1"])
        with pytest.raises(grpc.aio.AioRpcError, match="no executor 'e0' has joined; there are: e1") as unknown:
            await system.fleet.Drain(fleet_pb2.DrainRequest(executor_id="e0"))

    assert [answer[0] for answer in answers] == [[expected_text(f"p{n}", 40)] for n in range(12)]
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def durability_metric(system):
    """The state that a scrape says."""
    registry = CollectorRegistry()
    registry.register(system.app.metrics())
    text = generate_latest(registry).decode()
    return re.search(r'^paceline_durability{state="(\w+)"} 1.0$', text, re.MULTILINE)[1].upper()


async def test_serving_goes_on_when_the_journal_cannot_be_written_and_everybody_can_see_it(tmp_path, monkeypatch):
    """A full disk must not stop answers; that they would not survive a restart is what an operator has to know."""
    path = tmp_path / "journal.db"
    refusing = False
    write = Store.write

    def refuse(self, records):
        if refusing:
            raise JournalError(path, "the disk is full", "free some space")
        write(self, records)

    monkeypatch.setattr(Store, "write", refuse)
    async with started(journal=str(path)) as system, grpc.aio.insecure_channel(system.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="paceline.durability")

        async def look():
            fleet = await system.fleet.ListExecutors(fleet_pb2.ListExecutorsRequest())
            assert durability_metric(system) == fleet_pb2.Durability.Name(fleet.durability).removeprefix("DURABILITY_")
            return fleet.durability, (await health.Check(asked)).status

        await read_choices(system.generate(named("before")))
        before = await look()
        refusing = True
        message = named("meanwhile")
        message.request_id = "r2"
        texts, _, _ = await read_choices(system.generate(message))
        lost = await look()

    assert before == (fleet_pb2.DURABILITY_ON, health_pb2.HealthCheckResponse.SERVING)
    assert lost == (fleet_pb2.DURABILITY_LOST, health_pb2.HealthCheckResponse.NOT_SERVING)
    assert texts == [expected_text("meanwhile", 20)]
