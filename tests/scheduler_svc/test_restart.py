"""One life of a scheduler after the other, on one event loop: what the next one finds, and what it makes of it."""

import asyncio
import socket
from array import array
from dataclasses import replace

import grpc
import pytest

from executor_svc.fake import FakeRunner
from paceline.internal.v1 import executor_pb2 as pb
from paceline.internal.v1 import executor_pb2_grpc
from paceline.v1 import fleet_pb2, inference_pb2
from scheduler_svc.answers import Answer, Terms
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.core.request import Request
from scheduler_svc.journal.errors import JournalError
from scheduler_svc.journal.restored import RestoredChoice, RestoredRequest
from scheduler_svc.journal.store import Store
from scheduler_svc.main import SchedulerApp, load_model
from scheduler_svc.recorder import accepted_record, answer_of
from scheduler_svc.text_stream import TextStream
from scheduler_svc.tokenizer import Tokenizer
from tests.scheduler_svc.test_reattach import named, read_choices
from tests.scheduler_svc.test_service import expected_text, status_of
from tests.system import FAST, request, run_executor, started, until

SLOW = replace(FAST, fake_step_us=20_000)
BAD = "é".encode()[0]  # the fake model never says it by itself


def ask(request_id, text="hello", count=30, **fields):
    message = named(text, count, **fields)
    message.request_id = request_id
    return message


async def test_what_an_executor_had_is_still_its_own_when_the_scheduler_leaves(tmp_path):
    """A scheduler that leaves must not scatter on its last steps what the next one could take over whole."""
    path = tmp_path / "journal.db"
    async with started(1, SLOW, journal=str(path), drain_timeout_s=0) as system:
        calls = [system.generate(ask(f"r{n}")) for n in range(4)]
        for call in calls:
            for _ in range(3):
                await call.read()
        system.add_executor(SLOW, name="e1")
        await system.ready(2)
    restored = Store.read(path)

    assert [choice.executor_id for kept in restored.requests for choice in kept.choices] == ["e0"] * 4
    assert all(kept.ended_at is None for kept in restored.requests)


async def test_requests_for_another_model_are_not_continued(tmp_path):
    """Half an answer of one model and half of another is worse than none."""
    path = tmp_path / "journal.db"
    async with started(1, SLOW, journal=str(path), drain_timeout_s=0) as system:
        call = system.generate(ask("r"))
        for _ in range(3):
            await call.read()
    config = SchedulerConfig(model="fake", listen=("127.0.0.1:0",), journal=str(path))
    name, _, *rest = load_model(config)
    app = SchedulerApp(config, name, "another", *rest)
    (address,) = await app.start()
    stopping = asyncio.Event()
    running = asyncio.create_task(app.run(stopping))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
        generate = channel.unary_stream(
            f"/{stub.full_name}/Generate",
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        error = await status_of(generate(ask("r", resume_from=[(0, 2, 2)])))
    stopping.set()
    await running

    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert "restarted without its journal or with another model" in error.details()
    assert not Store.read(path).requests


async def test_a_scheduler_starts_with_a_full_disk_and_says_that_durability_is_lost(tmp_path, monkeypatch):
    """It may be the full disk that had it killed: not to start would make a bad day worse."""
    path = tmp_path / "journal.db"

    def refuse(*_):
        raise JournalError(path, "the disk is full", "free some space")

    monkeypatch.setattr(Store, "next_epoch", refuse)
    monkeypatch.setattr(Store, "write", refuse)
    monkeypatch.setattr(Store, "rewrite", refuse)
    async with started(journal=str(path)) as system:
        texts, _, _ = await read_choices(system.generate(ask("r")))
        fleet = await system.fleet.ListExecutors(fleet_pb2.ListExecutorsRequest())

    assert texts == [expected_text("hello", 30)]
    assert fleet.durability == fleet_pb2.DURABILITY_LOST


class Clumsy(FakeRunner):
    """Makes a mistake outside of what a step can contain, whenever it computes one token."""

    def run(self, batch):
        output = super().run(batch)
        return replace(output, token_ids=output.token_ids[:0]) if BAD in batch.token_ids else output


async def test_a_request_that_an_executor_cannot_cope_with_ends_and_those_beside_it_do_not():
    """A plan that fails as a whole could be sent for ever, and everybody in it with it."""
    async with started(0) as system:
        config = replace(FAST, scheduler=system.address)
        system.add_executor(runner=Clumsy(config))
        await system.ready()
        good = [asyncio.create_task(read_choices(system.generate(request(f"p{n}", 40)))) for n in range(4)]
        error = await status_of(system.generate(request("é", 40)))
        answers = await asyncio.gather(*good)
        await system.idle()

    assert error.code() is grpc.StatusCode.INTERNAL
    assert "is given up: 2 executors in a row died while they computed it" in error.details()
    assert [answer[0] for answer in answers] == [[expected_text(f"p{n}", 40)] for n in range(4)]


async def test_a_request_of_a_batch_can_be_cancelled_while_it_waits_for_room():
    """Its batch may wait for minutes, and nobody wants this one any more."""
    async with started(1, replace(SLOW, max_num_seqs=1), max_waiting_requests=2) as system:
        calls = [system.generate(request(f"p{n}", 100)) for n in range(2)]
        await until(lambda: system.scheduler.waiting_count == 1)
        batch = system.inference.GenerateBatch()
        await batch.write(inference_pb2.GenerateBatchRequest(index=1, request=ask("b")))
        await until(lambda: "b" in system.app.engine.arrivals._arrivals)
        await asyncio.sleep(0.05)
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="b"))
        answer = await asyncio.wait_for(batch.read(), 5)
        for call in (*calls, batch):
            call.cancel()

    assert answer.error.code == grpc.StatusCode.CANCELLED.value[0]


