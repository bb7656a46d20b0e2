"""How long a client looks for a server that is away; with a clock of the test's own."""

from contextlib import suppress

import grpc
import pytest

from paceline import AnswerLost, TimedOut, Unavailable
from paceline._calls import Attempts, Backoff

AWAY = Unavailable("Stream removed", grpc.StatusCode.UNAVAILABLE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in one place; waits are as long as they may be."""
    now = [100.0]
    monkeypatch.setattr("paceline._calls.time.monotonic", lambda: now[0])
    monkeypatch.setattr("paceline._calls.random.random", lambda: 1.0)
    monkeypatch.setattr("paceline._calls._RESUME", Backoff(first_s=0.1, max_s=2.0))
    return now


def outage(attempts: Attempts, clock: list[float], vain_s: float = 0.0) -> list[float]:
    """The waits of one outage until the error is raised; each attempt after a wait lasts `vain_s` in vain."""
    waits: list[float] = []
    with suppress(Unavailable):
        while len(waits) < 1000:
            waits.append(attempts.wait_after_break_s(AWAY, was_answered=not waits))
            clock[0] += waits[-1] + vain_s
    return waits


def test_waits_grow_to_a_limit_and_end_with_the_patience(clock):
    """The first attempt is quick, for a connection that only hiccuped; the last one is made at the very end."""
    waits = outage(Attempts(None, 0, patience_s=30), clock)

    assert waits[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert sum(waits) == pytest.approx(30)


def test_attempts_in_vain_count_as_time_without_the_server(clock):
    """A server that takes connections and answers nothing is as good as away."""
    waits = outage(Attempts(None, 0, patience_s=30), clock, vain_s=5.0)

    assert sum(waits) + 5.0 * (len(waits) - 1) <= 30


def test_time_with_the_server_does_not_count(clock):
    """A request may wait in the queue for hours, and its connection break every now and then."""
    attempts = Attempts(None, 0, patience_s=30)
    waits = []
    for _ in range(10):
        waits.append(attempts.wait_after_break_s(AWAY, was_answered=True))
        clock[0] += waits[-1] + 3600

    assert attempts.away_s == pytest.approx(sum(waits))


def test_a_server_that_breaks_each_call_at_once_is_given_up(clock):
    """It takes the request, says so, and dies of it: the waits between add up."""
    attempts = Attempts(None, 0, patience_s=30)
    waits = []
    with suppress(Unavailable):
        while len(waits) < 1000:
            waits.append(attempts.wait_after_break_s(AWAY, was_answered=True))
            clock[0] += waits[-1]

    assert sum(waits) == pytest.approx(30)


def test_something_new_makes_all_patience_available_again(clock):
    """An answer that goes on is worth waiting for, however often its line breaks."""
    attempts = Attempts(None, 0, patience_s=3)
    for _ in range(100):
        clock[0] += attempts.wait_after_break_s(AWAY, was_answered=True)
        attempts.note_progress()


def test_the_last_attempt_is_made_when_the_time_is_over(clock):
    """The error tells both: that the time was over, and what there was to wait for."""
    attempts = Attempts(0.25, 0, patience_s=30)
    waits = []
    for _ in range(2):
        waits.append(attempts.wait_after_break_s(AWAY, was_answered=not waits))
        clock[0] += waits[-1]

    assert waits == pytest.approx([0.1, 0.15])
    with pytest.raises(TimedOut, match="the time-out was over before the server was back: Stream removed"):
        attempts.wait_after_break_s(AWAY, was_answered=False)


def test_what_cannot_get_better_is_raised_at_once(clock):
    """Patience is for servers that are away, not for those that say no."""
    with pytest.raises(AnswerLost):
        Attempts(None, 9, 30).wait_after_break_s(AnswerLost("gone", grpc.StatusCode.DATA_LOSS), was_answered=False)
