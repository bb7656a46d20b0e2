"""What the journal is told of requests, and how they are made again from it."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import count
from typing import Any

from scheduler_svc.answers import Answer, Terms
from scheduler_svc.core.plan import Plan
from scheduler_svc.core.request import FinishReason, Request, RequestState, Sampling, TraceContext, with_choices
from scheduler_svc.journal import records
from scheduler_svc.journal.journal import Journal
from scheduler_svc.journal.restored import RestoredChoice, RestoredRequest
from scheduler_svc.observation.tracing import SAMPLED
from scheduler_svc.text_stream import TextStream
from scheduler_svc.tokenizer import Tokenizer

_UNRECORDED = 1 << 63
"""Keys from here on are those of choices that are not in the journal."""


class Recorder:
    """Writes down what a later life of the scheduler has to know.

    Only requests that outlive their call are recorded: nobody could come back for the others. Every choice has a `key`
    that no other ever had or will have, in this life and, if it is recorded, in any.
    """

    def __init__(self, journal: Journal, epoch: int, fingerprint: str) -> None:
        """Write into `journal`, on behalf of the scheduler with this epoch, which serves the model of `fingerprint`."""
        self.journal = journal
        self._epoch = epoch
        self._fingerprint = fingerprint
        self._unrecorded_keys = count(_UNRECORDED)
        self._placements: dict[int, records.Placed] = {}  # the last one of each choice that has not ended

    def accepted(self, answer: Answer) -> None:
        """A request was let in."""
        if not answer.terms.detach_timeout_s:
            for choice in answer.request.family:
                choice.key = next(self._unrecorded_keys)
            return
        answer.number = self.journal.next_number()
        for choice in answer.request.family:
            choice.key = self.journal.next_key()
        self.journal.append(self._accepted_record(answer))

    def can_go_on(self, kept: RestoredRequest) -> bool:
        """Whether a request of an earlier life was one for the model that is served now; else it is forgotten."""
        if kept.parameters["model"] == self._fingerprint:
            return True
        self.journal.append(records.Forgotten(kept.number))
        return False

    def restored(self, kept: RestoredRequest) -> None:
        """A request of an earlier life goes on."""
        for choice in kept.choices:
            if choice.executor_id is not None and choice.finish_reason is None:
                self._placements[choice.key] = records.Placed(
                    choice.key,
                    choice.executor_id,
                    choice.incarnation,
                    choice.epoch,
                    choice.attempt,
                    choice.placement_count,
                )

    def placed(self, executor_id: str, incarnation: int, plan: Plan) -> None:
        """A plan starts requests on an executor."""
        for new in plan.new_requests:
            if new.key < _UNRECORDED:
                placed = records.Placed(
                    new.key, executor_id, incarnation, self._epoch, new.attempt, new.placement_count
                )
                self._placements[new.key] = placed
                self.journal.append(placed)

    def stepped(self, executor_id: str, step: int, tokens: Iterable[tuple[Request, int]]) -> None:
        """A step brought tokens."""
        recorded = [(request.key, token) for request, token in tokens if request.key < _UNRECORDED]
        if recorded:
            keys, token_ids = zip(*recorded, strict=True)
            self.journal.append(records.Stepped(time.time(), executor_id, step, keys, token_ids))

    def ended(self, answer: Answer, choice: Request) -> None:
        """A choice has ended."""
        if answer.number:
            self._placements.pop(choice.key, None)
            self.journal.append(_ended_record(choice))
            if choice.has_ended:
                self.journal.append(records.RequestEnded(answer.number, time.time()))

    def forgotten(self, answer: Answer) -> None:
        """The result of a request is not kept any longer."""
        if answer.number:
            self.journal.append(records.Forgotten(answer.number))

    def _accepted_record(self, answer: Answer) -> records.Accepted:
        return accepted_record(answer, self._fingerprint)

    def outputs(self, answers: Iterable[Answer]) -> records.Outputs:
        """All that was generated for those that have not ended."""
        return records.Outputs(
            {
                choice.key: choice.output_ids
                for answer in answers
                for choice in answer.request.family
                if answer.number and choice.state is not RequestState.FINISHED
            }
        )

    def snapshot(self, answers: Iterable[Answer]) -> list[records.Record]:
        """All that there is to know of these, for a journal that knows nothing."""
        recorded = [answer for answer in answers if answer.number]
        snapshot: list[records.Record] = []
        for answer in recorded:
            snapshot.append(self._accepted_record(answer))
            for choice in answer.request.family:
                if choice.state is RequestState.FINISHED:
                    snapshot.append(_ended_record(choice))
            if answer.request.has_ended:
                ended_s_ago = 0.0 if answer.ended_at is None else time.monotonic() - answer.ended_at
                snapshot.append(records.RequestEnded(answer.number, time.time() - ended_s_ago))
        snapshot += self._placements.values()
        snapshot.append(self.outputs(recorded))
        return snapshot


def accepted_record(answer: Answer, fingerprint: str) -> records.Accepted:
    """A request as the journal keeps it; `fingerprint` is that of the model that it is for."""
    request, terms = answer.request, answer.terms
    wall_clock = time.time() - time.monotonic()
    trace = request.trace
    return records.Accepted(
        number=answer.number,
        request_id=request.request_id,
        content_hash=terms.content_hash,
        accepted_at=answer.accepted_at + wall_clock,
        deadline_at=None if request.deadline == math.inf else request.deadline + wall_clock,
        prompt_ids=request.token_ids[: request.prompt_count],
        parameters={
            "model": fingerprint,
            "sampling": asdict(request.sampling),
            "stop": terms.stops,
            "stop_token_ids": sorted(request.stop_token_ids),
            "max_output_count": request.max_output_count,
            "length_is_bounded": request.length_is_bounded,
            "priority": request.priority,
            "tenant": request.tenant,
            "cache_salt": request.cache_salt,
            "detach_timeout_s": terms.detach_timeout_s,
            "trace": _trace_record(trace) if trace else None,
            "operation": terms.operation,
            "method": terms.method,
            "door_s": answer.accepted_at - answer.received_at,
        },
        keys=tuple(choice.key for choice in request.family),
    )


def _ended_record(choice: Request) -> records.ChoiceEnded:
    assert choice.finish_reason is not None
    return records.ChoiceEnded(choice.key, choice.output_ids, choice.finish_reason.value, choice.error)


def request_of(restored: RestoredRequest, accepted_at: float = 0.0) -> tuple[Request, Terms]:
    """A request as an earlier life of the scheduler left it, with its choices and what they had generated.

    `accepted_at` is on the clock of this life.
    """
    known = restored.parameters
    wall_clock = time.time() - time.monotonic()
    request = Request(
        request_id=restored.request_id,
        token_ids=restored.prompt_ids[:],
        prompt_count=len(restored.prompt_ids),
        max_output_count=known["max_output_count"],
        sampling=Sampling(**known["sampling"]),
        stop_token_ids=frozenset(known["stop_token_ids"]),
        deadline=math.inf if restored.deadline_at is None else restored.deadline_at - wall_clock,
        length_is_bounded=known["length_is_bounded"],
        priority=known["priority"],
        tenant=known["tenant"],
        cache_salt=known["cache_salt"],
        trace=_trace_of(known["trace"]),
    )
    with_choices(request, len(restored.choices))
    for choice, kept in zip(request.family, restored.choices, strict=True):
        choice.key = kept.key
        if kept.output_ids:
            choice.token_ids = restored.prompt_ids + kept.output_ids
        choice.placement_count = kept.placement_count
        choice.attempt = kept.attempt
        if kept.placement_count:
            choice.placed_at = accepted_at  # when it was is not known any more
        if kept.finish_reason is not None:
            choice.state = RequestState.FINISHED
            choice.finish_reason = FinishReason(kept.finish_reason)
            choice.error = kept.error or ""
    told = {name: known[name] for name in ("operation", "method") if name in known}  # not by the release before
    terms = Terms(restored.content_hash, tuple(known["stop"]), known["detach_timeout_s"], is_named=True, **told)
    return request, terms


def answer_of(restored: RestoredRequest, tokenizer: Tokenizer) -> Answer:
    """The answer to a request as an earlier life of the scheduler left it.

    What its users were told is what its tokens give. An end that follows from them counts, whether it was written down
    or not: a stop string, a stop token, the length.
    """
    accepted_at = restored.accepted_at - (time.time() - time.monotonic())
    request, terms = request_of(restored, accepted_at)
    texts = [TextStream(tokenizer, terms.stops) for _ in request.family]
    answer = Answer(request, texts, terms, accepted_at, accepted_at - restored.parameters.get("door_s", 0.0))
    answer.number = restored.number
    if restored.ended_at is not None:
        answer.known_end = restored.ended_at - (time.time() - time.monotonic())
    return answer


def replay_output(answer: Answer, choice: int) -> tuple[int, FinishReason] | None:
    """Put the known tokens of a choice into its stream; returns its end, (output count, reason), if it came to one.

    When the first of them came is not known any more; it counts as the moment of acceptance.
    """
    stream, request = answer.streams[choice], answer.request.family[choice]
    for output_count, token in enumerate(request.output_ids, start=1):
        stopped_at = stream.push(token, answer.accepted_at)
        if stopped_at is not None:
            return stopped_at, FinishReason.STOP
        if token in request.stop_token_ids:
            return output_count, FinishReason.STOP
        if output_count == request.max_output_count:
            return output_count, FinishReason.LENGTH
    if request.finish_reason is not None:
        return request.output_count, request.finish_reason
    return None


def owner_of(choice: RestoredChoice, incarnations: Mapping[str, int]) -> str:
    """The executor that may still have a choice; "" when it has none, or that process is gone."""
    name = choice.executor_id
    return name if name is not None and incarnations.get(name) == choice.incarnation else ""


def _trace_record(trace: TraceContext) -> list[str | int]:
    return [trace.trace_id.hex(), trace.span_id.hex(), trace.flags, trace.parent_id.hex()]


def _trace_of(value: Any) -> TraceContext | None:
    if not value:
        return None
    trace_id, span_id, flags, *parent = value
    if not parent:  # the release before wrote the caller's span, recorded or not, and made none of its own
        caller = bytes.fromhex(span_id) if flags & SAMPLED else b""
        return TraceContext(bytes.fromhex(trace_id), secrets.token_bytes(8), flags, caller)
    return TraceContext(bytes.fromhex(trace_id), bytes.fromhex(span_id), flags, bytes.fromhex(parent[0]))
