"""Reads what a server answers: the stream of one request, and the whole values."""

from grpc import RpcError

from paceline._calls import Attempts
from paceline._requests import unpacked
from paceline.errors import ServerError, error_of_call
from paceline.types import Chunk, FinishReason, Model, Output, Usage
from paceline.v1 import inference_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class Answer:
    """What has come of one request so far; the streams of both clients are this and a way to wait."""

    def __init__(self, request_id: str, attempts: Attempts) -> None:
        self._request_id = request_id
        self._attempts = attempts
        self._is_accepted = False  # a first message came; another attempt would repeat tokens
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._output: Output | None = None  # set by the message with the finish reason

    @property
    def request_id(self) -> str:
        """Id by which the request is cancelled and found in logs and traces."""
        return self._request_id

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def output(self) -> Output:
        """The whole answer, once the last chunk came; `RuntimeError` before that."""
        if self._output is None:
            raise RuntimeError(f"request {self.request_id} has no output before its last chunk; read `text` instead")
        return self._output

    def _add(self, message: pb.GenerateResponse) -> Chunk | None:
        """Take in one message; None where it brings nothing new for the reader."""
        self._is_accepted = True
        token_ids = unpacked(message.token_ids)
        self._texts.append(message.text)
        self._token_ids.extend(token_ids)
        if not message.finish_reason:
            return Chunk(message.text, token_ids) if message.text or token_ids else None
        finish_reason, usage = _finish_reason(message.finish_reason), _usage(message.usage)
        self._output = Output(self.request_id, self.text, tuple(self._token_ids), finish_reason, usage)
        return Chunk(message.text, token_ids, finish_reason, usage)

    def _wait_s(self, failure: RpcError) -> float:
        """Seconds to wait before the request is sent again; raises where that would repeat tokens or cannot help."""
        if self._is_accepted:
            raise error_of_call(failure, self.request_id, f" (after {len(self._token_ids)} tokens)")
        return self._attempts.wait_s(error_of_call(failure, self.request_id))

    def _check_complete(self) -> None:
        """The server ended the stream without an error: it must have said why the request ended."""
        if self._output is None:
            raise ServerError("the stream ended without a finish reason", request_id=self.request_id)


def output_of(message: pb.GenerateOutput) -> Output:
    """One output of a batch."""
    return Output(
        message.request_id,
        message.text,
        unpacked(message.token_ids),
        _finish_reason(message.finish_reason),
        _usage(message.usage),
    )


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


def _finish_reason(number: pb.FinishReason.ValueType) -> FinishReason:
    return _FINISH_REASONS.get(number, FinishReason.STOP)  # a reason newer than this client still ended the request


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        message.prompt_token_count,
        message.output_token_count,
        message.queue_us,
        message.first_token_us,
        message.total_us,
        message.recomputation_count,
    )
