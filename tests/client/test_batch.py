"""Many prompts in one call: order, errors of single requests, and connections that break."""

import asyncio
import threading
import time

import grpc
import pytest

from paceline import (
    AsyncClient,
    Choice,
    FinishReason,
    InvalidRequest,
    Output,
    Overloaded,
    ServerError,
    TimedOut,
    Unavailable,
)
from paceline._batch import Batch
from paceline._calls import Attempts
from paceline.errors import error_of
from paceline.v1 import inference_pb2 as pb
from tests.client.line import Line
from tests.client.scripted_server import BROKEN, UNAVAILABLE, Fail, ScriptedServer, answered, failed


def texts(outputs: list[Output]) -> list[str]:
    return [output.text for output in outputs]


def test_returns_outputs_in_the_order_of_the_prompts(client, server):
    """The server answers short requests first; callers zip outputs with their prompts."""
    server.batch_scripts.append(lambda messages: map(answered, reversed(messages)))

    outputs = client.generate_batch(["a", "b", "c"])

    assert texts(outputs) == ["a", "b", "c"]
    assert [output.token_ids for output in outputs] == [(0,), (1,), (2,)]


def test_takes_every_kind_of_prompt_with_its_own_options(client, server):
    """Evaluations mix prompts; an option beside a prompt goes before the one for all."""
    chat = [{"role": "user", "content": "Hi"}]
    client.generate_batch(
        ["a", [1, 2], chat, {"prompt": "d", "max_output_tokens": 9, "request_id": "mine"}, {"messages": chat}],
        max_output_tokens=3,
    )

    requests = [message.request for message in server.batches[0]]
    assert [request.WhichOneof("prompt") for request in requests] == ["text", "token_ids", "chat", "text", "chat"]
    assert [request.stopping.max_output_tokens for request in requests] == [3, 3, 3, 9, 3]
    assert requests[3].request_id == "mine"


def test_tells_the_progress_after_each_request(client, server):
    """A batch may take hours."""
    progress: list[tuple[int, int]] = []
    client.generate_batch(["a", "b", "c"], on_progress=lambda done, total: progress.append((done, total)))

    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_an_empty_batch_asks_nobody(client, server):
    """The edge that a filter upstream produces sooner or later."""
    assert client.generate_batch([]) == []
    assert server.batches == []


def test_sends_only_unfinished_requests_again_after_a_break(client, server):
    """A restart of the server must not cost the outputs of an hour."""
    server.batch_scripts.append(lambda messages: [answered(messages[1], "kept"), UNAVAILABLE])

    assert texts(client.generate_batch(["a", "b", "c"])) == ["a", "kept", "c"]
    first, second = server.batches
    assert [message.index for message in second] == [0, 2]
    assert [message.request.request_id for message in second] == [
        first[0].request.request_id,
        first[2].request.request_id,
    ]


def test_progress_makes_all_retries_available_again(connect, server):
    """A long batch may see many restarts; only a server that gets nothing done is given up."""
    for _ in range(4):
        server.batch_scripts.append(lambda messages: [answered(messages[0]), UNAVAILABLE])

    assert texts(connect(max_retries=1, detach_timeout_s=0).generate_batch(list("abcde"))) == list("abcde")


def test_sends_a_request_again_that_met_a_draining_server(client, server):
    """The server may answer single requests with UNAVAILABLE instead of breaking the stream."""
    server.batch_scripts.append(
        lambda messages: [answered(messages[0]), failed(messages[1], grpc.StatusCode.UNAVAILABLE)]
    )

    assert texts(client.generate_batch(["a", "b"])) == ["a", "b"]
    assert [message.index for message in server.batches[1]] == [1]


def test_an_error_tells_what_happened_last(client, server):
    """A request that met a draining server first and a failing one then failed of the latter."""
    server.batch_scripts.append(lambda messages: [failed(messages[0], grpc.StatusCode.UNAVAILABLE)])
    server.batch_scripts.append(lambda messages: [Fail(grpc.StatusCode.INTERNAL)])

    with pytest.raises(ServerError):
        client.generate_batch(["a"])


def test_raises_the_first_error_by_default(client, server):
    """A mistake in a batch must not be found hours later among its outputs."""
    server.batch_scripts.append(
        lambda messages: [answered(messages[0]), failed(messages[1], grpc.StatusCode.INVALID_ARGUMENT)]
    )

    with pytest.raises(InvalidRequest, match=r"^prompts\[1\]: as scripted \(request mine\)$") as caught:
        client.generate_batch(["a", {"prompt": "b", "request_id": "mine"}, "c"])
    assert caught.value.request_id == "mine"


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (lambda messages: [*map(answered, messages[:2]), UNAVAILABLE], Unavailable, "the scheduler is starting"),
        (lambda messages: map(answered, messages[:2]), ServerError, "without answering"),
        (
            lambda messages: [*map(answered, messages[:2]), failed(messages[2], grpc.StatusCode.RESOURCE_EXHAUSTED)],
            Overloaded,
            "as scripted",
        ),
    ],
)
def test_an_error_that_is_raised_names_the_place_of_its_prompt(connect, server, script, kind, message):
    """The id of the request was made here: it tells the caller nothing about which of ten thousand prompts failed."""
    server.batch_scripts.append(script)

    with pytest.raises(kind, match=rf"^prompts\[2\]: .*{message}"):
        connect(max_retries=0, detach_timeout_s=0).generate_batch(["a", "b", "c"])


