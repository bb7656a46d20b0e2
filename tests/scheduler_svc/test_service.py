"""The scheduler as its callers meet it: over gRPC, with executors that come, go, fail and fall silent."""

import asyncio
import threading
import time
from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from executor_svc.config import ExecutorConfig
from executor_svc.fake import FakeRunner, next_token
from paceline.v1 import fleet_pb2, inference_pb2
from scheduler_svc import wire
from scheduler_svc.admission import Admission
from scheduler_svc.scaling_lease import ScalingLease
from scheduler_svc.service import InferenceService
from tests.system import FAST, request, run_executor, started, until

SLOW = replace(FAST, fake_step_us=20_000)


def expected_text(prompt, count):
    known = list(prompt.encode())
    for _ in range(count):
        known.append(next_token(known))
    return bytes(known[-count:]).decode()


async def read_text(call):
    return "".join([message.text async for message in call])


async def status_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_text(call)
    return caught.value


async def test_streams_what_the_model_says_and_accounts_for_it():
    """The first message says that the request is in, the last one why it ended and what it took."""
    async with started() as system:
        messages = [message async for message in system.generate(request("hello", 20, request_id="r"))]

    first, *chunks = messages
    assert (first.request_id, first.prompt_token_count) == ("r", 5)
    assert "".join(chunk.text for chunk in chunks) == expected_text("hello", 20)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [0] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (chunks[-1].output_token_count, chunks[-1].text_length) == (20, 20)
    usage = chunks[-1].usage
    assert (usage.prompt_token_count, usage.output_token_count, usage.recomputation_count) == (5, 20, 0)
    assert 0 < usage.first_token_us <= usage.total_us


async def test_a_stop_string_ends_the_text_before_it_and_frees_the_blocks():
    """The stop string is found in the text, tokens late; not one character of it may reach the user."""
    whole = expected_text("hello", 40)
    stop = whole[20:23]
    async with started() as system:
        messages = [m async for m in system.generate(request("hello", 40, stop=[stop]))]
        await system.idle()

    assert "".join(message.text for message in messages) == whole[: whole.index(stop)]
    assert messages[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
    assert messages[-1].usage.output_token_count == whole.index(stop) + 3


async def test_many_requests_under_memory_pressure_all_get_their_own_text():
    """Batching, chunking and preemption are invisible: each stream is what the request alone would have got."""
    tight = replace(FAST, fake_block_count=20, max_num_batched_tokens=16)
    async with started(2, tight) as system:
        prompts = [f"prompt {number} " * (1 + number % 4) for number in range(24)]
        texts = await asyncio.gather(*(read_text(system.generate(request(p, 25))) for p in prompts))
        await system.idle()

    assert texts == [expected_text(prompt, 25) for prompt in prompts]


async def test_ending_the_call_frees_the_request_within_a_step():
    """A user who goes away must not cost anybody else anything."""
    async with started(1, SLOW) as system:
        call = system.generate(request("hello", 200))
        await call.read()
        assert system.scheduler.request_count == 1
        call.cancel()
        await until(lambda: not system.scheduler.request_count, timeout_s=1)
        await system.idle()


async def test_cancel_ends_the_stream_of_the_request():
    """An operator, or another connection of the user, can end a request by its id; unknown ids are no error."""
    async with started(1, SLOW) as system:
        call = system.generate(request("hello", 200, request_id="r"))
        await call.read()
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="r"))
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="unknown"))
        error = await status_of(call)
        await system.idle()

    assert (error.code(), error.details()) == (grpc.StatusCode.CANCELLED, "request 'r' was cancelled")


