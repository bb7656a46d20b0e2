"""The threads of the model: one takes plans in order and begins their steps, the other waits for what is on its way."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from dataclasses import dataclass, field

import structlog

from executor_svc.executor import Begun, Executor
from executor_svc.metrics import ExecutorMetrics
from paceline.internal.v1 import executor_pb2 as pb

log = structlog.get_logger()

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


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was begun, and whom to tell of it."""

    attachment: Attachment
    plan: pb.Plan
    came_at: float
    begun: Begun


class ModelThread:
    """Takes plans in order, gives outcomes to the loop.

    While a step runs on a device that works by itself, the next one is begun: the device goes on with it at once, and
    what came of the first is taken in meanwhile, on a second thread. Else all happens on the first.
    """

    def __init__(
        self, executor: Executor, loop: asyncio.AbstractEventLoop, metrics: ExecutorMetrics | None = None
    ) -> None:
        """Start the threads; `metrics` are told of each step."""
        self._executor = executor
        self._metrics = metrics
        self._loop = loop
        self._plans: queue.SimpleQueue[tuple[Attachment, pb.Plan | None, float] | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._unfinished_count = 0  # of those
        self._has_finished = threading.Condition()
        self._free_at = time.perf_counter()  # when nothing was left to do for the device
        self._finishing = threading.Thread(target=self._finish_steps, name="results", daemon=True)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._finishing.start()
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
        while (item := self._plans.get()) is not None:
            attachment, plan, came_at = item
            if attachment.over:
                continue
            if plan is not None:
                self._start(attachment, plan, came_at)
                continue
            self._finish_all()
            self._tell(attachment, self._begin(attachment))
        self._begun.put(None)
        self._finishing.join()

    def _start(self, attachment: Attachment, plan: pb.Plan, came_at: float) -> None:
        """Begin the step of a plan; where the device does not work by itself, it has run then."""
        try:
            if plan.announces or self._executor.has_to_wait(plan):
                self._finish_all()
            if plan.announces:
                self._announce(attachment, plan.step)
            begun = self._executor.begin(plan, attachment.epoch)
        except Exception as error:  # noqa: BLE001  the attachment ends with it, the threads go on
            self._finish_all()
            self._executor.reset()  # it may have taken in half of the plan: nobody must go on from there
            self._tell(attachment, error)
            return
        step = _Step(attachment, plan, came_at, begun)
        if not begun.keeps_tokens and not self._unfinished_count:
            self._finish(step)
            return
        with self._has_finished:
            self._unfinished_count += 1
        self._begun.put(step)

    def _finish_all(self) -> None:
        """Wait until every step that was begun has been finished."""
        with self._has_finished:
            self._has_finished.wait_for(lambda: not self._unfinished_count)

    def _finish_steps(self) -> None:
        while (step := self._begun.get()) is not None:
            self._finish(step)
            with self._has_finished:
                self._unfinished_count -= 1
                self._has_finished.notify()

    def _finish(self, step: _Step) -> None:
        """Wait for the end of a step, and tell what came of it; raises nothing."""
        try:
            result = self._executor.finish(step.begun)
            if result is None:
                return
            self._note_times(step, result)
        except Exception as error:  # noqa: BLE001  the attachment ends with it, the threads go on
            self._executor.reset()
            self._tell(step.attachment, error)
            return
        self._tell(step.attachment, result)
        if self._metrics is not None:
            try:
                self._metrics.note_step(step.plan, result)  # the scheduler need not wait for it
            except Exception:
                log.exception("a step could not be counted")

    def _note_times(self, step: _Step, result: pb.StepResult) -> None:
        timings, now = result.timings, time.perf_counter()
        idle_s, gap_s = step.came_at - self._free_at, step.begun.gap_s
        if gap_s is not None:  # the device knows better; what it did not wait for the plan, it waited for its host
            idle_s = min(max(idle_s, 0.0), gap_s)
            timings.prepare_us = _microseconds(gap_s - idle_s)
        worked_us = timings.prepare_us + timings.forward_us + timings.sample_us
        timings.queued_us = _microseconds(now - step.came_at - worked_us / 1e6)
        timings.idle_us = _microseconds(idle_s)
        self._free_at = now

    def _tell(self, attachment: Attachment, outcome: Outcome) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(attachment.outcomes.put_nowait, outcome)

    def _begin(self, attachment: Attachment) -> pb.Attached | Exception:
        try:
            if not attachment.resume:
                self._executor.reset()
            return self._executor.inventory()
        except Exception as error:  # noqa: BLE001  the attachment ends with it, the threads go on
            self._executor.reset()
            return error

    def _announce(self, attachment: Attachment, step: int) -> None:
        """Say that a step begins, and wait until it is said: the process may not live to say anything after it."""
        announcement = Announcement(pb.StepStarted(step=step))
        self._tell(attachment, announcement)
        announcement.is_sent.wait(_ANNOUNCEMENT_S)
        time.sleep(_FLUSH_S)


def _microseconds(seconds: float) -> int:
    return min(max(round(seconds * 1e6), 0), 0xFFFFFFFF)
