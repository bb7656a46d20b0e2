"""The sentences that tell why a request took as long as it did."""

from __future__ import annotations

from typing import Any

from common.spans import Origin, Span, SpanEvent
from scheduler_svc.observation.account import account_of

HERE = Origin("paceline-scheduler", "here")
SECOND = 1_000_000_000
ENDED = {
    "gen_ai.usage.input_tokens": 200,
    "gen_ai.usage.cache_read.input_tokens": 16,
    "gen_ai.usage.output_tokens": 58,
    "gen_ai.response.finish_reasons": ("length",),
    "gen_ai.response.time_to_first_chunk": 1.6,
}


def span(name: str, begin_s: float, end_s: float, events: tuple[SpanEvent, ...] = (), **facts: Any) -> Span:
    """Facts are named without `paceline.`, with `__` for `.`; those of a root are given as they are."""
    named = facts.pop("facts", None) or {f"paceline.{name.replace('__', '.')}": value for name, value in facts.items()}
    times_ns = round(begin_s * SECOND), round(end_s * SECOND)
    return Span(name, b"t" * 16, name.encode(), b"", HERE, *times_ns, attributes=named, events=events)


def root(end_s: float, *events: SpanEvent, facts: Any = None) -> Span:
    return span("chat m", 0, end_s, events, facts=ENDED if facts is None else facts)


def event(name: str, at_s: float, **facts: Any) -> SpanEvent:
    named = {f"paceline.{name.replace('__', '.')}": value for name, value in facts.items()}
    return SpanEvent(round(at_s * SECOND), name, named)


def prefill(begin_s: float, end_s: float, executor: str = "e0", attempt: int = 1, **facts: Any) -> Span:
    return span("prefill", begin_s, end_s, executor__id=executor, attempt=attempt, tokens=100, **facts)


def decode(begin_s: float, end_s: float, executor: str = "e0", attempt: int = 1, **facts: Any) -> Span:
    return span("decode", begin_s, end_s, executor__id=executor, attempt=attempt, steps=57, **facts)


def test_the_time_is_told_by_what_was_done_in_it():
    """Waiting behind a step is in that step's time already."""
    sums = {
        "paceline.executor.id": "e0",
        "paceline.steps": 57,
        "paceline.steps.forward_s": 1.44,
        "paceline.steps.prepare_s": 0.18,
        "paceline.steps.wait_s": 1.6,
    }
    parts = [span("queue", 0, 1.2), prefill(1.2, 1.4), prefill(1.4, 1.6), span("decode", 1.6, 3.4, facts=sums)]

    assert account_of(root(3.4), parts) == (
        "ended with length after 3.40 s · 200 tokens of prompt (16 reused) → 58 · first after 1.60 s",
        "queue 1.20 s (35 %); prefill 400 ms (12 %), 200 tokens in 2 chunks on e0; "
        "decode 1.80 s (53 %), 57 steps on e0 (forward 1.44 s, prepare 180 ms)",
    )


def test_a_wait_says_what_it_was_for():
    """What to buy depends on it: an executor, cache, slots, or shorter steps."""
    queues = [
        span("queue", 2, 3, queue__waited_for=("a slot",)),
        span("queue", 4, 6, queue__waited_for=("a slot", "x")),
    ]
    door = span("door", 0, 2, door__held_for=("the first executor",))

    assert account_of(root(10), [door, *queues, decode(6, 10)])[1].startswith(
        "at the door 2.00 s (20 %) for the first executor; queue 3.00 s (30 %) for a slot and x, 2 times; decode"
    )


def test_time_that_nothing_accounts_for_is_said():
    """A sum that does not add up would be a lie about the rest."""
    told = account_of(root(10), [prefill(1, 2), decode(2, 6)])[1]

    assert told.startswith("begun after 1.00 s (10 %); prefill")
    assert told.endswith("otherwise 4.00 s (40 %)")


