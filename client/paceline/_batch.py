"""The bookkeeping of one `generate_batch`: what is still to be answered, and what came back."""

from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as shortened
from typing import Any, Literal, TypeAlias

from grpc import RpcError, StatusCode

from paceline._answer import output_of
from paceline._calls import Attempts
from paceline._requests import generate_request, with_defaults
from paceline.errors import (
    InvalidRequest,
    PacelineError,
    ServerError,
    at_prompt,
    error_of,
    error_of_call,
    error_of_number,
)
from paceline.types import Output, Prompt
from paceline.v1 import inference_pb2 as pb

BatchPrompt: TypeAlias = Prompt | Mapping[str, Any]
"""A prompt, or a dict of the arguments of `generate` for it: `{"prompt": "Once", "max_output_tokens": 8}`.
A conversation may stand under `"messages"` instead."""

OnError: TypeAlias = Literal["raise", "return"]
OnProgress: TypeAlias = Callable[[int, int], object]


class Batch:
    """Requests with an outcome, requests without, and what decides whether the latter are sent again.

    Outputs come whole, so sending an unanswered request again never repeats anything: a request that meets a full or
    restarting server stays unanswered until the retries are used up. Each outcome makes all retries available again.
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

    def add(self, message: pb.GenerateBatchResponse) -> None:
        """Take in one answer; raises its error if that is what the caller asked for."""
        request = self._unanswered.get(message.index)
        if request is None:
            return
        if message.WhichOneof("outcome") == "output":
            self._settle(message.index, output_of(message.output, request))
            return
        error = error_of_number(
            message.error.code, message.error.message, message.error.request_id or request.request_id
        )
        if self._attempts.is_retryable(error):
            self._refusals[message.index] = error
        else:
            self._settle(message.index, error)

    def wait_s(self, failure: RpcError | None) -> float:
        """Seconds to wait before the next attempt, after one that ended with `failure` or, if None, in order.

        Where there is no other attempt, the requests without an outcome fail.
        """
        if self.is_done:
            return 0.0
        if failure is not None:
            reason = error_of_call(failure)
        elif self._refusals:
            reason = next(iter(self._refusals.values()))
        else:
            reason = ServerError("the server ended the batch without answering this request")
        try:
            wait = self._attempts.wait_s(reason)
        except PacelineError as error:
            for index, request in list(self._unanswered.items()):
                refusal = self._refusals.get(index)
                self._settle(
                    index, refusal or error_of(error.code, error.message, request.request_id, error.retry_after_s)
                )
            return 0.0
        self._refusals.clear()
        return wait

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
