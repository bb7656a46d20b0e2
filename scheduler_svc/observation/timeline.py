"""What became of one request, moment by moment: what traces, the overview and histograms are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.spans import Value
from scheduler_svc.answers import Answer
from scheduler_svc.core.request import TraceContext
from scheduler_svc.observation.step_meter import Phases
from scheduler_svc.observation.waits import Wait

MOST_RUNS = 32
"""Chunks of one attempt that are kept apart; those after them are counted with the last."""

MOST_MOMENTS = 64
MOST_ATTEMPTS = 64
"""Attempts of one request that are kept: the first ones, the last ones, and those that go on."""

DOOR_S = 0.05
"""From so many seconds between its receipt and its acceptance on, a request has waited at the door, whatever for."""

MOST_CHOICES = 8
"""Choices of one request whose attempts are kept."""


@dataclass(slots=True)
class Run:
    """A chunk of known tokens on its way through a step; several, where there were too many to keep apart."""

    step: int
    start: int  # tokens [start, start + token_count) of the request
    token_count: int
    began_at: float  # its plan was made
    ended_at: float | None = None  # its result was in; None: it runs, or never came back
    phases: Phases | None = None
    chunk_count: int = 1

    @classmethod
    def of_several(cls, runs: Sequence[Run]) -> Run:
        """These as one, from the first to the last."""
        ends = [run.ended_at for run in runs if run.ended_at is not None]
        return cls(
            runs[0].step,
            runs[0].start,
            sum(run.token_count for run in runs),
            runs[0].began_at,
            max(ends) if len(ends) == len(runs) else None,
            chunk_count=sum(run.chunk_count for run in runs),
        )


@dataclass(slots=True)
class Attempt:
    """One placement of a choice on an executor."""

    choice: int
    executor_id: str
    began_at: float
    serial: int = 0  # how many its choice had before
    waited_for: tuple[str, ...] = ()  # what its choice waited for before it
    runs: list[Run] = field(default_factory=list)
    decoding_at: float | None = None  # its known tokens were computed and the next one was there
    ended_at: float | None = None
    ending: str = ""  # why it left the executor, where the request goes on
    begun_phases: Phases = field(default_factory=Phases)  # the executor's sums when it began to decode
    begun_step_count: int = 0
    decode_phases: Phases | None = None  # what the steps took in which it decoded, when it was summed up last
    decode_step_count: int = 0
    step_links: list[tuple[bytes, bytes]] = field(default_factory=list)  # (trace id, span id) of recorded steps

    def end(self, now: float, ending: str) -> None:
        """It has left its executor."""
        if self.ended_at is None:
            self.ended_at, self.ending = now, ending


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened to a request."""

    at: float
    name: str
    facts: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a request: so far, or as it ended."""

    prompt_count: int
    reused_count: int
    output_counts: tuple[int, ...]  # by choice
    first_token_at: float | None
    outcomes: tuple[str, ...] = ()  # why each choice ended; () while one goes on
    error: str = ""
    recomputation_count: int = 0

    @classmethod
    def of(cls, answer: Answer) -> Summary:
        """As it is now."""
        family = answer.request.family
        reasons = [stream.finish_reason for stream in answer.streams]
        has_ended = answer.has_ended
        return cls(
            answer.request.prompt_count,
            answer.request.reused_count,
            tuple(len(stream.token_ids) for stream in answer.streams),
            answer.first_token_at,
            tuple(reason.value for reason in reasons if reason) if has_ended else (),
            next((choice.error for choice in family if choice.error), "") if has_ended else "",
            sum(max(0, choice.placement_count - 1) for choice in family),
        )

    @property
    def output_count(self) -> int:
        """Tokens of all choices."""
        return sum(self.output_counts)

    @property
    def outcome(self) -> str:
        """The one that says most: what went wrong with any choice, before a good end; "" while it goes on."""
        return next((outcome for outcome in _BY_WEIGHT if outcome in self.outcomes), "")


_BY_WEIGHT = ("error", "deadline", "cut off", "cancelled", "length", "stop")


@dataclass(slots=True, eq=False)
class Timeline:
    """One request, from its receipt here to its end. All times are on the clock of the event loop, in seconds."""

    request_id: str
    trace: TraceContext
    received_at: float  # what users see of it begins here
    accepted_at: float
    facts: dict[str, str | int | float]  # what was asked for, under the names of spans' attributes
    choice_count: int
    tenant: str
    max_output_count: int
    answer: Answer | None  # until it has ended
    wall_ns: int  # nanoseconds since 1970 when that clock was at 0, by the clock of the world at the acceptance
    held_for: tuple[str, ...] = ()  # what it was held at the door for
    is_accepted: bool = True  # else it is at the door, or was turned away there, and was so at `accepted_at`
    restored_at: float | None = None  # when it was taken up here; None: it began in this life of the scheduler
    attempts: list[Attempt] = field(default_factory=list)
    attempt_counts: dict[int, int] = field(default_factory=dict)  # attempts so far, by choice
    waits: dict[int, Wait] = field(default_factory=dict)  # of choices that nobody computes
    moments: list[Moment] = field(default_factory=list)
    prompt_computed_at: float | None = None  # for the first time
    ended_at: float | None = None
    summary: Summary | None = None  # once it has ended

    def note(self, at: float, name: str, **facts: Value) -> None:
        """Keep a moment, if there is still room."""
        if len(self.moments) < MOST_MOMENTS:
            self.moments.append(Moment(at, name, facts))

    def add(self, attempt: Attempt) -> None:
        """It was placed on an executor."""
        if len(self.attempts) >= MOST_ATTEMPTS:
            self._forget_one()
        attempt.serial = self.attempt_counts.get(attempt.choice, 0)
        if (wait := self.waits.pop(attempt.choice, None)) is not None:
            attempt.waited_for = wait.end(attempt.began_at)
        self.attempt_counts[attempt.choice] = attempt.serial + 1
        self.attempts.append(attempt)

    def _forget_one(self) -> None:
        """Make room from the middle on. The last attempt of a choice goes on, or says since when nobody computes it."""
        last = {attempt.choice: attempt for attempt in self.attempts}
        later = range(MOST_ATTEMPTS // 2, len(self.attempts))  # more of them than there are choices
        del self.attempts[next(index for index in later if (one := self.attempts[index]) is not last[one.choice])]

    @property
    def forgotten_count(self) -> int:
        """Attempts that there was no room for."""
        return sum(self.attempt_counts.values()) - len(self.attempts)

    def of_choice(self, choice: int) -> dict[str, Value]:
        """What spans and events of a choice say, where there are several."""
        return {"paceline.choice": choice} if self.choice_count > 1 else {}

    def of_choices(self, choices: Iterable[int]) -> dict[str, Value]:
        """What an event says that is one for these choices."""
        return {"paceline.choices": tuple(choices)} if self.choice_count > 1 else {}

    def ns(self, at: float) -> int:
        """Nanoseconds since 1970."""
        return round(at * 1e9) + self.wall_ns

    @property
    def is_restored(self) -> bool:
        """Whether it began in an earlier life of the scheduler."""
        return self.restored_at is not None

    @property
    def has_waited_at_door(self) -> bool:
        """Whether there is a wait before its acceptance that is worth showing."""
        return bool(self.held_for) or self.accepted_at - self.received_at >= DOOR_S

    @property
    def queued_at(self) -> float:
        """Since when it waits in the queue of this scheduler: where it was before a restart is not known any more."""
        return self.accepted_at if self.restored_at is None else self.restored_at

    def attempt_of(self, choice: int) -> Attempt | None:
        """The attempt of a choice that goes on."""
        for attempt in reversed(self.attempts):
            if attempt.choice == choice:
                return attempt if attempt.ended_at is None else None
        return None

    def summarize(self) -> Summary:
        """Its figures by now."""
        if self.summary is not None:
            return self.summary
        assert self.answer is not None
        return Summary.of(self.answer)

    def end(self, now: float) -> None:
        """Nothing comes any more: keep the figures, and let go of the tokens."""
        self.summary = self.summarize()
        self.ended_at = now
        self.answer = None
        for attempt in self.attempts:
            attempt.end(now, "")
        for wait in self.waits.values():
            wait.end(now)
