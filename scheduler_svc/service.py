"""The gRPC services of the scheduler: what users and executors call."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator

import grpc

from common.errors import RefusedError, invalid
from paceline.v1 import inference_pb2 as pb
from paceline.v1 import inference_pb2_grpc
from scheduler_svc.admission import Admission, Caller
from scheduler_svc.answers import Answer, Piece, Reader
from scheduler_svc.core.request import FinishReason
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet
from scheduler_svc.interceptors import FailedError, Malformed
from scheduler_svc.observation.observer import log_ids
from scheduler_svc.output_stream import OutputStream

_BATCH_REQUESTS = 1024
"""Requests of one batch that may run, or be answered and not written, at once: what an unread batch can hold."""

_FINISH_REASONS: dict[FinishReason | None, pb.FinishReason.ValueType] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves users."""

    def __init__(self, admission: Admission, engine: Engine, fleet: Fleet, model: pb.Model) -> None:
        """Serve `model`; what executors know of it is added when they join."""
        self.admission = admission
        self._engine = engine
        self._fleet = fleet
        self._model = model

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream one answer."""
        reader = await self.admission.accept(request, Caller.of(context, "Generate"))
        accepted = reader.answer.request
        try:
            yield pb.GenerateResponse(request_id=accepted.request_id, prompt_token_count=accepted.prompt_count)
            failure = None
            while failure is None and not reader.is_over:
                stream, piece = await reader.next()
                failure = _failure(stream, piece)
                if failure is None or piece.token_ids:
                    yield _response(reader, stream, piece)
            if failure is not None:
                for stream, piece in reader.rest():
                    if piece.token_ids:
                        yield _response(reader, stream, piece)
                raise failure
        except (RefusedError, grpc.aio.BaseError):
            raise
        except Exception as error:
            raise FailedError(**log_ids(accepted)) from error
        finally:
            self._engine.answers.leave(reader)

    async def GenerateBatch(  # type: ignore[override]  # grpc.aio also takes handlers that read and write
        self,
        request_iterator: object,
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Answer many requests, each whole, as they finish."""
        batch = _Batch(self, context)
        try:
            await batch.run()
        finally:
            await batch.close()

    async def Cancel(self, request: pb.CancelRequest, context: grpc.aio.ServicerContext) -> pb.CancelResponse:
        """End a request by id."""
        self._engine.cancel_id(request.request_id)
        await self._engine.durable()  # a cancelled request does not come back after a restart
        return pb.CancelResponse()

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.GetModelResponse:
        """Describe the model."""
        model = pb.Model()
        model.CopyFrom(self._model)
        limits = self._fleet.limits
        if limits is not None:
            model.context_length = limits.context_length
            model.vocabulary_size = limits.vocabulary_size
            model.end_token_ids.extend(limits.end_token_ids)
        model.executor_count = sum(member.link.is_attached for member in self._fleet.members.values())
        return pb.GetModelResponse(model=model)

    async def whole(self, reader: Reader) -> pb.GenerateOutput:
        """Read an answer to its end. Raises `RefusedError` when it ends badly."""
        while not reader.is_over:
            stream, piece = await reader.next()
            failure = _failure(stream, piece)
            if failure is not None:
                raise failure
        answer = reader.answer
        return pb.GenerateOutput(
            request_id=answer.request.request_id,
            choices=[
                pb.ChoiceOutput(
                    text=stream.text,
                    token_ids=stream.token_ids.tobytes(),
                    finish_reason=_FINISH_REASONS[stream.finish_reason],
                )
                for stream in answer.streams
            ],
            usage=_usage(answer),
        )

    def leave(self, reader: Reader, *, cancels: bool = False) -> None:
        """A reader is gone. With `cancels` its request ends too, if it still runs."""
        if cancels:
            self._engine.cancel(reader.answer.request)
        self._engine.answers.leave(reader)


