"""Reads what a server answers: the stream of one request, and the whole values."""

from grpc import RpcError, StatusCode

from paceline._calls import Attempts
from paceline._requests import choice_count, unpacked
from paceline._tracing import CallSpan
from paceline.errors import PacelineError, ServerError, ended_without_a_word, error_of_call, is_own_time_out
from paceline.types import Choice, Chunk, FinishReason, Model, Output, Usage
from paceline.v1 import inference_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class _ChoiceSoFar:
    """What has come of one continuation."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.texts: list[str] = []
        self.text_length = 0  # of all `texts`, in code points
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None  # set once it has ended

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, message: pb.GenerateResponse, request_id: str) -> tuple[int, ...]:
        """Append what `message` brings, and return its tokens; `ServerError` unless it follows what there is."""
        token_ids = unpacked(message.token_ids)
        token_count = message.output_token_count - len(token_ids)
        text_length = message.text_length - len(message.text)
        if (token_count, text_length) != (len(self.token_ids), self.text_length):
            raise ServerError(
                f"the server goes on after {token_count} tokens and {text_length} characters of choice {self.index}, "
                f"but {len(self.token_ids)} tokens and {self.text_length} characters had come",
                request_id=request_id,
            )
        self.texts.append(message.text)
        self.text_length += len(message.text)
        self.token_ids.extend(token_ids)
        return token_ids


class Answer:
    """What has come of one request so far; the streams of both clients are this and a way to wait.

    A call that breaks is followed by another, which goes on where the answer so far ends.
    """

    def __init__(self, request: pb.GenerateRequest, attempts: Attempts, span: CallSpan) -> None:
        self._request = request
        self._span = span
        self._request_id = request.request_id
        self._choice_count = choice_count(request)
        self._attempts = attempts
        self._is_accepted = False  # a first message came: the server runs the request also if this call breaks
        self._is_awaited = False  # some call broke off without a word: the server may run it, and is worth patience
        self._is_answered = False  # a first message came in the present call
        self._is_over = False  # ended, failed or left: nothing more comes, and there is nothing to cancel
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
        self._is_accepted = self._is_answered = True
        has_usage = message.HasField("usage")
        if not (message.text or message.token_ids or message.finish_reason or has_usage):
            return None  # the first message of a call
        if message.choice >= self._choice_count:
            raise ServerError(
                f"the server sent a piece of choice {message.choice}, but the request has n={self._choice_count}",
                request_id=self.request_id,
            )
        choice = self._choices.setdefault(message.choice, _ChoiceSoFar(message.choice))
        token_ids = choice.add(message, self.request_id)
        finish_reason = None
        if message.finish_reason and choice.finish_reason is None:  # after a break the server says it once more
            finish_reason = choice.finish_reason = _finish_reason(message.finish_reason)
        usage = _usage(message.usage) if has_usage else None
        if not (message.text or token_ids or finish_reason or usage):
            return None
        self._attempts.note_progress()
        self._span.note_chunk()  # before the end of the span: an answer may be one chunk
        if usage is not None and (choices := self._whole_choices()):
            self._output = _output(self.request_id, choices, usage)
            self._is_over = True
            self._span.end(self._output)
        return Chunk(message.text, token_ids, finish_reason, usage, message.choice)

    def _next_request(self) -> pb.GenerateRequest:
        """What the next call sends: the request, and where its answer goes on."""
        self._is_answered = False
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        for index, choice in self._choices.items():
            request.resume_from.add(
                choice=index, output_token_count=len(choice.token_ids), text_length=choice.text_length
            )
        return request

    def _choice(self, index: int) -> _ChoiceSoFar:
        return self._choices.get(index) or _ChoiceSoFar(index)

    def _whole_choices(self) -> tuple[Choice, ...]:
        """All choices by index once every one has ended; none before."""
        choices = tuple(
            Choice(index, choice.text, tuple(choice.token_ids), choice.finish_reason)
            for index, choice in sorted(self._choices.items())
            if choice.finish_reason is not None
        )
        return choices if len(choices) == self._choice_count else ()

    def _wait_s(self, failure: RpcError) -> float:
        """Seconds to wait before the next call; raises the error of `failure` where there is none."""
        note = self._note(is_own_time_out(failure))
        error = error_of_call(failure, self.request_id, note, self._attempts.timeout_s)
        try:
            if not self._is_accepted and not self._is_worth_patience(error):
                return self._attempts.wait_s(error)
            if self._is_answered and error.code is not StatusCode.UNAVAILABLE:
                raise error  # the server's last word on a request that it had taken
            return self._attempts.wait_after_break_s(error, was_answered=self._is_answered)
        except PacelineError:
            self._is_over = True
            raise

    def _is_worth_patience(self, error: PacelineError) -> bool:
        """Whether to wait for a server that has not said yet that it has the request."""
        self._is_awaited = self._is_awaited or ended_without_a_word(error)
        return self._is_awaited and error.code is StatusCode.UNAVAILABLE and self._attempts.patience_s > 0

    def _note(self, is_late: bool) -> str:
        """How far the answer had come, for the message of its error; `is_late`: which says that time was over."""
        away_s = self._attempts.away_s
        if not self._is_accepted:
            return f" (after {away_s:.1f} s without the server)" if away_s else ""
        token_count = sum(len(choice.token_ids) for choice in self._choices.values())
        tokens = "1 token" if token_count == 1 else f"{token_count} tokens"
        came = f"{tokens} came" if is_late else f"after {tokens}"
        then = f", then {away_s:.1f} s without the server" if away_s else ""
        return f"; {came}{then}" if is_late else f" ({came}{then})"

    def _leave(self) -> bool:
        """Nobody reads on; returns whether the server has to be told, since the request outlives its call."""
        self._span.end()
        was_over, self._is_over = self._is_over, True
        return self._runs_on and not was_over

    @property
    def _runs_on(self) -> bool:
        """Whether the request goes on when its call ends."""
        return self._request.detach_timeout_s > 0

    def _check_complete(self) -> None:
        """The server ended the stream without an error: it must have said why each choice ended, and the usage."""
        if self._output is not None:
            return
        self._is_over = True
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
