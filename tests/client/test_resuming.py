"""Connections that break in the middle of an answer: its reader sees one iterator, and every token once."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from paceline import AnswerLost, Cancelled, Chunk, InvalidRequest, PacelineError, ServerError, TimedOut, Unavailable
from paceline._calls import CHANNEL_OPTIONS
from paceline.v1 import inference_pb2 as pb
from tests.client.line import Line
from tests.client.scripted_server import (
    ACCEPTED,
    BROKEN,
    HELLO,
    UNAVAILABLE,
    Fail,
    ScriptedServer,
    Wait,
    end_of_choice,
    last,
    tokens,
)

STOP = pb.FINISH_REASON_STOP
ONE = (ACCEPTED, tokens("Thé", 7), tokens("", 8), tokens(" 🍵", 9), last("!", 10, reason=STOP))
THREE = (
    ACCEPTED,
    tokens("He", 1),
    tokens("é", 2, choice=1),
    end_of_choice("llo", 3, reason=STOP),
    tokens("", 4, choice=2),
    end_of_choice("", choice=1, reason=STOP),  # a stop text came: an end that brings no token
    tokens("🍵🍵", 5, choice=2),
    last("", 6, choice=2),
)
ANSWERS = {1: ONE, 3: THREE}
LOST = Fail(grpc.StatusCode.DATA_LOSS, "the answer is not known here")


def positions(request: pb.GenerateRequest) -> dict[int, tuple[int, int]]:
    return {place.choice: (place.output_token_count, place.text_length) for place in request.resume_from}


def positions_of(chunks: list[Chunk]) -> dict[int, tuple[int, int]]:
    """Where a reader of `chunks` is."""
    places: dict[int, tuple[int, int]] = {}
    for chunk in chunks:
        token_count, text_length = places.get(chunk.choice, (0, 0))
        places[chunk.choice] = (token_count + len(chunk.token_ids), text_length + len(chunk.text))
    return places


def without_position(request: pb.GenerateRequest) -> pb.GenerateRequest:
    copy = pb.GenerateRequest()
    copy.CopyFrom(request)
    copy.ClearField("resume_from")
    return copy


@pytest.fixture
def line(server: ScriptedServer) -> Iterator[Line]:
    line = Line(server.target)
    yield line
    line.close()


@pytest.mark.parametrize(("n", "k"), [(n, k) for n, answer in ANSWERS.items() for k in range(len(answer) + 1)])
def test_a_break_after_any_message_changes_nothing_for_the_reader(client, server, n, k):
    """The promise of the whole thing: no token is lost and none comes twice, whatever had come of each choice."""
    server.answer = ANSWERS[n]
    undisturbed = list(client.generate("Say hello", n=n))
    server.requests.clear()
    server.traceparents.clear()
    server.breaks.append(k)
    stream = client.generate("Say hello", n=n)

    assert list(stream) == undisturbed
    assert stream.output.choices == client.generate("Say hello", n=n, stream=False).choices
    first, *again = server.requests[:-1]
    assert len(again) == (k < len(ANSWERS[n]))  # after the last message there is nothing to ask for
    for request in again:
        assert positions(request) == positions_of(undisturbed[: max(0, k - 1)])
        assert without_position(request) == first
    assert len(set(server.traceparents[:-1])) == 1


@pytest.mark.parametrize("n", [1, 3])
def test_breaks_after_every_single_message_change_nothing(client, server, n):
    """A line that breaks all the time still brings the answer, one message at a time."""
    server.answer = ANSWERS[n]
    undisturbed = list(client.generate("Say hello", n=n))
    for repeated_count in range(n):  # of each choice that has ended, the end is repeated before anything new comes
        server.breaks.extend([2 + repeated_count] * len(ANSWERS[n]))

    assert list(client.generate("Say hello", n=n)) == undisturbed


def test_goes_on_where_the_reader_is_also_with_larger_pieces(client, server):
    """What was computed while nobody read comes in one piece."""
    server.scripts.append((ACCEPTED, tokens("Thé", 7), BROKEN))
    server.scripts.append((ACCEPTED, last(" 🍵!", 8, 9, 10)))

    assert [chunk.token_ids for chunk in client.generate("Say hello")] == [(7,), (8, 9, 10)]


def test_a_break_while_it_attaches_again_is_one_more_break(client, server):
    """A server that restarts is refused, then starting, then there."""
    full = Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.05)
    server.scripts.extend([(*HELLO[:2], BROKEN), (UNAVAILABLE,), (full,), (BROKEN,), (ACCEPTED, BROKEN)])

    assert client.generate("Say hello", stream=False).text == "Hello"
    assert [positions(request) for request in server.requests[1:]] == [{0: (1, 3)}] * 5


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Cancelling all calls"),
        (grpc.StatusCode.CANCELLED, "CANCELLED"),
        (grpc.StatusCode.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.INTERNAL, "Internal error from Core"),
        (grpc.StatusCode.UNKNOWN, "Stream removed (Data frame with END_STREAM flag received)"),
    ],
)
def test_knows_a_broken_line_under_all_its_names(client, server, code, details):
    """Proxies and servers that shut down make other statuses of it."""
    server.scripts.append((*HELLO[:2], Fail(code, details)))

    assert client.generate("Say hello", stream=False).text == "Hello"


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (Fail(grpc.StatusCode.CANCELLED, "request 'mine' was cancelled"), Cancelled),
        (Fail(grpc.StatusCode.DEADLINE_EXCEEDED), TimedOut),
        (Fail(grpc.StatusCode.INTERNAL, "a step failed: Stream removed"), ServerError),
        (Fail(grpc.StatusCode.RESOURCE_EXHAUSTED), PacelineError),
    ],
)
def test_the_last_word_of_the_server_is_no_break(client, server, failure, kind):
    """A request that somebody cancelled must not be asked for again."""
    server.scripts.append((*HELLO[:2], failure))

    with pytest.raises(kind, match="after 1 token"):
        client.generate("Say hello", stream=False)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (LOST, AnswerLost),
        (Fail(grpc.StatusCode.ALREADY_EXISTS), InvalidRequest),
        (Fail(grpc.StatusCode.CANCELLED), Cancelled),
    ],
)
def test_a_refusal_to_go_on_is_final(client, server, failure, kind):
    """A restarted server without a journal never learns the answer; what had come of it stands."""
    server.scripts.extend([(*HELLO[:2], BROKEN), (failure,)])
    stream = client.generate("Say hello")

    with pytest.raises(kind, match="after 1 token"):
        list(stream)
    assert stream.text == "Hel"
    assert len(server.requests) == 2
    assert server.cancelled_ids == []


@pytest.mark.parametrize(
    "piece",
    [
        pb.GenerateResponse(text="lo", token_ids=HELLO[2].token_ids, output_token_count=1, text_length=5),
        pb.GenerateResponse(text="lo", token_ids=HELLO[2].token_ids, output_token_count=3, text_length=5),
        pb.GenerateResponse(text="lo", token_ids=HELLO[2].token_ids, output_token_count=2, text_length=6),
        pb.GenerateResponse(text="Hello", token_ids=HELLO[2].token_ids, output_token_count=2, text_length=5),
    ],
)
def test_refuses_an_answer_that_does_not_go_on_where_it_was(client, server, piece):
    """A server that repeats or skips must be found out, not put together to a wrong text."""
    server.scripts.extend([(*HELLO[:2], BROKEN), (ACCEPTED, piece, Wait())])
    stream = client.generate("Say hello")

    with pytest.raises(ServerError, match="of choice 0, but 1 tokens and 3 characters had come"):
        list(stream)
    assert stream.text == "Hel"
    assert server.cancels.get(timeout=10) == stream.request_id


def test_gives_up_when_the_server_stays_away(connect, server):
    """After its detach time-out the request is gone; the error says how far it had come."""
    server.scripts.append((*HELLO[:2], Wait()))
    stream = connect(detach_timeout_s=1).generate("Say hello")
    next(stream)
    begun = time.monotonic()
    server.stop()

    with pytest.raises(Unavailable, match=r"\(after 1 token, then 1\.\d s without the server\)"):
        next(stream)
    assert 0.9 < time.monotonic() - begun < 10
    with pytest.raises(Unavailable):
        next(stream)


def test_the_time_out_ends_the_search_for_the_server(connect, server):
    """Whoever asked for an answer within a second is not kept for thirty."""
    server.scripts.append((*HELLO[:2], Wait()))
    stream = connect().generate("Say hello", timeout_s=0.7)
    next(stream)
    server.stop()
    begun = time.monotonic()

    # On a machine that is busy all of the time may be over before the first try to find it again.
    with pytest.raises(TimedOut, match=r"after 1 token, then|1 token came, then"):
        next(stream)
    assert time.monotonic() - begun < 10


def test_the_calls_of_a_stream_share_its_time_out(client, server):
    """Going on is not starting anew."""
    rest = Wait()
    server.scripts.append((*HELLO[:2], rest, BROKEN))
    stream = client.generate("Say hello", timeout_s=5)
    next(stream)
    time.sleep(0.3)
    rest.event.set()
    list(stream)

    assert server.deadlines[1] < server.deadlines[0] - 0.15  # gRPC rounds a deadline up by a percent


def test_without_a_detach_time_out_a_break_is_an_error(connect, server):
    """The request is cancelled with its call: there is nothing to go on with."""
    server.scripts.append((*HELLO[:2], BROKEN))
    stream = connect(detach_timeout_s=0).generate("Say hello")

    with pytest.raises(Unavailable, match="after 1 token"):
        list(stream)
    assert stream.text == "Hel"
    assert [request.detach_timeout_s for request in server.requests] == [0]


def test_asks_for_the_detach_time_out_with_every_request(connect, server):
    """One that is forgotten ends with the next hiccup of the network."""
    connect().generate("Say hello", stream=False)
    connect(detach_timeout_s=7).chat("Hi", stream=False)
    connect().generate_batch(["a", {"prompt": "b"}])

    batch = [message.request for message in server.batches[0]]
    assert [request.detach_timeout_s for request in [*server.requests, *batch]] == [30, 7, 30, 30]


def test_the_same_request_under_the_same_id_is_sent_as_it_was(connect, server):
    """How a program that was restarted gets its answer: the server knows the request by id and content."""
    for _ in range(2):
        assert connect().generate("Say hello", request_id="mine", seed=1, stream=False).text == "Hello"

    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_restart_of_the_server_costs_the_reader_a_pause(connect, kind, tmp_path: Path):
    """With the real thing: every connection breaks, nobody listens for a while, then somebody does."""
    server = ScriptedServer(*[f"unix:{tmp_path}/s"] * (kind == "unix"))
    try:
        server.answer = ONE
        server.scripts.extend([(*ONE[:k], Wait()) for k in (1, 2)])
        stream = connect(server.target).generate("Say hello")
        threading.Timer(0.2, server.restart).start()
        chunks = [next(stream)]
        server.stop()
        threading.Timer(0.3, server.start).start()
        chunks += stream

        assert "".join(chunk.text for chunk in chunks) == "Thé 🍵!"
        assert stream.output.token_ids == (7, 8, 9, 10)
    finally:
        server.stop()


def test_a_line_that_is_cut_inside_a_message_loses_nothing(connect, server, line: Line):
    """What had come of the message is not half a message to the reader."""
    large = "x" * 200_000
    server.answer = (ACCEPTED, tokens("a", 1), tokens(large, 2), tokens(large, 3), last("z", 4))
    stream = connect(line.target).generate("Say hello")
    chunks = [next(stream)]
    line.cut()
    chunks += stream

    assert [chunk.token_ids for chunk in chunks] == [(1,), (2,), (3,), (4,)]
    assert stream.text == f"a{large}{large}z"


def test_a_line_that_fell_silent_is_given_up(connect, server, line: Line, monkeypatch):
    """A firewall that forgets a connection tells nobody; without keepalive the reader would wait for ever."""
    quick = {name: 300 for name, value in CHANNEL_OPTIONS if value in (10_000, 5_000)}
    for module in ("client", "aio"):
        monkeypatch.setattr(f"paceline.{module}.CHANNEL_OPTIONS", [*{**dict(CHANNEL_OPTIONS), **quick}.items()])
    server.scripts.append((*HELLO[:2], Wait()))
    stream = connect(line.target).generate("Say hello")
    next(stream)
    line.fall_silent()

    assert [chunk.text for chunk in stream] == ["lo"]
