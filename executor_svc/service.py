"""The step stream, seen from the executor: fences, hands plans to the model thread, sends results back."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
import structlog

from common.processes import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION
from executor_svc.executor import BrokenDeviceError, Executor, PlanError
from executor_svc.metrics import ExecutorMetrics
from paceline.internal.v1 import executor_pb2 as pb
from paceline.internal.v1 import executor_pb2_grpc

log = structlog.get_logger()

T = TypeVar("T")

PLANS_IN_FLIGHT = 2
_ANNOUNCEMENT_S = 1.0
_FLUSH_S = 0.005  # gRPC counts a message as written a moment before it has left the process


@dataclass(eq=False)
class Announcement:
    """A step is about to run; it waits until that is on its way."""

    started: pb.StepStarted
    is_sent: threading.Event = field(default_factory=threading.Event)


Outcome = pb.Attached | pb.StepResult | Announcement | Exception


@dataclass(eq=False)
class Attachment:
    """One stream from a scheduler. The newest one with the highest epoch owns the executor."""

    epoch: int
    scheduler_id: str
    resume: bool  # goes on with what the one before it left
    outcomes: asyncio.Queue[Outcome | None] = field(default_factory=asyncio.Queue)
    unanswered_count: int = 0
    over: bool = False  # its plans are not to be run any more


class ModelThread:
    """The one thread in which the model runs: takes plans in order, gives outcomes to the loop."""

    def __init__(
        self, executor: Executor, loop: asyncio.AbstractEventLoop, metrics: ExecutorMetrics | None = None
    ) -> None:
        """Start the thread; `metrics` are told of each step."""
        self._executor = executor
        self._metrics = metrics
        self._loop = loop
        self._plans: queue.SimpleQueue[tuple[Attachment, pb.Plan | None, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def begin(self, attachment: Attachment) -> None:
        """Say what is there, or forget it, before the first plan of this attachment."""
        self._plans.put((attachment, None, time.perf_counter()))

    def forget(self, attachment: Attachment) -> None:
        """Forget what this attachment has left, unless another one has taken it over."""
        attachment.over = False
        attachment.resume = False
        self._plans.put((attachment, None, time.perf_counter()))

    def submit(self, attachment: Attachment, plan: pb.Plan) -> None:
        """Run a plan after those before it."""
        self._plans.put((attachment, plan, time.perf_counter()))

    def stop(self) -> None:
        """End after the plan that runs now, some time soon."""
        self._plans.put(None)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; returns whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        free_at = time.perf_counter()
        while (item := self._plans.get()) is not None:
            attachment, plan, came_at = item
            if attachment.over:
                continue
            if plan is None:
                self._tell(attachment, self._begin(attachment))
                continue
            if plan.announces:
                self._announce(attachment, plan.step)
            started_at = time.perf_counter()
            outcome = self._execute(plan, attachment.epoch)
            if isinstance(outcome, pb.StepResult):
                outcome.timings.queued_us = round((started_at - came_at) * 1e6)
                outcome.timings.idle_us = min(round(max(came_at - free_at, 0.0) * 1e6), 0xFFFFFFFF)
            free_at = time.perf_counter()
            self._tell(attachment, outcome)
            if self._metrics is not None and isinstance(outcome, pb.StepResult):
                self._metrics.note_step(plan, outcome)  # the scheduler need not wait for it

    def _tell(self, attachment: Attachment, outcome: Outcome) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(attachment.outcomes.put_nowait, outcome)

    def _begin(self, attachment: Attachment) -> pb.Attached | Exception:
        try:
            if not attachment.resume:
                self._executor.reset()
            return self._executor.inventory()
        except Exception as error:  # noqa: BLE001  the attachment ends with it, the thread goes on
            self._executor.reset()
            return error

    def _announce(self, attachment: Attachment, step: int) -> None:
        """Say that a step begins, and wait until it is said: the process may not live to say anything after it."""
        announcement = Announcement(pb.StepStarted(step=step))
        self._tell(attachment, announcement)
        announcement.is_sent.wait(_ANNOUNCEMENT_S)
        time.sleep(_FLUSH_S)

    def _execute(self, plan: pb.Plan, epoch: int) -> pb.StepResult | Exception:
        try:
            return self._executor.execute(plan, epoch)
        except Exception as error:  # noqa: BLE001  the attachment ends with it, the thread goes on
            self._executor.reset()  # it may have taken in half of the plan: nobody must go on from there
            return error


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