class _Batch:
    """One `GenerateBatch` call: reads as the queue has room, answers in any order."""

    def __init__(self, service: InferenceService, context: grpc.aio.ServicerContext) -> None:
        self._service = service
        self._context = context
        self._seen: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[Reader] = set()
        self._unwritten = asyncio.Semaphore(_BATCH_REQUESTS)
        self._answers: asyncio.Queue[pb.GenerateBatchResponse | None] = asyncio.Queue()
        self._mistake: BaseException | None = None  # of ours, in the answer to one of its requests

    async def run(self) -> None:
        """Serve until the caller has closed its side and every output is written."""
        reading = asyncio.create_task(self._read())
        self._tasks.add(reading)
        while (answer := await self._answers.get()) is not None:
            await self._context.write(answer)
            self._unwritten.release()
        if self._mistake is not None:
            raise self._mistake
        await reading

    async def close(self) -> None:
        """Stop reading what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for reader in self._open:
            self._service.leave(reader)

    async def _read(self) -> None:
        """Let one request in after the other: what the queue has no room for is not even read."""
        admission, answering = self._service.admission, set[asyncio.Task[None]]()
        try:
            while await self._unwritten.acquire() and (message := await self._context.read()) is not grpc.aio.EOF:
                if isinstance(message, Malformed):
                    raise admission.refused(message.error)
                if message.index in self._seen:
                    raise self._service.admission.refused(
                        invalid(f"index {message.index} was used twice in this batch")
                    )
                self._seen.add(message.index)
                try:
                    message.request.ClearField("resume_from")  # outputs come whole
                    caller = Caller.of(self._context, "GenerateBatch", waits=True)
                    reader = await admission.accept(message.request, caller)
                except RefusedError as error:
                    self._refuse(message.index, message.request.request_id, error)
                    continue
                self._open.add(reader)
                task = asyncio.create_task(self._answer(message.index, reader))
                task.add_done_callback(self._look_for_mistake)
                for tasks in (answering, self._tasks):
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            if answering:
                await asyncio.wait(answering)
        finally:
            self._answers.put_nowait(None)

    async def _answer(self, index: int, reader: Reader) -> None:
        try:
            output = await self._service.whole(reader)
        except RefusedError as error:
            is_interrupted = error.code is grpc.StatusCode.UNAVAILABLE
            self._service.leave(reader, cancels=not is_interrupted)  # its other choices
            self._refuse(index, reader.answer.request.request_id, error)
        else:
            self._service.leave(reader)
            self._answers.put_nowait(pb.GenerateBatchResponse(index=index, output=output))
        self._open.discard(reader)

    def _look_for_mistake(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (mistake := task.exception()) is not None:
            self._mistake = mistake
            self._answers.put_nowait(None)

    def _refuse(self, index: int, request_id: str, error: RefusedError) -> None:
        failure = pb.RequestError(request_id=request_id, code=error.code_number, message=error.message)
        self._answers.put_nowait(pb.GenerateBatchResponse(index=index, error=failure))


def _response(reader: Reader, stream: OutputStream, piece: Piece) -> pb.GenerateResponse:
    """A piece of the answer as its message; the last one has the usage."""
    ended_well = reader.is_over and piece.finish_reason in _FINISH_REASONS
    return pb.GenerateResponse(
        text=piece.text,
        token_ids=array("I", piece.token_ids).tobytes(),
        output_token_count=piece.output_token_count,
        text_length=piece.text_length,
        finish_reason=_FINISH_REASONS.get(piece.finish_reason, pb.FINISH_REASON_UNSPECIFIED),
        usage=_usage(reader.answer) if ended_well else None,
        choice=stream.request.choice,
    )


def _failure(stream: OutputStream, piece: Piece) -> RefusedError | None:
    """The status of a request of which this piece, the last of a choice, did not end well."""
    request, reason = stream.request, piece.finish_reason
    if reason is FinishReason.CANCELLED:
        return RefusedError(grpc.StatusCode.CANCELLED, f"request '{request.request_id}' was cancelled")
    if reason is FinishReason.DEADLINE:
        return RefusedError(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            request.error or f"the deadline of request '{request.request_id}' passed",
        )
    if reason is FinishReason.CUT_OFF:
        return RefusedError(
            grpc.StatusCode.UNAVAILABLE,
            f"the scheduler shut down before request '{request.request_id}' had ended; send it again",
        )
    if reason is FinishReason.ERROR:
        return RefusedError(grpc.StatusCode.INTERNAL, request.error)
    return None


def _usage(answer: Answer) -> pb.Usage:
    request = answer.request

    def since_acceptance_us(at: float | None) -> int:
        return 0 if at is None else round((at - answer.accepted_at) * 1e6)

    return pb.Usage(
        prompt_token_count=request.prompt_count,
        output_token_count=answer.output_token_count,
        queue_us=max(0, since_acceptance_us(request.placed_at)),
        first_token_us=since_acceptance_us(answer.first_token_at),
        total_us=since_acceptance_us(answer.ended_at),
        recomputation_count=sum(max(0, choice.placement_count - 1) for choice in request.family),
        cached_prompt_token_count=request.reused_count,
    )
