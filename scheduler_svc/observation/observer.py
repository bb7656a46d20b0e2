"""Sees what happens in the engine, and remembers it: timelines, histograms, spans. Changes nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from functools import wraps
from typing import Any

import structlog

from common.errors import RefusedError
from common.spans import Origin, Span, SpanLink
from scheduler_svc.answers import Answer
from scheduler_svc.arrivals import Arrival
from scheduler_svc.core.executor import Executor
from scheduler_svc.core.obstacles import Obstacle
from scheduler_svc.core.plan import Chunk, NewRequest, Plan
from scheduler_svc.core.request import Request, RequestState, TraceContext
from scheduler_svc.load_meter import LoadMeter
from scheduler_svc.observation.refusal_spans import refusal_span
from scheduler_svc.observation.request_facts import content_of, facts_of, facts_of_call
from scheduler_svc.observation.request_spans import RequestSpans, phase_spans
from scheduler_svc.observation.step_meter import StepMeter
from scheduler_svc.observation.step_spans import Flight, Part, step_span
from scheduler_svc.observation.timeline import MOST_CHOICES, MOST_RUNS, Attempt, Run, Summary, Timeline
from scheduler_svc.observation.tracing import SAMPLED, Tracing
from scheduler_svc.observation.waits import QueueWatch, Wait

log = structlog.get_logger()

_MOST_LINKS = 32
"""Requests that a recorded step is linked to."""

_MOST_STEP_LINKS = 8
"""Recorded steps that an attempt is linked to."""

_FAILED = ("error", "deadline", "cut off")
_BROKEN = ("error", "cut off")  # the service is to blame


class Loss(Enum):
    """What happened to an executor with requests on it, as traces call it."""

    CUT_OFF = "executor cut off"  # it may be back with them
    LOST = "executor lost"
    NOT_BACK = "executor did not come back"  # after a cut, or a restart of the scheduler
    CAME_WITHOUT = "executor came back without it"  # likewise


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook whose mistakes cost a picture, and nobody an answer."""

    @wraps(hook)
    def guarded(*arguments: Any, **named: Any) -> None:
        try:
            hook(*arguments, **named)
        except Exception:
            about = [one.request for one in arguments if isinstance(one, Answer)]
            ids = log_ids(about[0]) if about else {}
            log.exception("what was observed is lost; serving goes on", hook=hook.__name__, **ids)

    return guarded