@pytest.mark.parametrize("keep_results_s", [60.0, 0.2])
async def test_a_result_is_not_kept_for_longer_because_the_scheduler_restarts(tmp_path, keep_results_s):
    """Results take memory; a scheduler that restarts every minute must not collect them."""
    settings = {"journal": str(tmp_path / "journal.db"), "keep_results_s": keep_results_s}
    async with started(**settings) as system:
        whole, _, _ = await read_choices(system.generate(ask("r")))
    await asyncio.sleep(0.3)
    async with started(**settings) as system:
        kept = [answer.request.request_id for answer in system.app.engine.answers]
        if kept:
            again, _, _ = await read_choices(system.generate(ask("r", resume_from=[(0, 10, 10)])))

    assert kept == (["r"] if keep_results_s > 1 else [])
    assert not kept or again[0] == whole[0][10:]


async def test_a_scheduler_that_was_replaced_ends_and_says_so():
    """To wait for executors that will never listen again, with green health, would hide that nothing is served."""
    async with started(1, SLOW) as system:
        call = system.generate(ask("r", count=200))
        for _ in range(3):
            await call.read()
        joined = system.app.fleet.members["e0"].joined
        later = pb.AttachRequest(protocol_version=1, scheduler_id="later", resume=True)
        async with grpc.aio.insecure_channel(joined.address) as channel:
            attachment = executor_pb2_grpc.ExecutorServiceStub(channel).Attach()
            epoch = system.app.fleet.epoch + 1
            await attachment.write(pb.SchedulerMessage(epoch=epoch, incarnation=joined.incarnation, attach=later))
            held = (await attachment.read()).attached.held
            error = await status_of(call)
            await asyncio.wait_for(system.app.engine.is_fenced.wait(), 5)
            await asyncio.wait_for(system.running, 10)

    assert [attempt.request_id for attempt in held] == ["r"]
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "another scheduler has taken over")


def test_a_journal_of_the_release_before_is_still_read():
    """Nobody may lose what was accepted because the next release writes down more of it."""
    request = Request("r", array("I", range(5)), 5, 8)
    terms = Terms(detach_timeout_s=30, is_named=True, operation="chat", method="GenerateBatch")
    record = accepted_record(Answer(request, [TextStream(Tokenizer.bytes(), ())], terms, 100.0, 90.0), "fake")
    before = {name: value for name, value in record.parameters.items() if name not in ("operation", "method", "door_s")}

    def kept(parameters):
        choice = RestoredChoice(1, 0, array("I"), None, "", None, 0, 0, 0, 0)
        data = (1, "r", b"", record.accepted_at, None, None, request.token_ids, parameters, [choice])
        return answer_of(RestoredRequest(*data), Tokenizer.bytes())

    now, old = kept(record.parameters), kept(before)
    assert (now.terms.operation, now.terms.method) == ("chat", "GenerateBatch")
    assert now.accepted_at - now.received_at == pytest.approx(10)
    assert (old.terms.operation, old.terms.method) == ("text_completion", "Generate")
    assert old.accepted_at == old.received_at


