"""A port forwarder between the client and a server that is away: it takes connections, and has nobody to offer."""

import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from paceline import Overloaded, Unavailable
from paceline._batch import Batch
from paceline._calls import Attempts
from paceline.errors import ended_without_a_word, error_of, reached_nobody
from paceline.v1 import inference_pb2 as pb
from tests.client.line import Line
from tests.client.scripted_server import BROKEN, Fail, ScriptedServer

NO_EXECUTOR = "no executor has joined yet; retry with backoff until one is ready"
NOBODY_LISTENS = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused"


@pytest.fixture(params=[False, True], ids=["closes", "hangs"])
def forwarder(server: ScriptedServer, request: pytest.FixtureRequest) -> Iterator[Line]:
    line = Line(server.target, hanging=request.param)
    yield line
    line.close()


def come_back(server: ScriptedServer, after_s: float) -> None:
    """Be away for a while, from now on."""
    server.stop()
    threading.Timer(after_s, server.start).start()


def test_a_stream_waits_for_the_server_behind_a_forwarder(connect, server, forwarder):
    """The address is right, since somebody answers there; four quick retries are over before a server has restarted."""
    come_back(server, after_s=0.5)

    assert connect(forwarder.target, max_retries=1).generate("Say hello", stream=False).text == "Hello"


def test_a_batch_waits_for_the_server_behind_a_forwarder(connect, server, forwarder):
    """Whether it dialled just before the server died or just after makes no difference to who waits for its outputs."""
    come_back(server, after_s=0.5)

    outputs = connect(forwarder.target, max_retries=1).generate_batch(["a", "b"])

    assert [output.text for output in outputs] == ["a", "b"]


def test_a_forwarder_whose_server_stays_away_is_given_up_when_the_patience_ends(connect, server):
    """It is a mistake after all, and the error says how long it was waited for."""
    line = Line(server.target)
    server.stop()
    begun = time.monotonic()

    with pytest.raises(Unavailable, match=r"failed to connect.* \(after \d+\.\d s without the server\)"):
        connect(line.target, detach_timeout_s=1).generate("Say hello", stream=False)
    assert time.monotonic() - begun > 0.9
    line.close()


def test_without_patience_a_forwarder_is_worth_the_retries_only(connect, server):
    """`detach_timeout_s=0` says that nothing is taken up again."""
    server.scripts.extend([(BROKEN,)] * 9)

    with pytest.raises(Unavailable):
        connect(max_retries=2, detach_timeout_s=0).generate("Say hello", stream=False)
    assert len(server.requests) == 3


def test_a_stream_that_broke_off_before_its_first_message_is_asked_for_again(connect, server):
    """The server may have taken it; under its id it is the same request."""
    server.scripts.extend([(BROKEN,)] * 3)

    assert connect(max_retries=0).generate("Say hello", stream=False).text == "Hello"
    assert len({request.request_id for request in server.requests}) == 1


def test_a_server_that_is_back_may_still_lack_executors(connect, server):
    """They find it a moment later than clients do: it says that it is not ready, and that is no answer."""
    not_ready = (Fail(grpc.StatusCode.UNAVAILABLE, NO_EXECUTOR),)
    server.scripts.extend([(BROKEN,), *[not_ready] * 5])

    assert connect(max_retries=1).generate("Say hello", stream=False).text == "Hello"


def test_a_batch_waits_for_the_executors_of_a_server_that_is_back():
    """Those of its requests that had not been let in are refused until then."""
    batch = Batch(["a"], {}, Attempts(None, max_retries=1, patience_s=30.0), None, "return")
    batch.wait_s(error_of(grpc.StatusCode.UNAVAILABLE, "Stream removed (Socket closed)"))

    for _ in range(5):
        refusal = pb.RequestError(code=grpc.StatusCode.UNAVAILABLE.value[0], message=NO_EXECUTOR)
        batch.add(pb.GenerateBatchResponse(index=0, error=refusal))
        batch.wait_s(None)

    assert not batch.is_done


def test_a_batch_without_any_executor_is_told_so_after_the_retries():
    """Who forgot to start one should not wait for as long as a restart may take."""
    batch = Batch(["a"], {}, Attempts(None, max_retries=1, patience_s=30.0), None, "return")
    for _ in range(2):
        refusal = pb.RequestError(code=grpc.StatusCode.UNAVAILABLE.value[0], message=NO_EXECUTOR)
        batch.add(pb.GenerateBatchResponse(index=0, error=refusal))
        batch.wait_s(None)

    (outcome,) = batch.outcomes()
    assert outcome.message == NO_EXECUTOR


def test_a_full_queue_after_an_outage_has_all_retries():
    """Everybody comes back at once when a server does; the attempts while it was away must not count against it."""
    attempts = Attempts(None, max_retries=2, patience_s=30.0)
    for _ in range(9):
        attempts.wait_after_break_s(error_of(grpc.StatusCode.UNAVAILABLE, NOBODY_LISTENS), was_answered=False)

    full = error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    attempts.wait_s(full)
    attempts.wait_s(full)
    with pytest.raises(Overloaded):
        attempts.wait_s(full)


@pytest.mark.parametrize(
    ("message", "is_worth_patience"),
    [
        ("Stream removed (Socket closed)", True),
        ("Received http2 header with status: 503", True),
        ("failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed", True),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: connection attempt timed out "
            "before receiving SETTINGS frame",
            True,
        ),
        (NOBODY_LISTENS, False),
        ("errors resolving nosuch:5: Domain name not found", False),
        (NO_EXECUTOR, False),
        (
            "failed to connect to all addresses; last error: INTERNAL: ipv4:127.0.0.1:1: Failed parsing HTTP/2 "
            "(Trying to connect an http1.x server (HTTP status 400))",
            False,
        ),
    ],
)
def test_only_who_takes_a_connection_and_says_nothing_is_worth_patience(message, is_worth_patience):
    """A wrong address should be known at once, also where somebody else answers there."""
    error = error_of(grpc.StatusCode.UNAVAILABLE, message)

    assert ended_without_a_word(error) is is_worth_patience
    assert reached_nobody(error) is message.startswith(("failed to connect", "errors"))
