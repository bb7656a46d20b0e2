"""An InferenceService in this process that does what a test wrote down, and remembers what it was asked."""

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from queue import Queue

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server


@dataclass(frozen=True)
class Fail:
    """End the call with this status."""

    code: grpc.StatusCode
    details: str = "as scripted"
    retry_after_s: float | None = None

    def end(self, context: grpc.ServicerContext) -> None:
        if self.retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            detail = Any()
            detail.Pack(RetryInfo(retry_delay=delay))
            status = Status(code=self.code.value[0], message=self.details, details=[detail])
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(self.code, self.details)


@dataclass(frozen=True)
class Wait:
    """Send nothing until `event` is set or the call has ended."""

    event: threading.Event = field(default_factory=threading.Event)


UNAVAILABLE = Fail(grpc.StatusCode.UNAVAILABLE, "the scheduler is starting")
BROKEN = Fail(grpc.StatusCode.UNAVAILABLE, "Stream removed (Socket closed)")
USAGE = pb.Usage(
    prompt_token_count=5,
    output_token_count=2,
    queue_us=10,
    first_token_us=20,
    total_us=30,
    cached_prompt_token_count=4,
)
ACCEPTED = pb.GenerateResponse(request_id="scripted", prompt_token_count=5)

_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_ping_strikes", 0),  # as the scheduler: clients may keep quiet streams alive
]

Action = pb.GenerateResponse | Fail | Wait
BatchScript = Callable[[list[pb.GenerateBatchRequest]], Iterable[pb.GenerateBatchResponse | Fail]]