def test_an_executor_that_was_lost_is_the_answer():
    """`computed again once` says what it cost, and neither who was lost nor how long the stream stood still."""
    events = event("executor lost", 1.14, executor__id="executor-0"), event("placed again", 4, executor__id="e1")
    parts = [
        prefill(0, 0.5),
        decode(0.5, 1.14),
        span("queue", 1.14, 4),
        prefill(4, 4.74, "e1", 2),
        decode(4.74, 9, "e1", 2),
    ]

    assert account_of(root(9, *events), parts)[1] == "executor-0 was lost at +1.14 s: a pause of 3.60 s"


def test_an_executor_that_was_cut_off_and_did_not_come_back_is_one_pause():
    """Two sentences about one gap would be added up by whoever reads them."""
    events = event("executor cut off", 1, executor__id="e0"), event("executor did not come back", 3, executor__id="e0")
    parts = [decode(0.5, 1), span("queue", 1, 4), decode(4, 9, "e1", 2)]

    _, told, _ = account_of(root(9, *events), parts)
    assert told == "e0 was cut off at +1.00 s and did not come back: a pause of 3.00 s"


def test_who_gives_way_again_and_again_is_told_once():
    """A short cache preempts one request dozens of times."""
    events = [event("preempted", at, preempted__for="blocks of the cache") for at in (1, 3, 5)]
    parts = [decode(begin, begin + 1, attempt=begin) for begin in (0, 2, 4, 6)]

    _, told, _ = account_of(root(7, *events), parts)
    assert told == "it gave way for blocks of the cache 3 times, first at +1.00 s: pauses of 3.00 s in all"


def test_a_pause_that_is_not_over_says_so():
    """It may be the one that somebody asks about now."""
    lost = event("executor lost", 2, executor__id="e0")
    parts = [decode(0.5, 2), span("queue", 2, 6, queue__waited_for=("an executor",))]

    going, told, shares = account_of(root(6, lost, facts={"gen_ai.usage.output_tokens": 3}), parts)
    assert going == "goes on after 6.00 s"
    assert told == "e0 was lost at +2.00 s: no token has come in the 4.00 s since"
    assert shares.endswith("queue 4.00 s (67 %) for an executor")
    assert account_of(root(6, lost), parts)[1].endswith("no token came in the 4.00 s since")


def test_who_is_lost_before_the_first_token_has_no_pause():
    """Nothing had been streaming that could have stood still."""
    lost = event("executor lost", 1, executor__id="e0")

    _, told, _ = account_of(root(6, lost), [prefill(0.5, 1), prefill(2, 3, "e1", 2), decode(3, 6, "e1", 2)])
    assert told == "e0 was lost at +1.00 s: its first token came 2.00 s later"


def test_a_choice_has_no_pause_of_another_choice():
    """Each of them streams by itself."""
    gave_way = event("preempted", 2, choice=1, preempted__for="a stronger claim")
    parts = [
        decode(1, 9, choice=0),
        decode(1, 2, choice=1),
        span("queue", 2, 5, choice=1),
        decode(5, 9, attempt=2, choice=1),
    ]

    _, told, first, second = account_of(root(9, gave_way), parts)
    assert told == "it gave way for a stronger claim at +2.00 s: a pause of 3.00 s"
    assert first.startswith("choice 1: begun after 1.00 s")
    assert "queue 3.00 s" in second


def test_what_was_before_a_restart_of_the_scheduler_is_said_to_be_unknown():
    """`begun after 4.43 s` explains nothing to who does not know that there was a restart."""
    events = event("restored", 4.43), event("executor did not come back", 4.5, executor__id="e0")
    _, pause, told = account_of(root(13, *events), [span("queue", 4.43, 5), decode(5, 13)])

    assert pause == (
        "the scheduler was started again at +4.43 s and e0 did not come back: its next token came 570 ms later"
    )
    assert told.startswith("4.43 s (34 %) before the scheduler was started again, of which no more is known; queue")


def test_a_request_without_any_part_is_told_by_its_end():
    """It may have been refused at the door, or asked about in its first moment."""
    assert account_of(root(0, facts={}), []) == ("goes on after 0 ms · no token yet",)