async def test_the_deadline_of_the_call_is_the_deadline_of_the_request():
    """Nobody waits for the answer any more: computing it would only slow down the others."""
    async with started(1, SLOW) as system:
        error = await status_of(system.generate(request("hello", 200), timeout=0.3))
        await until(lambda: not system.scheduler.request_count, timeout_s=1)
        await system.idle()

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_request_can_be_cancelled_while_it_is_still_at_the_door():
    """Tokenizing a long prompt takes a while; a cancellation that comes meanwhile must not be lost."""
    async with started(1, SLOW) as system:
        holding = threading.Event()
        tokenizer = system.app.door._tokenizer
        encode = tokenizer.encode
        tokenizer.encode = lambda text: holding.wait(10) and encode(text)
        call = system.generate(request("hello", 200, request_id="r"))
        reading = asyncio.create_task(status_of(call))
        await until(lambda: "r" in system.app.engine.arrivals._arrivals)
        again = asyncio.create_task(status_of(system.generate(request("hello", 200, request_id="r"))))
        await asyncio.sleep(0.05)
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="r"))
        holding.set()
        errors = await asyncio.gather(reading, again)

    assert [error.code() for error in errors] == [grpc.StatusCode.CANCELLED] * 2


async def test_a_deadline_is_forgotten_with_its_request():
    """Requests with an hour of time that end in a second must not be kept for an hour."""
    async with started() as system:
        for _ in range(100):
            await read_text(system.generate(request("hello", 1), timeout=3600))

        assert len(system.scheduler._moments._heap) < 50


async def test_a_full_queue_answers_at_once_and_says_when_to_retry():
    """Overload must be visible to clients immediately, not as a time-out minutes later."""
    async with started(1, replace(SLOW, max_num_seqs=1), max_waiting_requests=2) as system:
        calls = [system.generate(request("hello", 100)) for _ in range(3)]
        await asyncio.gather(*(call.read() for call in calls))
        error = await status_of(system.generate(request("hello", 100)))
        for call in calls:
            call.cancel()

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 requests are waiting, the limit is 2" in error.details()
    retry = error_details_pb2.RetryInfo()
    assert rpc_status.from_call(error).details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1000


async def test_a_batch_larger_than_the_queue_is_answered_whole():
    """`GenerateBatch` waits for room where `Generate` would be refused; one bad request disturbs no other."""
    async with started(1, FAST, max_waiting_requests=4) as system:
        call = system.inference.GenerateBatch()
        for index in range(40):
            bad = index == 7
            message = request("" if bad else f"p{index}", 10)
            await call.write(inference_pb2.GenerateBatchRequest(index=index, request=message))
        await call.done_writing()
        answers = {answer.index: answer async for answer in call}
        await system.idle()

    assert sorted(answers) == list(range(40))
    assert answers[7].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    good = {index: answer.output.choices[0].text for index, answer in answers.items() if index != 7}
    assert good == {index: expected_text(f"p{index}", 10) for index in good}


async def test_ending_a_batch_frees_all_of_its_requests():
    """What nobody will read must not be computed, whether it runs, waits or has not begun."""
    async with started(1, SLOW) as system:
        call = system.inference.GenerateBatch()
        for index in range(30):
            await call.write(inference_pb2.GenerateBatchRequest(index=index, request=request(f"p{index}", 100)))
        await until(lambda: system.scheduler.request_count > 10)
        call.cancel()
        await until(lambda: not system.scheduler.request_count, timeout_s=2)
        await system.idle()


class UnreadCall:
    """The server's side of a batch whose caller sends and does not read, until it is told to."""

    def __init__(self, count):
        self.reading = asyncio.Event()
        self.answers = []
        self._messages = [
            inference_pb2.GenerateBatchRequest(index=index, request=request(f"p{index}", 2)) for index in range(count)
        ]

    async def read(self):
        return self._messages.pop(0) if self._messages else grpc.aio.EOF

    async def write(self, answer):
        await self.reading.wait()
        self.answers.append(answer)

    def time_remaining(self):
        return None

    def invocation_metadata(self):
        return ()


