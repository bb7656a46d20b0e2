"""The step stream, seen from the executor: fences, hands plans to the model's threads, sends results back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import structlog

from common.processes import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION
from executor_svc.executor import BrokenDeviceError, PlanError
from executor_svc.model_thread import PLANS_IN_FLIGHT, Announcement, Attachment, ModelThread
from paceline.internal.v1 import executor_pb2 as pb
from paceline.internal.v1 import executor_pb2_grpc

log = structlog.get_logger()

T = TypeVar("T")


class ExecutorService(executor_pb2_grpc.ExecutorServiceServicer):
    """Lets one scheduler at a time drive this executor."""

    def __init__(
        self, thread: ModelThread, incarnation: int, resume_window_s: float, on_broken: Callable[[str], None]
    ) -> None:
        """Serve the executor behind `thread`, and keep its state for `resume_window_s` after a stream has broken off;
        `on_broken` is called once when its device is beyond help.
        """
        self._thread = thread
        self._incarnation = incarnation
        self._resume_window_s = resume_window_s
        self._on_broken = on_broken
        self._attachment: Attachment | None = None
        self._highest: tuple[int, str] = (0, "")  # epoch and scheduler that attached last
        self._forgetting: asyncio.TimerHandle | None = None  # runs while state is kept and nobody is attached
        self.let_go = asyncio.Event()  # the scheduler has nothing left here, and wants nothing any more
        self.detached = asyncio.Event()  # set while no scheduler is attached
        self.detached.set()

    async def Attach(  # type: ignore[override]  # grpc.aio also takes handlers that read and write
        self,
        request_iterator: object,
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Serve one attachment until either side ends it."""
        attachment = self._take_over(await _fenced(self._open(context), context))
        reader = asyncio.create_task(self._read_plans(attachment, context))
        writer = asyncio.create_task(self._write_outcomes(attachment, context))
        tasks = (reader, writer)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # The status of a call must not meet a message that is being written: gRPC would send neither.
            attachment.outcomes.put_nowait(None)
            await asyncio.wait((writer,))
            for task in tasks:
                if task.done():
                    await _fenced(task, context)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._end(attachment)

    def _end(self, attachment: Attachment) -> None:
        attachment.over = True
        log.info("scheduler detached", epoch=attachment.epoch)
        if self._attachment is not attachment:
            return  # another one took over
        self._attachment = None
        self.detached.set()
        window_s = 0.0 if self.let_go.is_set() else self._resume_window_s
        loop = asyncio.get_running_loop()
        self._forgetting = loop.call_later(window_s, self._thread.forget, attachment)

    async def _open(self, context: grpc.aio.ServicerContext) -> tuple[int, str, bool]:
        """Read and check the first message; returns the epoch, the scheduler's name, and whether it resumes."""
        first = await context.read()
        if first is grpc.aio.EOF or first.WhichOneof("message") != "attach":
            raise _Refusal(grpc.StatusCode.INVALID_ARGUMENT, "the first message of an attachment must be `attach`")
        if first.incarnation != self._incarnation:
            raise _stale("incarnation", first.incarnation, self._incarnation)
        if not OLDEST_PROTOCOL_VERSION <= first.attach.protocol_version <= PROTOCOL_VERSION:
            raise _stale("protocol version", first.attach.protocol_version, PROTOCOL_VERSION)
        epoch, scheduler_id = self._highest
        if first.epoch < epoch or (first.epoch == epoch and first.attach.scheduler_id != scheduler_id):
            raise _Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"epoch {first.epoch} of scheduler '{first.attach.scheduler_id}' is stale: scheduler "
                f"'{scheduler_id}' has been attached with epoch {epoch}",
            )
        return first.epoch, first.attach.scheduler_id, first.attach.resume

    def _take_over(self, opening: tuple[int, str, bool]) -> Attachment:
        epoch, scheduler_id, _ = opening
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        if self._attachment is not None:
            self._attachment.over = True
            self._attachment.outcomes.put_nowait(
                _Refusal(grpc.StatusCode.ABORTED, f"a newer attachment with epoch {epoch} took over")
            )
        self._highest = (epoch, scheduler_id)
        self._attachment = Attachment(*opening)
        self.detached.clear()
        self._thread.begin(self._attachment)
        log.info("scheduler attached", epoch=epoch, scheduler_id=scheduler_id, resumes=self._attachment.resume)
        return self._attachment

    async def _read_plans(self, attachment: Attachment, context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            if message.epoch != attachment.epoch:
                raise _stale("epoch", message.epoch, attachment.epoch)
            if message.incarnation != self._incarnation:
                raise _stale("incarnation", message.incarnation, self._incarnation)
            kind = message.WhichOneof("message")
            if kind == "detach":
                self.let_go.set()
                return
            if kind != "plan":
                raise _Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"message '{kind}' in an open attachment")
            attachment.unanswered_count += 1
            if attachment.unanswered_count > PLANS_IN_FLIGHT:
                raise _Refusal(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"plan {message.plan.step} is the third without a result; the limit is {PLANS_IN_FLIGHT}",
                )
            self._thread.submit(attachment, message.plan)

    async def _write_outcomes(self, attachment: Attachment, context: grpc.aio.ServicerContext) -> None:
        while (outcome := await attachment.outcomes.get()) is not None:
            if isinstance(outcome, pb.Attached):
                await context.write(self._message(attachment, attached=outcome))
                continue
            if isinstance(outcome, Announcement):
                await context.write(self._message(attachment, started=outcome.started))
                outcome.is_sent.set()
                continue
            if isinstance(outcome, PlanError):
                raise _Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(outcome))
            if isinstance(outcome, BrokenDeviceError):
                self._on_broken(str(outcome))
                raise _Refusal(grpc.StatusCode.INTERNAL, str(outcome))
            if isinstance(outcome, _Refusal):
                raise outcome
            if isinstance(outcome, Exception):
                log.error("a plan could not be run", exc_info=outcome)
                reason = f"a plan could not be run, by a mistake of the executor's: {outcome!r}"
                raise _Refusal(grpc.StatusCode.UNKNOWN, reason)
            attachment.unanswered_count -= 1
            await context.write(self._message(attachment, result=outcome))

    def _message(
        self,
        attachment: Attachment,
        attached: pb.Attached | None = None,
        result: pb.StepResult | None = None,
        started: pb.StepStarted | None = None,
    ) -> pb.ExecutorMessage:
        return pb.ExecutorMessage(
            epoch=attachment.epoch, incarnation=self._incarnation, attached=attached, result=result, started=started
        )


class _Refusal(Exception):  # noqa: N818  not an error of ours: it becomes the status of the call
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def _stale(what: str, theirs: int, ours: int) -> _Refusal:
    return _Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"{what} {theirs} is not the {ours} of this executor")


async def _fenced(awaitable: Awaitable[T], context: grpc.aio.ServicerContext) -> T:
    """Await; a refusal becomes the status of the call."""
    try:
        return await awaitable
    except _Refusal as refusal:
        log.info("attachment ended", reason=str(refusal), code=refusal.code.name)
        await context.abort(refusal.code, str(refusal))
        raise