def test_a_prompt_that_cannot_be_sent_is_named_before_anything_is(client, server):
    """The second of a thousand prompts has a mistake: the first should not have been paid for."""
    with pytest.raises(InvalidRequest, match=r"^prompts\[1\]: n must be a whole number of choices"):
        client.generate_batch(["a", {"prompt": "b", "n": 0}])
    assert server.batches == []


@pytest.mark.parametrize("on_error", ["raise", "return"])
@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ("Once upon", "the str 'Once upon'"),
        (b"Once", "the bytes b'Once'"),
        ({"prompt": "Once"}, "the dict {'prompt': 'Once'}"),
        (None, "the NoneType None"),
    ],
)
def test_one_prompt_is_not_taken_for_many(client, server, prompts, named, on_error):
    """`generate_batch("Once upon")` would otherwise be nine requests, one for each letter."""
    with pytest.raises(InvalidRequest) as caught:
        client.generate_batch(prompts, on_error=on_error)
    assert caught.value.message == (f"prompts must be a list of prompts, got {named}; put a single prompt into a list")
    assert server.batches == []


def test_each_output_has_the_choices_that_its_prompt_asked_for(client, server):
    """Sampling several answers to many questions is what batches are for."""
    one, three = client.generate_batch(["a", {"prompt": "b", "n": 3}])

    assert one.choices == (Choice(0, "a", (0,), FinishReason.STOP),)
    assert three.choices == tuple(Choice(index, "b", (1,), FinishReason.STOP) for index in range(3))
    assert (three.text, three.token_ids, three.finish_reason) == ("b", (1,), "stop")
    assert three.usage.cached_prompt_token_count == 4


def test_an_output_without_all_choices_is_an_error(client, server):
    """A server from before there were choices answers with one; the caller divides by `n`."""

    def with_two_choices(messages):
        output = answered(messages[0])
        del output.output.choices[2:]
        return [output]

    server.batch_scripts.append(with_two_choices)
    with pytest.raises(ServerError, match=r"answered with 2 choices, but the request has n=3"):
        client.generate_batch(["a"], n=3)


def test_returns_errors_in_the_place_of_outputs_when_asked(client, server):
    """One bad prompt among thousands must not cost the others."""
    server.batch_scripts.append(
        lambda messages: [failed(messages[0], grpc.StatusCode.INTERNAL), *map(answered, messages[1:])]
    )
    progress: list[tuple[int, int]] = []

    outcomes = client.generate_batch(
        ["a", "b", "\ud800"], on_error="return", on_progress=lambda *counts: progress.append(counts)
    )

    assert type(outcomes[0]) is ServerError
    assert outcomes[1].text == "b"
    assert type(outcomes[2]) is InvalidRequest
    assert outcomes[2].message.startswith("prompt has the lone surrogate")
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_keeps_finished_outputs_when_it_gives_up(connect, server):
    """With errors returned, even a server that stays away costs only what it did not answer."""
    server.batch_scripts.append(lambda messages: [answered(messages[0]), UNAVAILABLE])
    server.batch_scripts.append(lambda messages: [UNAVAILABLE])

    client = connect(max_retries=1, detach_timeout_s=0)
    outcomes = client.generate_batch(["a", "b", "c"], on_error="return")

    assert outcomes[0].text == "a"
    assert [type(outcome) for outcome in outcomes[1:]] == [Unavailable, Unavailable]
    sent_ids = [message.request.request_id for message in server.batches[0]]
    assert [outcome.request_id for outcome in outcomes] == sent_ids


@pytest.mark.parametrize(
    ("code", "kind"),
    [(grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded), (grpc.StatusCode.DEADLINE_EXCEEDED, TimedOut)],
)
def test_the_error_of_the_stream_is_the_error_of_what_it_left_open(connect, server, code, kind):
    """Callers handle one request's errors in one place, however they came."""
    server.batch_scripts.append(lambda messages: [Fail(code, "the reason", retry_after_s=1.5)])

    (outcome,) = connect(max_retries=0).generate_batch(["a"], on_error="return")

    assert type(outcome) is kind
    assert (outcome.message, outcome.retry_after_s) == ("the reason", 1.5)