async def test_a_batch_that_nobody_reads_stops_running(monkeypatch):
    """Answers that wait for their reader take memory; an unread batch must not take all of it."""
    monkeypatch.setattr("scheduler_svc.service._BATCH_REQUESTS", 5)
    async with started() as system:
        accepted = []
        submit = system.app.engine.submit
        system.app.engine.submit = lambda made, *rest: accepted.append(made) or submit(made, *rest)
        admission = Admission(system.app.door, system.app.engine, system.app.fleet, ScalingLease())
        service = InferenceService(admission, system.app.engine, system.app.fleet, inference_pb2.Model())
        call = UnreadCall(20)
        serving = asyncio.create_task(service.GenerateBatch(None, call))
        await until(lambda: len(accepted) == 5)
        await system.idle()
        await asyncio.sleep(0.1)
        assert len(accepted) == 5
        call.reading.set()
        await serving

    assert sorted(answer.index for answer in call.answers) == list(range(20))


async def test_a_mistake_of_ours_in_one_answer_ends_its_batch(monkeypatch):
    """An index without an answer would leave its caller to find out that something is missing."""

    async def fails(self, reader):
        raise KeyError(reader.answer.request.request_id)

    monkeypatch.setattr(InferenceService, "whole", fails)
    async with started() as system:
        call = system.inference.GenerateBatch()
        await call.write(inference_pb2.GenerateBatchRequest(index=0, request=request("hello", 4)))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(call.read(), 20)

    assert ended.value.code() is grpc.StatusCode.INTERNAL
    assert "KeyError" in ended.value.details()


async def test_a_batch_with_a_repeated_index_is_refused():
    """Two answers with one index could not be told apart."""
    async with started() as system:
        call = system.inference.GenerateBatch()
        for _ in range(2):
            await call.write(inference_pb2.GenerateBatchRequest(index=3, request=request()))
        with pytest.raises(grpc.aio.AioRpcError, match="index 3 was used twice") as caught:
            [answer async for answer in call]
        await system.idle()

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_refuses_another_request_under_a_running_id():
    """Two requests under one id could not be cancelled apart."""
    async with started(1, SLOW) as system:
        call = system.generate(request("hello", 100, request_id="r"))
        await call.read()
        error = await status_of(system.generate(request("hello!", 100, request_id="r")))
        call.cancel()

    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert "another request with the id 'r' is running; choose another request_id" in error.details()


async def test_an_id_may_be_used_again_as_soon_as_its_result_is_not_kept_any_more():
    """The end of the first call's handler must not touch the second request, which has the same id."""
    async with started(1, replace(FAST, fake_step_us=2000), keep_results_s=0.0) as system:
        for _ in range(20):
            first = system.generate(request("hello", 3, request_id="r"))
            while not (await first.read()).finish_reason:
                pass
            assert await read_text(system.generate(request("hello", 3, request_id="r"))) == expected_text("hello", 3)


async def test_an_empty_fleet_may_start_again_with_other_limits():
    """Operators change --max-model-len by restarting executors; the scheduler must not insist on the old one."""
    async with started(1) as system:
        next(iter(system.tasks)).cancel()
        await until(lambda: not system.scheduler.executors)
        await system.fleet.Join(join_request("e0", incarnation=5, model={"context_length": 64}, draining=False))
        model = (await system.inference.GetModel(inference_pb2.GetModelRequest())).model

    assert model.context_length == 64