class Observer:
    """Told by the engine what happened. All of it is plain assignments; nothing waits."""

    def __init__(
        self,
        meter: LoadMeter,
        tracing: Tracing,
        origin: Origin,
        model: str,
        *,
        keep_count: int = 512,
        keeps_content: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Feed `meter` and `tracing`; remember the `keep_count` timelines that ended last."""
        self.tracing = tracing
        self.meter = meter
        self._origin = origin
        self._spans = RequestSpans(origin)
        self._model = model
        self._keeps_content = keeps_content
        self._clock = clock
        self._live: dict[str, Timeline] = {}
        self._ended: deque[Timeline] = deque(maxlen=keep_count)
        self._flights: dict[str, dict[int, Flight]] = {}  # by executor and step
        self._steps: dict[str, StepMeter] = {}  # by executor
        self._computed: dict[Request, int] = {}  # tokens that somebody who left an executor had computed there
        self._queue = QueueWatch()

    # --- what others read ---------------------------------------------------------------------------------------

    @property
    def live(self) -> list[Timeline]:
        """The requests that have not ended, the oldest first."""
        return list(self._live.values())

    @property
    def ended(self) -> list[Timeline]:
        """Those that have ended last, the latest first."""
        return list(reversed(self._ended))

    def find(self, request_id: str) -> Timeline | None:
        """The timeline of a request, if it is remembered."""
        return self._live.get(request_id) or next((one for one in self.ended if one.request_id == request_id), None)

    def spans(self, timeline: Timeline) -> list[Span]:
        """The trace of a request, as far as it goes, for whoever asks: without what was said in it."""
        for attempt in timeline.attempts:
            self._sum_up(attempt)
        return self._spans.of(timeline, self._clock())

    def at_door(self, arrival: Arrival) -> Timeline:
        """The timeline of a request that is not accepted, as far as it goes."""
        return Timeline(
            request_id=arrival.request_id,
            trace=arrival.trace,
            received_at=arrival.received_at,
            accepted_at=self._clock(),
            facts=facts_of_call(arrival.operation, arrival.method, self._model),
            choice_count=1,
            tenant="",
            max_output_count=0,
            answer=None,
            wall_ns=self._wall_ns,
            held_for=arrival.held_for,
            is_accepted=False,
            summary=Summary(0, 0, (), None),
        )

    @property
    def _wall_ns(self) -> int:
        return time.time_ns() - round(self._clock() * 1e9)

    # --- requests -----------------------------------------------------------------------------------------------

    @_harmless
    def on_accepted(self, answer: Answer, *, is_restored: bool = False) -> None:
        """A request was let in; `is_restored`: by an earlier life of the scheduler."""
        request = answer.request
        trace = request.trace or self.tracing.accept(None)
        if not is_restored and self.tracing.is_chosen(trace):
            trace = replace(trace, flags=trace.flags | SAMPLED)
        for choice in request.family:
            choice.trace = trace
        timeline = self._live[request.request_id] = Timeline(
            request_id=request.request_id,
            trace=trace,
            received_at=answer.received_at,
            accepted_at=answer.accepted_at,
            facts=facts_of(answer, self._model),
            choice_count=len(answer.streams),
            tenant=request.tenant,
            max_output_count=request.max_output_count,
            answer=answer,
            wall_ns=self._wall_ns,
            held_for=answer.held_for,
        )
        if is_restored:
            timeline.restored_at = self._clock()
            timeline.note(timeline.restored_at, "restored")
            for choice in request.family:
                self._wait(timeline, choice, timeline.restored_at)
                # Who has a token had all before it computed; how far the others were is not known any more.
                if choice.output_count and choice.state is not RequestState.FINISHED:
                    self._computed[choice] = len(choice.token_ids) - 1
            return
        self._wait(timeline, request, answer.accepted_at)
        for stream in answer.streams:
            stream.on_first_token = lambda now: self._note_first_token(timeline, now)
        self.meter.note_arrived(request.prompt_count)

    @_harmless
    def on_turned_away(self, arrival: Arrival, outcome: str, error: str) -> None:
        """A request was held at the door in vain, or failed there; `outcome` is that of a request that had been
        accepted then.
        """
        if arrival.request_id in self._live:
            return  # what failed came after its acceptance: its end is still to be told
        timeline = self.at_door(arrival)
        timeline.ended_at, timeline.summary = timeline.accepted_at, Summary(0, 0, (), None, (outcome,), error)
        self._ended.append(timeline)
        if self._is_recorded(timeline, outcome):
            self.tracing.send(self._spans.of(timeline, timeline.ended_at))

    @_harmless
    def on_refused(self, arrival: Arrival, error: RefusedError, reason: str) -> None:
        """A request was refused at once, which is remembered in its caller's trace only."""
        if self.tracing.is_refusal_recorded(arrival.trace):
            timeline = self.at_door(arrival)
            self.tracing.send([refusal_span(timeline, error, reason, self._origin)])

    def _note_first_token(self, timeline: Timeline, now: float) -> None:
        answer = timeline.answer
        if answer is not None and not answer.output_token_count:  # none of the other choices was faster
            timeline.note(now, "first token")
            self.meter.note_first_token(now, now - timeline.received_at, self._exemplar(timeline))

    @_harmless
    def on_finished(self, requests: Iterable[Request], now: float) -> None:
        """No executor computes these choices any more."""
        for request in requests:
            self._computed.pop(request, None)
            if (timeline := self._live.get(request.request_id)) is not None:
                self._leave(timeline, request.choice, now, "")

    @_harmless
    def on_ended(self, answer: Answer, now: float) -> None:
        """Nothing of a request comes any more."""
        timeline = self._live.pop(answer.request.request_id, None)
        if timeline is None:
            return
        timeline.end(now)
        self._ended.append(timeline)
        summary = timeline.summarize()
        is_recorded = self._is_recorded(timeline, summary.outcome)
        if timeline.is_restored:
            self.meter.note_outcome(summary.outcome)  # its times were not all in this life
        else:
            self._note_end(timeline, summary, now)
        if summary.outcome in _BROKEN:
            log.warning("request failed", **log_ids(answer.request), outcome=summary.outcome, reason=summary.error)
        if is_recorded:
            self.tracing.send(self._spans.of(timeline, now, content_of(answer) if self._keeps_content else ()))

    def _is_recorded(self, timeline: Timeline, outcome: str) -> bool:
        """Whether the trace of a request that has ended is sent; from then on it says so."""
        is_recorded = self.tracing.is_recorded(timeline.trace, failed=outcome in _FAILED)
        if is_recorded:
            timeline.trace = replace(timeline.trace, flags=timeline.trace.flags | SAMPLED)
        return is_recorded

    def _note_end(self, timeline: Timeline, summary: Summary, now: float) -> None:
        first_token_at = summary.first_token_at
        if not timeline.attempts:  # it waited in vain: times in the queue are not only those of survivors
            self.meter.queue.note(now, now - timeline.accepted_at, self._exemplar(timeline))
        else:
            self.meter.inference.note(now, now - timeline.attempts[0].began_at)
        self.meter.note_ended(
            now,
            prompt_count=summary.prompt_count,
            output_counts=summary.output_counts,
            reused_count=summary.reused_count,
            was_placed=bool(timeline.attempts),
            decoding_s=now - first_token_at if first_token_at is not None else 0.0,
            total_s=now - timeline.received_at,
            outcome=summary.outcome,
            trace_id=self._exemplar(timeline),
        )

    def _exemplar(self, timeline: Timeline) -> str:
        """The trace that stands for a measured time; "" where it is not recorded."""
        is_recorded = self.tracing.is_on and timeline.trace.flags & SAMPLED
        return timeline.trace.trace_id.hex() if is_recorded else ""

    @_harmless
    def on_released(self, now: float, gaps: dict[float, int]) -> None:
        """Tokens went out: how many of them came after one that went out at which time."""
        for previous_at, count in gaps.items():
            self.meter.between_tokens.note(now, now - previous_at, count=count)

    # --- places -------------------------------------------------------------------------------------------------

    @_harmless
    def on_attached(self, executor: Executor, steps: StepMeter, now: float) -> None:
        """An executor is there; who runs on it already goes on."""
        name = executor.executor_id
        self._steps[name] = steps
        self._flights.pop(name, None)
        self._note_event(executor.running, now, "resumed where it was", name)
        for request in executor.running:
            timeline = self._live.get(request.request_id)
            if timeline is None or request.choice >= MOST_CHOICES:
                continue
            attempt = Attempt(request.choice, name, now)
            timeline.add(attempt)
            if executor.slots.decoding[request.slot]:
                self._begin_decoding(timeline, attempt, now)
        if executor.running:
            self.meter.recovery_counts["resumed"] += 1

    @_harmless
    def on_preempted(self, requests: Iterable[Request], now: float, cause: str) -> None:
        """These gave their place on an executor to others, or had to leave it."""
        for request in requests:
            if cause == "preempted":
                self.meter.preemption_count += 1
            else:
                self.meter.move_counts[cause] += 1
            if (timeline := self._live.get(request.request_id)) is not None:
                self._note_computed(timeline, request)
                self._leave(timeline, request.choice, now, cause)
                self._wait(timeline, request, now)
                about = {"paceline.preempted.for": request.gave_way_for} if cause == "preempted" else {}
                timeline.note(now, cause, **about, **timeline.of_choice(request.choice))

    @_harmless
    def on_lost(self, requests: Sequence[Request], executor_id: str, now: float, loss: Loss) -> None:
        """These were on an executor, or waited for it, and are not there any more."""
        if loss is not Loss.CAME_WITHOUT:
            self._flights.pop(executor_id, None)
        for request in requests:
            if (timeline := self._live.get(request.request_id)) is not None:
                self._note_computed(timeline, request)
                self._leave(timeline, request.choice, now, "lost")
                self._wait(timeline, request, now)
        self._note_event(requests, now, loss.value, executor_id)
        if loss is not Loss.CUT_OFF:
            self._count_lost(requests)

    def _note_event(self, choices: Iterable[Request], now: float, name: str, executor_id: str) -> None:
        """Something happened to an executor: one event for all choices of a request that were there."""
        numbers: dict[str, list[int]] = {}
        for choice in choices:
            numbers.setdefault(choice.request_id, []).append(choice.choice)
        for request_id, affected in numbers.items():
            if (timeline := self._live.get(request_id)) is not None:
                timeline.note(now, name, **{"paceline.executor.id": executor_id}, **timeline.of_choices(affected))

    def _count_lost(self, requests: Sequence[Request]) -> None:
        """Who has ended with the executor does not go on elsewhere, nor do those that were still to be forked."""
        moved_count = sum(request.state is not RequestState.FINISHED for request in requests)
        self.meter.move_counts["lost"] += moved_count
        self.meter.recovery_counts["replanned"] += moved_count > 0
        self.meter.recovery_counts["given up"] += moved_count < len(requests)

    @_harmless
    def on_gone(self, executor_id: str) -> None:
        """An executor is given up, and will not be heard of again under its counters."""
        self._steps.pop(executor_id, None)
        self._flights.pop(executor_id, None)

    def _note_computed(self, timeline: Timeline, request: Request) -> None:
        """Keep how many tokens were computed that have to be computed again."""
        attempt = timeline.attempt_of(request.choice)
        if attempt is not None:
            done = max((run.start + run.token_count for run in attempt.runs if run.ended_at is not None), default=0)
            computed = done if attempt.decoding_at is None else len(request.token_ids)
            self._computed[request] = max(computed, self._computed.get(request, 0))

    def _wait(self, timeline: Timeline, request: Request, now: float) -> None:
        """Nobody computes a choice from now on: it waits for its executor to come back, or in the queue."""
        if request.state is RequestState.FINISHED or request.is_unforked or request.choice >= MOST_CHOICES:
            return
        wait = timeline.waits.get(request.choice)
        if wait is None:
            timeline.waits[request.choice] = Wait(self._queue, now, awaits_executor=bool(request.awaits))
        else:
            wait.move(now, awaits_executor=bool(request.awaits))

    def _leave(self, timeline: Timeline, choice: int, now: float, ending: str) -> None:
        attempt = timeline.attempt_of(choice)
        if attempt is not None:
            self._sum_up(attempt)
            attempt.end(now, ending)

    def _sum_up(self, attempt: Attempt) -> None:
        """What the steps have taken in which it decoded, by now."""
        steps = self._steps.get(attempt.executor_id)
        if attempt.decoding_at is not None and attempt.ended_at is None and steps is not None:
            attempt.decode_phases = steps.total.since(attempt.begun_phases)
            attempt.decode_step_count = steps.step_count - attempt.begun_step_count

    @_harmless
    def on_pumped(self, obstacle: Obstacle | None) -> None:
        """All plans are out that could be made; who waits still waits for this."""
        self._queue.note(self._clock(), obstacle)

    # --- steps --------------------------------------------------------------------------------------------------

    @_harmless
    def on_planned(self, executor_id: str, plan: Plan, now: float) -> None:
        """A plan goes out. Where it only goes on with those that decode, and nothing is traced, there is no cost."""
        is_on = self.tracing.is_on
        if not (is_on or plan.chunks or plan.new_requests):
            return
        for new in plan.new_requests:
            self._begin(new, executor_id, now)
        flight = Flight(plan, now, self.tracing.step() if is_on else None)
        for chunk in plan.chunks:
            self._run(chunk, plan.step, now, flight)
        self._flights.setdefault(executor_id, {})[plan.step] = flight

    def _begin(self, new: NewRequest, executor_id: str, now: float) -> None:
        timeline = self._live.get(new.request_id)
        if timeline is None or new.choice >= MOST_CHOICES:
            return
        if not timeline.attempts and not timeline.is_restored:
            self.meter.queue.note(now, now - timeline.accepted_at, self._exemplar(timeline))
        elif new.placement_count > 1:
            about = timeline.of_choice(new.choice)
            timeline.note(now, "placed again", **{"paceline.executor.id": executor_id}, **about)
        timeline.add(Attempt(new.choice, executor_id, now))

    def _run(self, chunk: Chunk, step: int, now: float, flight: Flight) -> None:
        request = chunk.request
        if request in self._computed:
            again = min(self._computed[request], chunk.start + chunk.count) - chunk.start
            self.meter.recomputed_token_count += max(0, again)
        timeline = self._live.get(request.request_id)
        attempt = timeline.attempt_of(request.choice) if timeline is not None else None
        if timeline is None or attempt is None:
            return
        if len(attempt.runs) < MOST_RUNS:
            run = Run(step, chunk.start, chunk.count, now)
            attempt.runs.append(run)
        else:
            run = attempt.runs[-1]
            run.token_count += chunk.count
            run.chunk_count += 1
            run.ended_at = None
        flight.parts.append(Part(timeline, attempt, run, chunk.samples))

    @_harmless
    def on_answered(self, executor_id: str, step: int, now: float) -> None:
        """A result is in."""
        flights = self._flights.get(executor_id)
        flight = flights.pop(step, None) if flights else None
        steps = self._steps.get(executor_id)
        if flight is None or steps is None:
            return
        for timeline, attempt, run, samples in flight.parts:
            run.ended_at, run.phases = now, steps.last
            if samples and attempt.ended_at is None:
                if timeline.prompt_computed_at is None and not timeline.is_restored:
                    prefill_s = now - timeline.attempts[0].began_at
                    self.meter.prefill.note(now, prefill_s, self._exemplar(timeline))
                self._begin_decoding(timeline, attempt, now)
        if self.tracing.is_on:
            trace = flight.trace
            if trace is None and steps.is_slow:
                trace = self.tracing.slow_step()
            if trace is not None:
                self._record(executor_id, flight, trace, steps, now)

    def _begin_decoding(self, timeline: Timeline, attempt: Attempt, now: float) -> None:
        steps = self._steps.get(attempt.executor_id) or StepMeter()
        if timeline.prompt_computed_at is None:
            timeline.prompt_computed_at = now
            for choice in range(1, min(timeline.choice_count, MOST_CHOICES)):  # they were to be forked from it
                if choice not in timeline.attempt_counts and choice not in timeline.waits:
                    timeline.waits[choice] = Wait(self._queue, now, awaits_executor=False)
        attempt.decoding_at = now
        attempt.begun_phases, attempt.begun_step_count = steps.total, steps.step_count

    def _record(self, executor_id: str, flight: Flight, trace: TraceContext, steps: StepMeter, now: float) -> None:
        """Record a step, linked to the requests in it that are recorded, and these to it."""
        plan, wall_ns = flight.plan, self._wall_ns
        links = []
        for request in [*plan.rows, *(chunk.request for chunk in plan.chunks if not chunk.samples)]:
            if request.trace is None or not request.trace.flags & SAMPLED:
                continue
            links.append(SpanLink(request.trace.trace_id, request.trace.span_id))
            timeline = self._live.get(request.request_id)
            attempt = timeline.attempt_of(request.choice) if timeline is not None else None
            if attempt is not None and len(attempt.step_links) < _MOST_STEP_LINKS:
                attempt.step_links.append((trace.trace_id, trace.span_id))
            if len(links) == _MOST_LINKS:
                break
        step = step_span(
            executor_id,
            plan,
            trace,
            self._origin,
            (round(flight.began_at * 1e9) + wall_ns, round(now * 1e9) + wall_ns),
            is_slow=flight.trace is None,
            idle_s=steps.last.idle,
            links=tuple(links),
        )
        self.tracing.send([step, *phase_spans(step, executor_id, steps.last)])


def log_ids(request: Request) -> dict[str, str]:
    """What a line of the log about a request has, so that it is found from a trace and the other way round."""
    trace = request.trace
    return {"request_id": request.request_id, "trace_id": trace.trace_id.hex() if trace is not None else ""}