def token_bytes(*ids: int) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def tokens(text: str, *ids: int, choice: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(text=text, token_ids=token_bytes(*ids), choice=choice)


def end_of_choice(
    text: str, *ids: int, choice: int = 0, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_LENGTH
) -> pb.GenerateResponse:
    """The last message of one choice; others still run."""
    return pb.GenerateResponse(text=text, token_ids=token_bytes(*ids), finish_reason=reason, choice=choice)


def last(
    text: str, *ids: int, choice: int = 0, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_LENGTH
) -> pb.GenerateResponse:
    """The last message of all."""
    message = end_of_choice(text, *ids, choice=choice, reason=reason)
    message.usage.CopyFrom(USAGE)
    return message


HELLO = (ACCEPTED, tokens("Hel", 7), last("lo", 8))


def going_on(answer: Iterable[pb.GenerateResponse], request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    """What a server that knows `answer` sends for `request`: the part of each message that its reader does not have.

    Of a choice that the reader has to its end, the server says the end again: it cannot know that the reader knows.
    """
    token_counts = {place.choice: place.output_token_count for place in request.resume_from}
    text_lengths = {place.choice: place.text_length for place in request.resume_from}
    for message in answer:
        part = pb.GenerateResponse()
        part.CopyFrom(message)
        skipped_bytes = min(len(part.token_ids), 4 * token_counts.get(part.choice, 0))
        skipped_text = min(len(part.text), text_lengths.get(part.choice, 0))
        token_counts[part.choice] = token_counts.get(part.choice, 0) - skipped_bytes // 4
        text_lengths[part.choice] = text_lengths.get(part.choice, 0) - skipped_text
        part.token_ids, part.text = part.token_ids[skipped_bytes:], part.text[skipped_text:]
        if part.request_id or part.token_ids or part.text or part.finish_reason:
            yield part


def counted(actions: Iterable[Action], request: pb.GenerateRequest) -> Iterator[Action]:
    """`actions`, with the position of the reader in each piece that does not say one of its own."""
    places = {place.choice: (place.output_token_count, place.text_length) for place in request.resume_from}
    for action in actions:
        if not isinstance(action, pb.GenerateResponse) or action.request_id or action.output_token_count:
            yield action
            continue
        token_count, text_length = places.get(action.choice, (0, 0))
        piece = pb.GenerateResponse()
        piece.CopyFrom(action)
        piece.output_token_count = token_count + len(piece.token_ids) // 4
        piece.text_length = text_length + len(piece.text)
        places[piece.choice] = (piece.output_token_count, piece.text_length)
        yield piece


def answered(message: pb.GenerateBatchRequest, text: str = "") -> pb.GenerateBatchResponse:
    """An output that repeats the prompt in each of its choices."""
    choice = pb.ChoiceOutput(
        text=text or message.request.text, token_ids=token_bytes(message.index), finish_reason=pb.FINISH_REASON_STOP
    )
    choices = [choice] * max(1, message.request.choice_count)
    output = pb.GenerateOutput(request_id=message.request.request_id, choices=choices, usage=USAGE)
    return pb.GenerateBatchResponse(index=message.index, output=output)


def failed(message: pb.GenerateBatchRequest, code: grpc.StatusCode) -> pb.GenerateBatchResponse:
    error = pb.RequestError(code=code.value[0], message="as scripted", request_id=message.request.request_id)
    return pb.GenerateBatchResponse(index=message.index, error=error)


class ScriptedServer(InferenceServiceServicer):
    """Each call takes the next script; without one it gives `answer`, or repeats the prompts of a batch."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.scripts: deque[tuple[Action, ...]] = deque()
        self.answer: tuple[pb.GenerateResponse, ...] = HELLO  # to each `Generate` without a script, from where it says
        self.breaks: deque[int] = deque()  # messages after which each next call breaks that gives `answer`
        self.batch_scripts: deque[BatchScript] = deque()
        self.unary_failures: deque[Fail] = deque()
        self.requests: list[pb.GenerateRequest] = []  # of each attempt at Generate
        self.batches: list[list[pb.GenerateBatchRequest]] = []  # of each attempt at GenerateBatch
        self.cancelled_ids: list[str] = []  # by Cancel
        self.cancels: Queue[str] = Queue()  # the same, to wait for
        self.traceparents: list[str] = []
        self.call_times: list[float] = []
        self.deadlines: list[float | None] = []
        self.broken_off: Queue[bool] = Queue()  # one entry for each `Generate` that ended before its script
        self.target = address
        self.start()

    def start(self) -> None:
        """Listen at the address of before."""
        self._server = grpc.server(ThreadPoolExecutor(8), options=_OPTIONS)
        add_InferenceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.target)
        if self.target.endswith(":0"):
            self.target = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        """Break every connection, and listen no more."""
        self._server.stop(0).wait()

    def restart(self) -> None:
        """Break every connection; the next one is accepted again."""
        self.stop()
        self.start()

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self._note_call(context)
        self.requests.append(request)
        try:
            for action in counted(self._script(request), request):
                if isinstance(action, Fail):
                    action.end(context)
                elif not isinstance(action, Wait):
                    yield action
                elif context.add_callback(action.event.set):  # False: the call has ended already
                    action.event.wait()
                if not context.is_active():
                    raise GeneratorExit
        except GeneratorExit:  # also how grpc drops a generator whose call ended while it sent
            self.broken_off.put(True)

    def _script(self, request: pb.GenerateRequest) -> Iterable[Action]:
        if self.scripts:
            return self.scripts.popleft()
        rest = going_on(self.answer, request)
        return chain(islice(rest, self.breaks.popleft()), [BROKEN]) if self.breaks else rest

    def GenerateBatch(
        self, request_iterator: Iterator[pb.GenerateBatchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateBatchResponse]:
        self._note_call(context)
        messages = list(request_iterator)
        self.batches.append(messages)
        script = self.batch_scripts.popleft() if self.batch_scripts else lambda all_: map(answered, all_)
        for action in script(messages):
            if isinstance(action, Fail):
                action.end(context)
            else:
                yield action

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelResponse:
        self._note_call(context)
        self.cancelled_ids.append(request.request_id)
        self.cancels.put(request.request_id)
        return pb.CancelResponse()

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        self._note_call(context)
        if self.unary_failures:
            self.unary_failures.popleft().end(context)
        return pb.GetModelResponse(
            model=pb.Model(
                name="tiny",
                context_length=2048,
                vocabulary_size=1000,
                end_token_ids=[2, 3],
                has_chat_template=True,
                executor_count=1,
            )
        )

    def _note_call(self, context: grpc.ServicerContext) -> None:
        self.call_times.append(time.monotonic())
        self.deadlines.append(context.time_remaining())
        self.traceparents.extend(value for key, value in context.invocation_metadata() if key == "traceparent")
