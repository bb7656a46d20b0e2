"""Reads what a server answers: the stream of one request, and the whole values."""

from grpc import RpcError

from paceline._calls import Attempts
from paceline._requests import choice_count, unpacked
from paceline.errors import ServerError, error_of_call
from paceline.types import Choice, Chunk, FinishReason, Model, Output, Usage
from paceline.v1 import inference_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class _ChoiceSoFar:
    """What has come of one continuation."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None  # set once it has ended

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer:
    """What has come of one request so far; the streams of both clients are this and a way to wait."""

    def __init__(self, request: pb.GenerateRequest, attempts: Attempts) -> None:
        self._request_id = request.request_id
        self._choice_count = choice_count(request)
        self._attempts = attempts
        self._is_accepted = False  # a first message came; another attempt would repeat tokens
        self._choices: dict[int, _ChoiceSoFar] = {}  # by index, below `_choice_count`; there once a message came for it
        self._output: Output | None = None  # set by the message with the usage, if every choice has ended

    @property
    def request_id(self) -> str:
        """Id by which the request is cancelled and found in logs and traces."""
        return self._request_id

    @property
    def text(self) -> str:
        """The text so far, of choice 0."""
        return self._choice(0).text

    @property
    def texts(self) -> tuple[str, ...]:
        """The text so far of each choice, by index."""
        return tuple(self._choice(index).text for index in range(self._choice_count))

    @property
    def output(self) -> Output:
        """The whole answer, once the last chunk came; `RuntimeError` before that."""
        if self._output is None:
            raise RuntimeError(f"request {self.request_id} has no output before its last chunk; read `text` instead")
        return self._output

    def _add(self, message: pb.GenerateResponse) -> Chunk | None:
        """Take in one message; None where it brings nothing new for the reader."""
        self._is_accepted = True
        if message.choice >= self._choice_count:
            raise ServerError(
                f"the server sent a piece of choice {message.choice}, but the request has n={self._choice_count}",
                request_id=self.request_id,
            )
        token_ids = unpacked(message.token_ids)
        choice = self._choices.setdefault(message.choice, _ChoiceSoFar())
        choice.texts.append(message.text)
        choice.token_ids.extend(token_ids)
        finish_reason = _finish_reason(message.finish_reason) if message.finish_reason else None
        choice.finish_reason = choice.finish_reason or finish_reason
        usage = _usage(message.usage) if message.HasField("usage") else None
        if usage is not None and (choices := self._whole_choices()):
            self._output = _output(self.request_id, choices, usage)
        if not (message.text or token_ids or finish_reason or usage):
            return None
        return Chunk(message.text, token_ids, finish_reason, usage, message.choice)

    def _choice(self, index: int) -> _ChoiceSoFar:
        return self._choices.get(index) or _ChoiceSoFar()

    def _whole_choices(self) -> tuple[Choice, ...]:
        """All choices by index once every one has ended; none before."""
        choices = tuple(
            Choice(index, choice.text, tuple(choice.token_ids), choice.finish_reason)
            for index, choice in sorted(self._choices.items())
            if choice.finish_reason is not None
        )
        return choices if len(choices) == self._choice_count else ()

    def _wait_s(self, failure: RpcError) -> float:
        """Seconds to wait before the request is sent again; raises where that would repeat tokens or cannot help."""
        if self._is_accepted:
            token_count = sum(len(choice.token_ids) for choice in self._choices.values())
            raise error_of_call(failure, self.request_id, f" (after {token_count} tokens)")
        return self._attempts.wait_s(error_of_call(failure, self.request_id))

    def _check_complete(self) -> None:
        """The server ended the stream without an error: it must have said why each choice ended, and the usage."""
        if self._output is not None:
            return
        for index in range(self._choice_count):
            if self._choice(index).finish_reason is None:
                raise ServerError(
                    f"the stream ended without a finish reason for choice {index}", request_id=self.request_id
                )
        raise ServerError("the stream ended without the usage of the request", request_id=self.request_id)


def output_of(message: pb.GenerateOutput, request: pb.GenerateRequest) -> Output | ServerError:
    """One output of a batch; an error if it does not have the choices that `request` asked for."""
    if len(message.choices) != choice_count(request):
        return ServerError(
            f"the server answered with {len(message.choices)} choices, but the request has n={choice_count(request)}",
            request_id=request.request_id,
        )
    choices = tuple(
        Choice(index, choice.text, unpacked(choice.token_ids), _finish_reason(choice.finish_reason))
        for index, choice in enumerate(message.choices)
    )
    return _output(message.request_id, choices, _usage(message.usage))


def model_of(message: pb.Model) -> Model:
    """The model that a server describes."""
    return Model(
        message.name,
        message.context_length,
        message.vocabulary_size,
        tuple(message.end_token_ids),
        message.has_chat_template,
        message.executor_count,
    )


def _output(request_id: str, choices: tuple[Choice, ...], usage: Usage) -> Output:
    first = choices[0]
    return Output(request_id, first.text, first.token_ids, first.finish_reason, usage, choices)


def _finish_reason(number: pb.FinishReason.ValueType) -> FinishReason:
    return _FINISH_REASONS.get(number, FinishReason.STOP)  # a reason newer than this client still ended the choice


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        message.prompt_token_count,
        message.output_token_count,
        message.queue_us,
        message.first_token_us,
        message.total_us,
        message.recomputation_count,
        message.cached_prompt_token_count,
    )