async def test_refuses_what_the_cache_can_never_hold():
    """The context length would allow it, the cache does not: waiting would be for ever."""
    async with started(1, replace(FAST, fake_block_count=4)) as system:
        error = await status_of(system.generate(request("hello", 100)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "needs up to 26 cache blocks" in error.details()


async def test_refuses_text_that_is_not_utf8():
    """gRPC alone would answer `INTERNAL` without a reason."""
    async with started() as system:
        async with grpc.aio.insecure_channel(system.address) as channel:
            method = channel.unary_stream("/paceline.v1.InferenceService/Generate", lambda data: data, bytes)
            with pytest.raises(grpc.aio.AioRpcError, match="a text field is not valid UTF-8") as caught:
                [message async for message in method(b"\x1a\x02\xff\xfe")]

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_slow_reader_finds_larger_chunks_and_holds_nobody_up():
    """Generation never waits for a reader; what it missed comes together."""
    async with started(1, replace(FAST, fake_step_us=100)) as system:
        slow = system.generate(request("slow", 60))
        await slow.read()
        fast = await read_text(system.generate(request("fast", 60)))
        await system.idle()
        text = await read_text(slow)

    assert fast == expected_text("fast", 60)
    assert text == expected_text("slow", 60)


async def test_a_lost_executor_costs_a_pause_and_no_token():
    """The stream goes on, on another executor, with exactly the tokens that the first would have given."""
    async with started(2, SLOW) as system:
        calls = [system.generate(request(f"p{number}", 40)) for number in range(6)]
        begun = [[await call.read() for _ in range(4)] for call in calls]
        victim, *_ = system.tasks
        victim.cancel()
        texts = [await read_text(call) for call in calls]

    for number, (messages, text) in enumerate(zip(begun, texts, strict=True)):
        assert "".join(message.text for message in messages) + text == expected_text(f"p{number}", 40)


async def test_an_executor_that_sends_nonsense_costs_only_its_attachment(monkeypatch):
    """A bug in one executor, or on the way to it, must not end the scheduler and everybody's streams."""
    results = []

    def garbled(message):
        results.append(message)
        if len(results) == 3:
            message.token_ids += b"x"
        elif len(results) == 6:
            raise RuntimeError("a bug")
        return decode(message)

    decode = wire.decode_result
    monkeypatch.setattr(wire, "decode_result", garbled)
    async with started() as system:
        messages = [message async for message in system.generate(request("hello", 20))]
        await system.idle()

    assert "".join(message.text for message in messages) == expected_text("hello", 20)
    assert messages[-1].usage.recomputation_count == 2


async def test_a_second_process_of_one_name_has_to_wait():
    """Two executors under one name would throw each other out at every renewal, and their requests with them."""
    async with started(1, SLOW) as system:
        call = system.generate(request("hello", 20))
        first = await call.read()
        with pytest.raises(grpc.aio.AioRpcError, match="another process is attached as executor 'e0'") as caught:
            await system.fleet.Join(join_request("e0", incarnation=99))
        rest = [message async for message in call]

    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert first.prompt_token_count == 5
    assert rest[-1].usage.recomputation_count == 0


async def test_a_replaced_process_does_not_come_back():
    """A late call of a dead process must not throw out the one that took its place."""
    async with started(0) as system:
        await system.fleet.Join(join_request("e", incarnation=1))
        await system.fleet.Join(join_request("e", incarnation=2))
        with pytest.raises(grpc.aio.AioRpcError, match="was replaced by a later process"):
            await system.fleet.Join(join_request("e", incarnation=1))

        assert system.app.fleet.members["e"].joined.incarnation == 2


async def test_the_schedulers_own_stall_does_not_cost_executors_their_lease():
    """Who did not listen cannot say that the others were silent."""
    async with started(1, SLOW, lease_s=0.6) as system:
        call = system.generate(request("hello", 30))
        await call.read()
        time.sleep(1.5)  # noqa: ASYNC251  the stall that this is about
        rest = [message async for message in call]

    assert rest[-1].usage.recomputation_count == 0


async def test_requests_that_wait_are_served_when_everything_is_stopped_at_once():
    """`docker stop` sends every process the same signal: what was accepted must still end well."""
    stopping = asyncio.Event()
    async with started(0) as system:
        config = replace(SLOW, scheduler=system.address, executor_id="e", max_num_seqs=1)
        leaving = asyncio.create_task(run_executor(config, FakeRunner(config), stopping))
        await system.ready()
        calls = [system.generate(request(f"p{number}", 8)) for number in range(3)]
        for call in calls:
            await call.read()
        stopping.set()
        system.stopping.set()
        texts = await asyncio.gather(*(read_text(call) for call in calls))
        await asyncio.wait_for(leaving, 10)

    assert texts == [expected_text(f"p{number}", 8) for number in range(3)]


async def test_what_cannot_end_in_time_is_cut_off_with_the_reason():
    """A client that is cut off learns that it may send the request again, and how far it had come."""
    async with started(1, SLOW, drain_timeout_s=0.3) as system:
        call = system.generate(request("hello", 200, request_id="r"))
        await call.read()
        system.stopping.set()
        error = await status_of(call)

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "the scheduler shut down before request 'r' had ended" in error.details()


async def test_requests_wait_while_no_executor_is_left():
    """An accepted request is not lost with the last executor: it goes on when one joins."""
    async with started(1, SLOW) as system:
        call = system.generate(request("hello", 20))
        first = [await call.read() for _ in range(5)]
        next(iter(system.tasks)).cancel()
        await until(lambda: not system.scheduler.executors)
        assert system.scheduler.waiting_count == 1
        system.add_executor(name="late")
        rest = [message async for message in call]

    assert "".join(message.text for message in first + rest) == expected_text("hello", 20)
    assert rest[-1].usage.recomputation_count == 1


async def test_a_draining_executor_finishes_its_requests_and_is_let_go():
    """SIGTERM on an executor is not a failure: what runs there ends there, what comes goes elsewhere."""
    async with started(1, SLOW) as system:
        stopping = asyncio.Event()
        config = replace(SLOW, scheduler=system.address, executor_id="leaver")
        leaving = asyncio.create_task(run_executor(config, FakeRunner(config), stopping))
        await system.ready(2)
        calls = [system.generate(request(f"p{number}", 15)) for number in range(4)]
        begun = [await call.read() for call in calls]
        stopping.set()
        await until(lambda: system.scheduler.executors["leaver"].draining)
        late = read_text(system.generate(request("late", 5)))
        assert await late == expected_text("late", 5)
        rests = [[message async for message in call] for call in calls]
        await asyncio.wait_for(leaving, 5)
        await system.ready(1)

    assert [message.prompt_token_count for message in begun] == [2] * 4
    for number, messages in enumerate(rests):
        assert "".join(message.text for message in messages) == expected_text(f"p{number}", 15)
        assert messages[-1].usage.recomputation_count == 0


class StuckRunner(FakeRunner):
    """Stops coming back from a step, as a wedged device does, until it is released."""

    def __init__(self, config):
        super().__init__(config)
        self.stuck = threading.Event()
        self.released = threading.Event()

    def run(self, batch):
        if self.stuck.is_set():
            self.released.wait(30)
        return super().run(batch)


async def test_a_wedged_device_is_given_up_though_its_process_answers():
    """Heartbeats only say that a process lives; the progress limit says that its device does."""
    async with started(0, step_timeout_s=0.5) as system:
        runner = StuckRunner(FAST)
        wedged = system.add_executor(runner=runner, name="wedged")
        await system.ready(1)
        call = system.generate(request("hello", 200))
        first = [await call.read() for _ in range(3)]
        runner.stuck.set()
        await until(lambda: not system.scheduler.executors)
        system.add_executor(name="healthy")
        rest = [message async for message in call]
        with pytest.raises(Exception, match="got stuck in a step; it must restart"):
            await asyncio.wait_for(asyncio.shield(wedged), 5)
        runner.released.set()

    assert "".join(message.text for message in first + rest) == expected_text("hello", 200)


async def test_a_silent_executor_loses_its_lease():
    """A machine that vanishes closes no connection; silence is the only sign."""
    async with started(0, lease_s=0.6) as system:
        join = join_request("ghost", address="127.0.0.1:9")  # nobody is there
        await system.fleet.Join(join)
        assert len((await system.fleet.ListExecutors(fleet_pb2.ListExecutorsRequest())).executors) == 1
        await until(lambda: not system.app.fleet.members, timeout_s=5)


PRIME_SIZES = [{"block_size": 1000}, {"block_size": 1000003}]


def join_request(name, **fields):
    model = {
        "name": "fake",
        "fingerprint": "fake",
        "context_length": 8192,
        "vocabulary_size": 257,
        "end_token_ids": [256],
    }
    capacity = {"layer_groups": [{"block_size": 4}], "block_count": 8, "slot_count": 2, "step_token_count": 4}
    values = {
        "executor_id": name,
        "incarnation": 1,
        "address": "127.0.0.1:9",
        "protocol_version": 1,
        "model": model | fields.pop("model", {}),
        "capacity": capacity | fields.pop("capacity", {}),
    }
    return fleet_pb2.JoinRequest(**(values | fields))


async def test_an_executor_of_the_next_release_is_driven_in_the_language_of_this_one(monkeypatch):
    """A fleet is upgraded one process after the other, and everybody serves meanwhile."""
    monkeypatch.setattr("executor_svc.membership.PROTOCOL_VERSION", 2)
    monkeypatch.setattr("executor_svc.service.PROTOCOL_VERSION", 2)
    async with started(1) as system:
        assert next(iter(system.app.fleet.members.values())).joined.protocol_version == 2
        assert await read_text(system.generate(request("hello", 5))) == expected_text("hello", 5)


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"model": {"fingerprint": "abc"}}, "FAILED_PRECONDITION", "start both with the same folder"),
        ({"protocol_version": 2}, "FAILED_PRECONDITION", "speaks version 2 of the step stream.* 1 to 1; run"),
        ({"model": {"context_length": 99}}, "FAILED_PRECONDITION", "start all executors with the same --max-model-len"),
        ({"capacity": {"layer_groups": []}}, "INVALID_ARGUMENT", "8 blocks for 0 layer groups"),
        ({"capacity": {"layer_groups": [{"window": 9}]}}, "INVALID_ARGUMENT", "blocks hold 0 tokens"),
        ({"capacity": {"layer_groups": PRIME_SIZES}}, "INVALID_ARGUMENT", "end together only every 1000003000 tokens"),
        ({"capacity": {"step_token_count": 1}}, "INVALID_ARGUMENT", "2 slots and steps of 1 tokens"),
        ({"incarnation": 0}, "INVALID_ARGUMENT", "incarnation is missing"),
        ({"address": ""}, "INVALID_ARGUMENT", "address is missing"),
        ({"executor_id": "two words"}, "INVALID_ARGUMENT", "executor_id 'two words' must be"),
    ],
)
async def test_refuses_an_executor_that_cannot_serve_here(fields, code, reason):
    """Another model, release or limit would give users wrong tokens, or nothing; the executor must learn why."""
    async with started() as system:
        with pytest.raises(grpc.aio.AioRpcError, match=reason) as caught:
            await system.fleet.Join(join_request(fields.pop("executor_id", "other"), **fields))
        assert len(system.scheduler.executors) == 1

    assert caught.value.code().name == code


async def test_an_executor_that_is_refused_ends_with_the_reason():
    """An executor of another model must not keep knocking for ever."""
    async with started() as system:
        config = ExecutorConfig(model="fake", scheduler=system.address, max_model_len=100)
        with pytest.raises(Exception, match="start all executors with the same --max-model-len"):
            await asyncio.wait_for(run_executor(config, FakeRunner(config)), 10)


async def test_get_model_describes_the_model_and_who_serves_it():
    """Clients size their prompts by it, and wait for a first executor with it."""
    async with started(0) as system:
        before = (await system.inference.GetModel(inference_pb2.GetModelRequest())).model
        system.add_executor()
        await system.ready()
        after = (await system.inference.GetModel(inference_pb2.GetModelRequest())).model

    assert (before.name, before.executor_count, before.context_length) == ("fake", 0, 0)
    assert (after.executor_count, after.context_length, after.vocabulary_size) == (1, 8192, 257)
    assert list(after.end_token_ids) == [256]
    assert after.has_chat_template
