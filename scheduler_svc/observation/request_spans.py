"""From a timeline to the spans of its trace.

```
chat MODEL                SERVER, the scheduler: from receipt to the end; preemption, loss and moves are its events
  door                    it was not accepted yet, where that took long enough to matter
  queue                   no executor computes the request
  prefill                 one for each chunk of known tokens, from its plan to its result
    wait, prepare, ...    what the executor did in that step, by its own measure
  decode                  a token in every step; sums of the executor's phases are its attributes
```

Those of a request with several choices say whose they are. Where there would be too many, chunks in the middle of an
attempt are one `prefill`, and the request says how many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from common.spans import Attributes, Origin, Span, SpanEvent, SpanKind, SpanLink, Value, child_id, messages_json
from scheduler_svc.observation.account import ACCOUNT, account_of
from scheduler_svc.observation.step_meter import Phases
from scheduler_svc.observation.timeline import MOST_CHOICES, MOST_RUNS, Attempt, Run, Summary, Timeline

EXECUTOR_SERVICE = "paceline-executor"
SCHEDULER_SERVICE = "paceline-scheduler"
_PHASES = ("wait", "prepare", "forward", "sample")

MOST_SPANS = 1000
"""Spans of one request: more cost too much time to make, and nobody reads them."""

_PER_RUN = 1 + len(_PHASES)

# Outcomes that are errors of the server's, with the gRPC status that users get (as in the conventions for RPC: what
# a caller brought about, a cancellation say, is no error of the server's).
_STATUSES = {
    "stop": "OK",
    "length": "OK",
    "cancelled": "CANCELLED",
    "deadline": "DEADLINE_EXCEEDED",
    "error": "INTERNAL",
    "cut off": "UNAVAILABLE",
}
_ERRORS = ("deadline", "error", "cut off")


class RequestSpans:
    """Makes spans of timelines, the same ones each time."""

    def __init__(self, scheduler: Origin) -> None:
        """Spans of a scheduler and the executors that it talks to."""
        self._scheduler = scheduler

    def of(self, timeline: Timeline, now: float, content: tuple[str, ...] = ()) -> list[Span]:
        """The spans of a request, at most `MOST_SPANS`; one that has not ended is shown as it is `now`. `content` are
        its prompt and outputs, for an exporter and nobody else.
        """
        shown = _Shown(timeline, now, _most_runs(timeline))
        root, below = self._root(shown, content), list(self._below(shown))
        account = account_of(root, [span for span in below if span.parent_id == root.span_id])
        return [replace(root, attributes={**root.attributes, ACCOUNT: account}), *below]

    def _below(self, shown: _Shown) -> Iterator[Span]:
        timeline = shown.timeline
        if timeline.has_waited_at_door:
            yield self._child(shown, "door", (), timeline.received_at, timeline.accepted_at, _of_door(timeline))
        if timeline.is_accepted:
            for choice in sorted({attempt.choice for attempt in timeline.attempts} | {0}):
                yield from self._of_choice(shown, choice)

    def _root(self, shown: _Shown, content: tuple[str, ...]) -> Span:
        timeline, trace = shown.timeline, shown.timeline.trace
        summary = timeline.summarize()
        outcome = summary.outcome
        operation, model = timeline.facts["gen_ai.operation.name"], timeline.facts["gen_ai.request.model"]
        return Span(
            name=f"{operation} {model}",
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            parent_id=trace.parent_id,
            origin=self._scheduler,
            begin_ns=timeline.ns(timeline.received_at),
            end_ns=timeline.ns(shown.until),
            kind=SpanKind.SERVER,
            attributes={**timeline.facts, **_result(timeline, summary), **_left_out(shown), **_of_content(content)},
            events=tuple(
                SpanEvent(timeline.ns(moment.at), moment.name, dict(moment.facts)) for moment in timeline.moments
            ),
            error=(summary.error or outcome) if outcome in _ERRORS else None,
        )

    def _of_choice(self, shown: _Shown, choice: int) -> Iterator[Span]:
        timeline, until = shown.timeline, shown.until
        # Since when nobody computes it: the other choices begin when the first has read the prompt.
        is_first = not choice or timeline.is_restored  # after a restart each of them is on its own
        free_at = timeline.queued_at if is_first else timeline.prompt_computed_at
        about, next_serial = timeline.of_choice(choice), 0
        for attempt in timeline.attempts:
            if attempt.choice != choice:
                continue
            is_next = attempt.serial == next_serial  # else what was between was forgotten
            if is_next and free_at is not None and attempt.began_at > free_at:
                waited = {**about, **_waited_for(attempt.waited_for)}
                yield self._child(shown, "queue", (choice, attempt.serial), free_at, attempt.began_at, waited)
            yield from self._of_attempt(shown, attempt)
            free_at = attempt.ended_at if attempt.ending else None
            next_serial = attempt.serial + 1
        if free_at is not None and until > free_at:  # it waits, or ended while it did
            wait = timeline.waits.get(choice)
            waited = {**about, **_waited_for(wait.causes(until) if wait is not None else ())}
            yield self._child(shown, "queue", (choice, -1), free_at, until, waited)

    def _of_attempt(self, shown: _Shown, attempt: Attempt) -> Iterator[Span]:
        ended_at = attempt.ended_at or shown.now
        keys = (attempt.choice, attempt.serial)
        about: dict[str, Value] = {
            "paceline.executor.id": attempt.executor_id,
            "paceline.attempt": attempt.serial + 1,
            **shown.timeline.of_choice(attempt.choice),
        }
        for run in _folded(attempt.runs, shown.most_runs):
            run_ended_at = run.ended_at or ended_at
            attributes = {**about, **_of_run(run)}
            prefill = self._child(shown, "prefill", (*keys, run.step), run.began_at, run_ended_at, attributes)
            yield prefill
            if run.phases is not None and run.ended_at is not None and run.chunk_count == 1:
                yield from phase_spans(prefill, attempt.executor_id, run.phases)
        if attempt.decoding_at is not None and ended_at > attempt.decoding_at:
            attributes = {**about, **_of_decode(attempt)}
            links = tuple(SpanLink(*link) for link in attempt.step_links)
            yield self._child(shown, "decode", keys, attempt.decoding_at, ended_at, attributes, links)

    def _child(
        self,
        shown: _Shown,
        name: str,
        keys: tuple[int, ...],
        begin: float,
        end: float,
        attributes: Attributes | None = None,
        links: tuple[SpanLink, ...] = (),
    ) -> Span:
        timeline = shown.timeline
        root_id = timeline.trace.span_id
        return Span(
            name=name,
            trace_id=timeline.trace.trace_id,
            span_id=child_id(root_id, name, *keys),
            parent_id=root_id,
            origin=self._scheduler,
            begin_ns=timeline.ns(begin),
            end_ns=timeline.ns(max(begin, end)),
            attributes=attributes or {},
            links=links,
        )


@dataclass(frozen=True, slots=True)
class _Shown:
    """A request as it is shown."""

    timeline: Timeline
    now: float
    most_runs: int  # chunks of an attempt that have spans of their own

    @property
    def until(self) -> float:
        """Its end, if it has come to one."""
        return self.timeline.ended_at or self.now


def _most_runs(timeline: Timeline) -> int:
    """How many chunks of an attempt may have spans of their own, so that all are no more than `MOST_SPANS`.

    Example: 64 attempts of 32 chunks would be 10,376 spans. With two of each, and one for those between, they are 842.
    """
    most = MOST_RUNS
    counts = [len(attempt.runs) for attempt in timeline.attempts]
    others = 2 + MOST_CHOICES + 2 * len(counts)  # root and door; the last queue of a choice; queue and decode
    while most > 2 and others + sum(min(count, most) * _PER_RUN + (count > most) for count in counts) > MOST_SPANS:
        most //= 2
    return most


def _folded(runs: list[Run], most: int) -> list[Run]:
    """The first and the last of these as they are, those between as one where they are more than `most`."""
    if len(runs) <= most:
        return runs
    half = most // 2
    return [*runs[:half], Run.of_several(runs[half:-half]), *runs[-half:]]


def phase_spans(step: Span, executor_id: str, phases: Phases) -> Iterator[Span]:
    """What the executor did between a plan and its result, as children of the span of that time.

    The two clocks are not compared: what the executor did not account for is taken to be the way there and back, half
    of it each.
    """
    lengths_ns = [round(1e9 * seconds) for seconds in (phases.wait, phases.prepare, phases.forward, phases.sample)]
    on_the_way_ns = max(0, step.end_ns - step.begin_ns - sum(lengths_ns))
    begin_ns = step.begin_ns + on_the_way_ns // 2
    for name, length_ns in zip(_PHASES, lengths_ns, strict=True):
        if length_ns:
            yield Span(
                name=name,
                trace_id=step.trace_id,
                span_id=child_id(step.span_id, name),
                parent_id=step.span_id,
                origin=Origin(EXECUTOR_SERVICE, executor_id),
                begin_ns=begin_ns,
                end_ns=begin_ns + length_ns,
            )
        begin_ns += length_ns


def _result(timeline: Timeline, summary: Summary) -> Attributes:
    """What came of the request."""
    attributes: dict[str, Value] = {
        "gen_ai.response.id": timeline.request_id,
        "gen_ai.usage.input_tokens": summary.prompt_count,
        "gen_ai.usage.output_tokens": summary.output_count,
        "gen_ai.usage.cache_read.input_tokens": summary.reused_count,
        "paceline.recomputations": summary.recomputation_count,
    }
    if summary.outcome:
        attributes["gen_ai.response.finish_reasons"] = summary.outcomes
        attributes["rpc.response.status_code"] = _STATUSES[summary.outcome]
        if summary.outcome in _ERRORS:
            attributes["error.type"] = _STATUSES[summary.outcome]
    if summary.first_token_at is not None and not timeline.is_restored:  # else it is not known any more
        first_token_s = summary.first_token_at - timeline.received_at
        attributes["gen_ai.response.time_to_first_chunk"] = first_token_s
        attributes["gen_ai.latency.time_to_first_token"] = first_token_s  # as vLLM calls it
    if timeline.attempts and not timeline.is_restored:
        attributes["gen_ai.latency.time_in_queue"] = timeline.attempts[0].began_at - timeline.accepted_at
    if timeline.ended_at is not None:
        attributes["gen_ai.latency.e2e"] = timeline.ended_at - timeline.received_at
    return attributes


def _left_out(shown: _Shown) -> Attributes:
    """How much of the request has no span of its own."""
    runs = [run for attempt in shown.timeline.attempts for run in _folded(attempt.runs, shown.most_runs)]
    counts = {
        "paceline.chunks.folded": sum(run.chunk_count for run in runs if run.chunk_count > 1),
        "paceline.attempts.forgotten": shown.timeline.forgotten_count,
    }
    return {name: count for name, count in counts.items() if count}


def _of_door(timeline: Timeline) -> Attributes:
    return {"paceline.door.held_for": timeline.held_for} if timeline.held_for else {}


def _waited_for(causes: tuple[str, ...]) -> Attributes:
    return {"paceline.queue.waited_for": causes} if causes else {}


def _of_content(content: tuple[str, ...]) -> Attributes:
    """Prompt and outputs, where the operator has asked for them."""
    if not content:
        return {}
    prompt, *outputs = content
    return {
        **({"gen_ai.input.messages": prompt} if prompt else {}),  # not kept over a restart
        "gen_ai.output.messages": messages_json(("assistant", text) for text in outputs),
    }


def _of_run(run: Run) -> Attributes:
    attributes: dict[str, Value] = {
        "paceline.step": run.step,
        "paceline.tokens.from": run.start,
        "paceline.tokens": run.token_count,
    }
    if run.chunk_count > 1:
        attributes["paceline.chunks"] = run.chunk_count
    return attributes


def _of_decode(attempt: Attempt) -> Attributes:
    if attempt.decode_phases is None:
        return {}
    attributes: dict[str, Value] = {"paceline.steps": attempt.decode_step_count}
    for name in ("idle", "prepare", "forward", "sample"):  # while a plan waits, the step before it runs: counted there
        attributes[f"paceline.steps.{name}_s"] = round(getattr(attempt.decode_phases, name), 6)
    return attributes
