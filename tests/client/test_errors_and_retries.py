"""What a failure becomes, and what the client does about it before it says so."""

import pickle
import re
import time

import grpc
import pytest

import paceline.errors
from paceline import (
    AnswerLost,
    Cancelled,
    InvalidRequest,
    Overloaded,
    PacelineError,
    ServerError,
    TimedOut,
    Unavailable,
)
from paceline._calls import Backoff
from paceline.errors import ERROR_OF_STATUS, error_of
from tests.client.scripted_server import ACCEPTED, HELLO, UNAVAILABLE, Fail, Wait, tokens


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_each_status_is_the_error_of_the_table(connect, server, code):
    """Callers decide by the class of an error; its message and id are what they report."""
    server.scripts.append((ACCEPTED, Fail(code, "the reason")))

    with pytest.raises(PacelineError) as caught:
        connect(max_retries=0, detach_timeout_s=0).generate("Say hello", stream=False, request_id="mine")
    assert type(caught.value) is ERROR_OF_STATUS.get(code, ServerError)
    assert caught.value.code is code
    assert caught.value.request_id == "mine"
    assert "the reason" in caught.value.message
    assert str(caught.value).endswith("(request mine)")


def test_the_documented_table_is_the_table():
    """The docstring is what people read."""
    documented: dict[str, tuple[set[str], str]] = {}
    name = ""
    for line in (paceline.errors.__doc__ or "").splitlines():
        if row := re.match(r"  (\w+) +([A-Z_]{3,}|anything else),? *(.*)", line):
            name = row[1]
            documented[name] = ({row[2]}, row[3])
        elif more := re.match(r" {10,}([A-Z_]+)", line):
            documented[name][0].add(more[1])

    expected = {
        kind.__name__: ({code.name for code, of in ERROR_OF_STATUS.items() if of is kind}, kind.what_to_do)
        for kind in (InvalidRequest, Overloaded, Unavailable, TimedOut, Cancelled, AnswerLost)
    }
    assert documented == {**expected, "ServerError": ({"anything else"}, ServerError.what_to_do)}


def test_errors_survive_pickling():
    """Errors cross process pools; one that cannot be rebuilt there kills the pool."""
    error = pickle.loads(pickle.dumps(error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "mine", 2.5)))

    assert type(error) is Overloaded
    assert (str(error), error.retry_after_s) == ("full (request mine)", 2.5)


def test_retries_the_same_request_before_the_first_message(client, server):
    """A restart of the server costs the caller time, not an exception, and stays one request in one trace."""
    server.scripts.extend([(UNAVAILABLE,), (UNAVAILABLE,), HELLO])

    output = client.generate("Say hello", stream=False)

    assert output.text == "Hello"
    assert len(server.requests) == 3
    assert {request.request_id for request in server.requests} == {output.request_id}
    assert len(set(server.traceparents)) == 1


def test_gives_up_after_max_retries(connect, server):
    """A server that stays down is an error, not a wait without end."""
    server.scripts.extend([(UNAVAILABLE,)] * 9)

    with pytest.raises(Unavailable):
        connect(max_retries=2).generate("Say hello", stream=False)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.ALREADY_EXISTS]
)
def test_does_not_retry_what_cannot_get_better(client, server, code):
    """Sending a bad request again only adds to the load."""
    server.scripts.append((Fail(code),))

    with pytest.raises(PacelineError):
        client.generate("Say hello", stream=False)
    assert len(server.requests) == 1


def test_a_message_beyond_the_limit_is_the_requests_fault(client, server):
    """gRPC gives it the status of a full queue; sending megabytes again would be refused again."""
    details = "SERVER: Received message larger than max (80000047 vs. 67108864)"
    server.scripts.append((Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, details),))

    with pytest.raises(InvalidRequest, match="has 80000047 bytes, the server takes at most 67108864; shorten"):
        client.generate("Say hello", stream=False)
    assert len(server.requests) == 1


def test_waits_as_long_as_an_overloaded_server_asks(client, server):
    """Clients that come back early keep an overloaded server overloaded."""
    server.scripts.extend([(Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.3),), HELLO])

    assert client.generate("Say hello", stream=False).text == "Hello"
    assert server.call_times[1] - server.call_times[0] >= 0.3


def test_overloaded_says_when_to_come_back(connect, server):
    """A caller with a queue of its own schedules the retry itself."""
    server.scripts.append((Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=2.5),))

    with pytest.raises(Overloaded) as caught:
        connect(max_retries=0).generate("Say hello", stream=False)
    assert caught.value.retry_after_s == 2.5


def test_times_out(client, server):
    """The server holds the same deadline, so that it stops computing too. The message is in words of the caller's."""
    server.scripts.append((ACCEPTED, tokens("Hel", 7), Wait()))
    stream = client.generate("Say hello", timeout_s=0.3)

    with pytest.raises(TimedOut, match=r"^not done within 0\.3 s; 1 token came \(request "):
        list(stream)
    assert stream.text == "Hel"
    assert server.deadlines[0] <= 0.4


def test_the_time_out_of_the_client_holds_for_requests_without_one(connect, server):
    """One setting protects a whole program."""
    client = connect(timeout_s=50)
    client.generate("Say hello", stream=False)
    client.generate("Say hello", stream=False, timeout_s=20)

    assert server.deadlines == [pytest.approx(50, abs=10), pytest.approx(20, abs=10)]


def test_the_time_out_covers_all_attempts(client, server):
    """Whoever asked for 8 s gets an answer within 8 s, however often it was tried."""
    server.scripts.append((Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.5),))
    client.generate("Say hello", stream=False, timeout_s=8)

    assert server.deadlines[1] <= 8 - 0.5 + 0.1  # gRPC rounds a deadline up by a percent at most


def test_does_not_wait_for_a_retry_that_would_come_too_late(client, server):
    """The true reason now is worth more than a time-out later."""
    server.scripts.append((Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=60),))
    start = time.monotonic()

    with pytest.raises(Overloaded):
        client.generate("Say hello", stream=False, timeout_s=30)
    assert time.monotonic() - start < 20


def test_describing_the_model_is_retried(client, server):
    """It is the first call of most programs, often while the server still starts."""
    server.unary_failures.extend([UNAVAILABLE, UNAVAILABLE])

    assert client.model().name == "tiny"


def test_backoff_doubles_up_to_a_limit_and_adds_to_what_the_server_asked():
    """The worked example of its docstring."""
    backoff = Backoff(first_s=0.25, max_s=8.0)

    assert [backoff.wait_s(count, None, 1.0) for count in (0, 1, 2, 9, 9999)] == [0.25, 0.5, 1.0, 8.0, 8.0]
    assert backoff.wait_s(2, None, 0.0) == 0.0
    assert backoff.wait_s(2, 2.0, 0.5) == 2.5
