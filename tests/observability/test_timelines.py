"""What is kept of a request that has a long story, and what is shown of it."""

from __future__ import annotations

import json

import pytest

from common.otlp_json import to_otlp_json
from common.spans import Origin
from scheduler_svc.core.request import TraceContext
from scheduler_svc.observation.overview import is_waiting
from scheduler_svc.observation.request_spans import MOST_SPANS, RequestSpans
from scheduler_svc.observation.step_meter import Phases
from scheduler_svc.observation.timeline import MOST_ATTEMPTS, MOST_RUNS, Attempt, Run, Summary, Timeline

CHUNK = 10
STEP_S = 0.01


def timeline_of(choice_count: int = 1) -> Timeline:
    """A request that was accepted at 0."""
    return Timeline(
        request_id="r",
        trace=TraceContext(b"t" * 16, b"s" * 8, 1),
        received_at=0.0,
        accepted_at=0.0,
        facts={"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"},
        choice_count=choice_count,
        tenant="",
        max_output_count=10,
        answer=None,
        wall_ns=0,
        summary=Summary(1, 0, (1,), 0.2, ("stop",)),
    )


def attempt(
    timeline: Timeline, began_at: float, run_count: int = 1, choice: int = 0, ending: str = "preempted"
) -> float:
    """An attempt that reads, decodes for a step and ends; returns when."""
    one = Attempt(choice, "e0", began_at)
    timeline.add(one)
    at = began_at
    for number in range(run_count):
        one.runs.append(Run(number, number * CHUNK, CHUNK, at, at + STEP_S, Phases(0, 0.001, 0.001, 0.005, 0.001)))
        at += STEP_S
    one.decoding_at = at
    one.end(at + STEP_S, ending)
    return at + STEP_S


def spans_of(timeline: Timeline):
    return RequestSpans(Origin("paceline-scheduler", "here")).of(timeline, 1000.0)


def test_an_attempt_that_runs_is_not_forgotten_however_often_another_choice_has_to_begin_anew():
    """Its end would never be noted, and the request would be shown as waiting while it gets its tokens."""
    timeline = timeline_of(choice_count=2)
    for number in range(MOST_ATTEMPTS // 2):
        attempt(timeline, float(number))
    live = Attempt(1, "e1", 32.0)
    timeline.add(live)
    for number in range(MOST_ATTEMPTS // 2 + 1, 3 * MOST_ATTEMPTS):
        attempt(timeline, float(number))

    assert timeline.attempt_of(1) is live
    assert not is_waiting(timeline)
    assert len(timeline.attempts) == MOST_ATTEMPTS
    assert timeline.forgotten_count == 2 * MOST_ATTEMPTS


def test_spans_keep_their_ids_when_attempts_before_them_are_forgotten():
    """Whoever has opened a trace and looks again must find the same span, not another one in its place."""
    timeline = timeline_of()
    for number in range(MOST_ATTEMPTS):
        attempt(timeline, float(number))
    before = {span.span_id: (span.name, span.begin_ns) for span in spans_of(timeline)}
    for number in range(MOST_ATTEMPTS, MOST_ATTEMPTS + 5):
        attempt(timeline, float(number))
    after = {span.span_id: (span.name, span.begin_ns) for span in spans_of(timeline)}

    common = before.keys() & after.keys()
    assert len(common) > 5 * (MOST_ATTEMPTS - 6)
    assert all(before[one] == after[one] for one in common if before[one][0] != "queue")  # which grows


def test_time_of_attempts_that_were_forgotten_is_not_told_as_time_in_the_queue():
    """An executor computed it then: an operator who reads "queue" buys capacity that does not help."""
    timeline = timeline_of()
    ends = [attempt(timeline, float(number)) for number in range(MOST_ATTEMPTS + 10)]
    queued_ns = sum(span.end_ns - span.begin_ns for span in spans_of(timeline)[:-1] if span.name == "queue")
    gaps_s = [begin - end for begin, end in zip(range(1, len(ends)), ends, strict=False)]

    assert queued_ns / 1e9 == pytest.approx(sum(gaps_s) - sum(gaps_s[31:42]), abs=1e-6)


def test_a_request_with_a_long_story_has_a_thousand_spans_at_most_and_says_what_is_not_among_them():
    """Ten thousand took the event loop a third of a second, and no exporter would take them."""
    timeline = timeline_of(choice_count=8)
    at = 0.0
    for number in range(2 * MOST_ATTEMPTS):
        at = attempt(timeline, at, MOST_RUNS, choice=number % 8)
    timeline.ended_at = at
    spans = spans_of(timeline)
    outcome, *told = spans[0].attributes["paceline.account"]

    assert len(spans) <= MOST_SPANS
    assert len({span.span_id for span in spans}) == len(spans)
    assert sum(int(span.attributes.get("paceline.tokens", 0)) for span in spans) == MOST_ATTEMPTS * MOST_RUNS * CHUNK
    assert spans[0].attributes["paceline.attempts.forgotten"] == MOST_ATTEMPTS
    folded = sum(int(span.attributes.get("paceline.chunks", 0)) for span in spans)
    assert spans[0].attributes["paceline.chunks.folded"] == folded > MOST_ATTEMPTS * MOST_RUNS // 2
    assert "64 attempts not kept" in outcome
    assert f"{MOST_ATTEMPTS // 8 * MOST_RUNS} chunks on e0" in told[0]


def test_a_request_with_few_chunks_says_nothing_of_what_is_left_out():
    """Every attribute is a question to whoever reads the trace."""
    timeline = timeline_of()
    timeline.ended_at = attempt(timeline, 0.5, MOST_RUNS, ending="")
    spans = spans_of(timeline)

    assert not [name for name in spans[0].attributes if name.endswith(("folded", "forgotten"))]
    assert [span.name for span in spans].count("prefill") == MOST_RUNS
    assert [span.name for span in spans].count("forward") == MOST_RUNS
    assert json.loads(to_otlp_json(spans))
