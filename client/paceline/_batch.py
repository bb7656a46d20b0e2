"""The bookkeeping of one `generate_batch`: what is still to be answered, and what came back."""

from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as shortened
from typing import Any, Literal, TypeAlias

from grpc import StatusCode

from paceline._answer import output_of
from paceline._calls import Attempts, is_retryable
from paceline._requests import generate_request, with_defaults
from paceline.errors import (
    InvalidRequest,
    PacelineError,
    ServerError,
    at_prompt,
    ended_without_a_word,
    error_of,
    error_of_number,
    reached_nobody,
)
from paceline.types import Output, Prompt
from paceline.v1 import inference_pb2 as pb

BatchPrompt: TypeAlias = Prompt | Mapping[str, Any]
"""A prompt, or a dict of the arguments of `generate` for it: `{"prompt": "Once", "max_output_tokens": 8}`.
A conversation may stand under `"messages"` instead."""

OnError: TypeAlias = Literal["raise", "return"]
OnProgress: TypeAlias = Callable[[int, int], object]

_MOST_CANCELS = 1024
"""Requests of one batch that are cancelled one by one. A server does not let in more than that of a batch at once, and
takes them in order, so that those behind were not begun."""


class Batch:
    """Requests with an outcome, requests without, and what decides whether the latter are sent again.

    Outputs come whole and ids are those of before, so sending an unanswered request again never repeats or runs
    anything twice: a request that meets a full or restarting server stays unanswered until the retries are used up, or
    after a call that broke, the patience. Each outcome makes all of both available again.
    """

    def __init__(
        self,
        prompts: Iterable[BatchPrompt],
        options: Mapping[str, Any],
        attempts: Attempts,
        on_progress: OnProgress | None,
        on_error: OnError,
    ) -> None:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        self._attempts = attempts
        self._on_progress = on_progress
        self._on_error = on_error
        self._outcomes: list[Output | PacelineError | None] = []  # in the order of the prompts
        self._done_count = 0  # outcomes that are not None
        self._unanswered: dict[int, pb.GenerateRequest] = {}  # by index; disjoint from what has an outcome
        self._refusals: dict[int, PacelineError] = {}  # why the last attempt at an unanswered request failed
        self._is_reached = False  # some attempt got through to the server, which may run what it has not answered
        self._is_awaited = False  # it, or who forwards to it, was there and broke off: it is worth patience
        self._is_given_up = False  # no further attempt is made
        refused: dict[int, PacelineError] = {}
        for index, prompt in enumerate(_checked(prompts)):
            self._outcomes.append(None)
            arguments = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
            try:
                self._unanswered[index] = generate_request(**with_defaults(options, arguments))
            except InvalidRequest as error:
                refused[index] = error
        for index, refusal in refused.items():
            self._settle(index, refusal)

    @property
    def is_done(self) -> bool:
        """Whether every request has an outcome."""
        return not self._unanswered

    def messages(self) -> list[pb.GenerateBatchRequest]:
        """What the next attempt sends: every request without an outcome."""
        return [pb.GenerateBatchRequest(index=index, request=request) for index, request in self._unanswered.items()]

    def open_ids(self) -> list[str]:
        """Ids of the requests that may run on when nobody reads their outputs."""
        requests = [] if self._is_given_up else list(self._unanswered.values())[:_MOST_CANCELS]
        return [request.request_id for request in requests if request.detach_timeout_s]

    def add(self, message: pb.GenerateBatchResponse) -> None:
        """Take in one answer; raises its error if that is what the caller asked for."""
        self._is_reached = True  # also where it says that it leaves: it may be back with what it had
        request = self._unanswered.get(message.index)
        if request is None:
            return
        if message.WhichOneof("outcome") == "output":
            self._settle(message.index, output_of(message.output, request))
            return
        error = error_of_number(
            message.error.code, message.error.message, message.error.request_id or request.request_id
        )
        if is_retryable(error):
            self._refusals[message.index] = error
        else:
            self._settle(message.index, error)

    def wait_s(self, failure: PacelineError | None) -> float:
        """Seconds to wait before the next attempt, after one whose call failed with `failure` or, if None, did not.

        Where there is no other attempt, the requests without an outcome fail.
        """
        if self.is_done:
            return 0.0
        try:
            wait = self._wait_or_raise_s(failure)
        except PacelineError as error:
            self._is_given_up = True
            for index, request in list(self._unanswered.items()):
                refusal = self._refusals.get(index)
                self._settle(
                    index, refusal or error_of(error.code, error.message, request.request_id, error.retry_after_s)
                )
            return 0.0
        self._refusals.clear()
        return wait

    def _reason(self) -> PacelineError:
        """Why there are requests without an outcome after a call that ended in order."""
        if self._refusals:
            return next(iter(self._refusals.values()))
        return ServerError("the server ended the batch without answering this request")

    def _wait_or_raise_s(self, failure: PacelineError | None) -> float:
        """Seconds to wait before the next attempt; raises where there is none.

        A server that was never there is not worth the patience that is due to one that may have half of the batch. One
        that is back after a break is, also while it refuses what is new, because its executors have yet to find it.
        """
        error = self._reason() if failure is None else failure
        was_answered = not reached_nobody(error)
        if failure is not None:
            self._is_reached = self._is_reached or was_answered
            self._is_awaited = self._is_awaited or self._is_reached or ended_without_a_word(failure)
        if self._is_awaited and error.code is StatusCode.UNAVAILABLE and self._attempts.patience_s:
            return self._attempts.wait_after_break_s(error, was_answered=was_answered)
        return self._attempts.wait_s(error)

    def outcomes(self) -> list[Output | PacelineError]:
        """What came of each request, in the order of the prompts."""
        return [outcome for outcome in self._outcomes if outcome is not None]

    def _settle(self, index: int, outcome: Output | PacelineError) -> None:
        if isinstance(outcome, PacelineError) and self._on_error == "raise":
            raise at_prompt(index, outcome)
        self._outcomes[index] = outcome
        self._unanswered.pop(index, None)
        self._done_count += 1
        self._attempts.note_progress()
        if self._on_progress is not None:
            self._on_progress(self._done_count, len(self._outcomes))


def _checked(prompts: Iterable[BatchPrompt]) -> Iterable[BatchPrompt]:
    """`prompts`, unless it is what can be iterated over but holds no prompts: one text, one dict."""
    if isinstance(prompts, (str, bytes, bytearray, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidRequest(
            f"prompts must be a list of prompts, got the {type(prompts).__name__} {shortened(prompts)}; "
            "put a single prompt into a list",
            StatusCode.INVALID_ARGUMENT,
        )
    return prompts