@pytest.mark.parametrize(("flags", "parent_id"), [(1, b"c" * 8), (0, b"")])
def test_a_caller_that_does_not_record_is_no_parent_in_a_journal_of_the_release_before_either(flags, parent_id):
    """Nobody would find its span: the request's own would hang in the air wherever its trace is looked at."""
    request = Request("r", array("I", range(5)), 5, 8)
    terms = Terms(detach_timeout_s=30, is_named=True)
    record = accepted_record(Answer(request, [TextStream(Tokenizer.bytes(), ())], terms, 100.0), "fake")
    parameters = record.parameters | {"trace": [(b"t" * 16).hex(), (b"c" * 8).hex(), flags]}
    choice = RestoredChoice(1, 0, array("I"), None, "", None, 0, 0, 0, 0)
    data = (1, "r", b"", record.accepted_at, None, None, request.token_ids, parameters, [choice])
    trace = answer_of(RestoredRequest(*data), Tokenizer.bytes()).request.trace

    assert (trace.trace_id, trace.parent_id) == (b"t" * 16, parent_id)
    assert trace.span_id not in (b"c" * 8, b"")


@pytest.mark.parametrize("stays", [True, False])
async def test_what_has_to_be_computed_again_after_a_restart_is_counted(tmp_path, stays):
    """It is what an executor that did not come back costs; one that is still there costs nothing."""
    address = f"unix:{tmp_path}/scheduler"
    settings = {"journal": str(tmp_path / "journal.db"), "drain_timeout_s": 0, "listen": (address,)}
    config = replace(SLOW, scheduler=address, executor_id="e0", drain_timeout_s=1)
    async with started(0, **settings) as system:
        executor = asyncio.create_task(run_executor(config, FakeRunner(config)))
        await system.ready()
        call = system.generate(ask("r"))
        messages = [await call.read() for _ in range(6)]
    if not stays:
        executor.cancel()
        await asyncio.gather(executor, return_exceptions=True)
        executor = asyncio.create_task(run_executor(config, FakeRunner(config)))
    async with started(0, **settings) as system:
        place = (0, messages[-1].output_token_count, messages[-1].text_length)
        texts, _, _ = await read_choices(system.generate(ask("r", resume_from=[place])))
        recomputed_count = system.app.engine.meter.recomputed_token_count
        executor.cancel()
        await asyncio.gather(executor, return_exceptions=True)

    assert "".join(message.text for message in messages) + texts[0] == expected_text("hello", 30)
    known_count = len("hello") + messages[-1].output_token_count
    assert recomputed_count == 0 if stays else known_count - 1 <= recomputed_count < len("hello") + 30


async def test_requests_wait_for_an_owner_that_does_not_answer_and_then_go_elsewhere(tmp_path):
    """Its machine may be slow to come back, and has everything; but nobody waits for it for ever."""
    settings = {"journal": str(tmp_path / "journal.db"), "drain_timeout_s": 0, "lease_s": 30.0, "resume_wait_s": 1.0}
    address = f"unix:{tmp_path}/e0"
    async with started(0, **settings) as system:
        system.add_executor(replace(SLOW, listen=address), name="e0")
        await system.ready()
        call = system.generate(ask("r"))
        messages = [await call.read() for _ in range(6)]

    silent = socket.socket(socket.AF_UNIX)  # takes connections, and never a word of what comes over them
    silent.bind(address.removeprefix("unix:"))
    silent.listen()
    async with started(0, **settings) as system:
        system.add_executor(SLOW, name="e1")
        await until(lambda: "e1" in system.scheduler.executors)
        place = (0, messages[-1].output_token_count, messages[-1].text_length)
        reading = asyncio.create_task(read_choices(system.generate(ask("r", resume_from=[place]))))
        await asyncio.sleep(0.4)
        waited_for = list(system.scheduler.absent)
        texts, _, _ = await reading
    silent.close()

    assert waited_for == ["e0"]
    assert "".join(message.text for message in messages) + texts[0] == expected_text("hello", 30)