def test_a_request_that_the_server_forgot_is_an_error(client, server):
    """Fewer outputs than prompts would shift every later one to the wrong prompt."""
    server.batch_scripts.append(lambda messages: map(answered, messages[:1]))

    with pytest.raises(ServerError, match="without answering"):
        client.generate_batch(["a", "b"])


def test_an_exception_of_the_progress_callback_ends_the_batch(client, server):
    """It is the caller's way to stop."""

    def stop(done: int, total: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        client.generate_batch(["a", "b"], on_progress=stop)


def test_a_misspelt_option_is_a_type_error(client, server):
    """It is a bug in the program, not in one request: it must not end up among the outcomes."""
    with pytest.raises(TypeError, match="max_tokens"):
        client.generate_batch([{"prompt": "a", "max_tokens": 3}], on_error="return")
    assert server.batches == []


def test_on_error_takes_two_values(client, server):
    """`on_error="ignore"` would otherwise mean the opposite of what it says."""
    with pytest.raises(ValueError, match="'raise' or 'return', got 'ignore'"):
        client.generate_batch(["a"], on_error="ignore")


def test_a_batch_survives_a_restart_that_takes_longer_than_the_retries(connect, server):
    """It has the patience of a stream: what the server had begun, it goes on with."""

    def break_down(messages):
        yield answered(messages[0])
        threading.Thread(target=server.stop).start()
        threading.Timer(0.5, server.start).start()
        threading.Event().wait(0.2)

    server.batch_scripts.append(break_down)

    assert texts(connect(max_retries=0).generate_batch(["a", "b", "c"])) == ["a", "b", "c"]
    first, second = server.batches
    assert second == first[1:]


def test_a_break_before_the_first_output_is_survived_too(connect, server):
    """Long outputs take minutes to come; that none has come does not mean that none is there."""
    server.batch_scripts.extend([lambda messages: [BROKEN]] * 3)

    assert texts(connect(max_retries=0).generate_batch(["a", "b"])) == ["a", "b"]


def test_gives_a_batch_up_when_the_server_stays_away(connect, server):
    """After their detach time-out its requests are gone."""

    def break_down(messages):
        yield answered(messages[0])
        threading.Thread(target=server.stop).start()
        threading.Event().wait(0.2)

    server.batch_scripts.append(break_down)
    begun = time.monotonic()
    kept, lost = connect(detach_timeout_s=1).generate_batch(["a", "b"], on_error="return")

    assert kept.text == "a"
    assert type(lost) is Unavailable
    assert 0.9 < time.monotonic() - begun < 10


def test_a_batch_is_not_patient_with_a_server_that_never_was_there(connect, server):
    """A mistake in the address should be known at once."""
    server.stop()
    begun = time.monotonic()

    with pytest.raises(Unavailable, match="failed to connect"):
        connect(max_retries=1).generate_batch(["a"])
    assert time.monotonic() - begun < 10


def test_the_time_out_ends_a_batch_that_waits_for_its_server(connect, server):
    """`timeout_s` is for the whole batch, the waits included."""
    server.batch_scripts.extend([lambda messages: [BROKEN]] * 99)

    (outcome,) = connect().generate_batch(["a"], on_error="return", timeout_s=0.4)

    assert type(outcome) is TimedOut


def test_a_break_while_the_prompts_are_sent_loses_nothing(connect, server):
    """A server reads a large batch only as it has room, so sending it takes as long as the batch."""
    line = Line(server.target)
    prompts = [f"{index} {'x' * 1000}" for index in range(1000)]
    threading.Timer(0.1, line.cut).start()

    assert texts(connect(line.target, max_retries=0).generate_batch(prompts)) == prompts
    line.close()


async def test_a_call_that_grpc_cancels_by_itself_is_a_break(server: ScriptedServer):
    """With asyncio it does so when the connection breaks while it writes, and asyncio means something else by it."""
    broken = threading.Event()
    server.batch_scripts.append(lambda messages: [answered(messages[0]), broken.wait(10)][:1])
    async with AsyncClient(server.target) as client:
        batch = asyncio.create_task(client.generate_batch(["a", "b"]))
        while not server.batches:
            await asyncio.sleep(0.01)
        for run in client._runs:
            run._call.cancel()
        broken.set()

        assert texts(await batch) == ["a", "b"]


def test_waits_for_a_server_that_said_that_it_leaves_as_long_as_for_one_that_broke_off():
    """A restart in an orchestrator takes longer than four quick retries; what the server had taken is not lost."""
    attempts = Attempts(None, max_retries=1, patience_s=30.0)
    batch = Batch(["a"], {}, attempts, None, "return")
    leaving = pb.RequestError(code=14, message="the scheduler restarts; the answer goes on when it is back")
    refused = error_of(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: refused")
    batch.add(pb.GenerateBatchResponse(index=0, error=leaving))
    batch.wait_s(None)

    for _ in range(5):
        batch.wait_s(refused)

    assert not batch.is_done
