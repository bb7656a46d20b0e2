"""The live scheduler: feeds events to the core, sends its plans, hands its outputs to their readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import grpc
import structlog

from common.errors import RefusedError
from scheduler_svc.answers import Answer, AnswerBook, Terms
from scheduler_svc.arrivals import Arrival, Arrivals, Hold
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.core.plan import Capacity, Inventory, NeverFitsError, Outputs, Plan, Result
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.request import FinishReason, Request, RequestState
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.journal.journal import Durability
from scheduler_svc.observation.observer import Loss, Observer, log_ids
from scheduler_svc.observation.step_meter import StepMeter
from scheduler_svc.output_stream import OutputStream
from scheduler_svc.recorder import Recorder, replay_output
from scheduler_svc.refusals import cancelled, leaving, overloaded, too_large
from scheduler_svc.text_stream import TextStream
from scheduler_svc.waiting_times import WaitingTimes

log = structlog.get_logger()

EARLY_S = 0.1  # how long before its deadline a call may end because of it: the clocks of two machines differ


class Link(Protocol):
    """An attached executor, as the engine sees it."""

    executor_id: str
    incarnation: int
    draining: bool  # it is to leave
    steps: StepMeter

    def send(self, plan: Plan) -> None:
        """Send a plan, some time soon."""
        ...

    def acknowledge(self, step: int) -> None:
        """Tell the executor, with the next plan, that it need not tell the tokens up to this step again."""
        ...

    def detach(self) -> None:
        """Let the executor go: nothing is left on it."""
        ...


class Engine:
    """Owns the core and lives on one event loop, so that nothing here needs a lock."""

    def __init__(self, config: SchedulerConfig, recorder: Recorder, observer: Observer) -> None:
        """Start with no request and no executor; what `recorder` writes is out before anybody is told; `observer` is
        told what happens.
        """
        policy = make_policy(
            config.policy, input_weight=config.fair_input_weight, output_weight=config.fair_output_weight
        )
        self.scheduler = Scheduler(policy, reuse=config.prefix_reuse)
        self.observer = observer
        self.meter = observer.meter
        self.draining = False
        self._is_closed = False
        self._config = config
        self.answers = AnswerBook(config.keep_results_s, self._abandon, recorder.forgotten)
        self._recorder = recorder
        self._streams: dict[Request, OutputStream] = {}  # of every choice whose end was not told
        self._waiting = WaitingTimes()
        self._links: dict[str, Link] = {}
        self._loop = asyncio.get_running_loop()
        self.arrivals = Arrivals(self.meter)
        self._waiting_for_owners: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None  # for the next moment of the core's, or earlier
        self.is_fenced = asyncio.Event()  # another scheduler has taken over
        self._room = asyncio.Event()  # set whenever the queue may have become shorter
        self._ended = asyncio.Event()  # set whenever a request ended

    # --- requests -----------------------------------------------------------------------------------------------

    async def known(self, request_id: str, content_hash: bytes) -> Answer | None:
        """The answer to this very request, if it was let in before. Raises `RefusedError` where the id is another's."""
        await self.arrivals.settled(request_id)
        return self.answers.find(request_id, content_hash)

    def check_arriving(self, arrival: Arrival) -> None:
        """Refuse a request that was cancelled at the door, or that came while the service leaves."""
        if arrival.is_cancelled:
            raise cancelled(arrival.request_id)
        if self.draining:
            raise leaving()

    def submit(self, request: Request, texts: Sequence[TextStream], terms: Terms, arrival: Arrival) -> Answer:
        """Accept a request that is at the door, or refuse it at once; `texts` are those of its choices.

        It is not told to be accepted before it is `durable`.
        """
        self.check_arriving(arrival)
        self.check_room(len(request.token_ids))
        try:
            self.scheduler.add(request)
        except NeverFitsError as error:
            raise too_large(str(error)) from error
        answer = Answer(request, texts, terms, time.monotonic(), arrival.received_at)
        answer.held_for = arrival.held_for
        self.observer.on_accepted(answer)
        if not self.has_executor:
            self.meter.tell_at_once()
        self.answers.add(answer)
        self._streams.update(zip(request.family, answer.streams, strict=True))
        self._waiting.note(request.family, answer.accepted_at)
        self._recorder.accepted(answer)
        self._watch_deadlines()
        self._pump()
        return answer

    @property
    def has_executor(self) -> bool:
        """Whether anybody is attached who takes requests."""
        return any(not link.draining for link in self._links.values())

    @property
    def waiting_count(self) -> int:
        """Requests that wait for an executor: those at the door for the first one too."""
        return self.scheduler.waiting_count + self.arrivals.held_count(Hold.EXECUTOR)

    def oldest_waiting_at(self) -> float | None:
        """Since when the one that waits longest does: accepted then, or off its executor; None: nobody waits."""
        return self._waiting.oldest() if self.scheduler.waiting_count else None

    async def durable(self) -> None:
        """Wait until everything that has happened up to now is written down."""
        done = asyncio.Event()
        self._recorder.journal.then(done.set)
        await done.wait()

    def restore(self, owners: Mapping[Answer, Sequence[str]]) -> None:
        """Take up the requests of an earlier life, each with the executors that had its choices, "" for none."""
        now = time.monotonic()
        for answer, executor_ids in owners.items():
            self.answers.add(answer)
            self._restore(answer, executor_ids, now)
        wait_s = self._config.resume_wait_s
        self._waiting_for_owners = self._loop.call_later(wait_s, self._stop_waiting_for_owners)
        self._watch_deadlines()

    def _restore(self, answer: Answer, owners: Sequence[str], now: float) -> None:
        ends = [replay_output(answer, choice) for choice in range(len(answer.streams))]
        if not answer.request.has_ended:
            self.scheduler.restore(answer.request, owners)
        for choice, stream, end in zip(answer.request.family, answer.streams, ends, strict=True):
            stream.last_token_at = None  # when it was is not known any more
            if end is None:
                self._streams[choice] = stream
                continue
            output_count, reason = end
            if choice.state is not RequestState.FINISHED:
                self.scheduler.finish(choice, output_count, reason)
                self._recorder.ended(answer, choice)
            del stream.token_ids[output_count:]
            stream.end(reason, now if answer.known_end is None else answer.known_end)
        self._waiting.note(answer.request.family, now)
        if not answer.has_ended:
            self.observer.on_accepted(answer, is_restored=True)
        if answer.has_ended:
            self.answers.note_ended(answer, 0.0 if answer.known_end is None else now - answer.known_end)
        else:
            self.answers.note_unread(answer)

    def _stop_waiting_for_owners(self) -> None:
        for executor_id in self.scheduler.absent:
            requests = self.scheduler.give_up(executor_id)
            self.observer.on_lost(requests, executor_id, time.monotonic(), Loss.NOT_BACK)
            log.warning("executor did not come back", executor_id=executor_id, request_count=len(requests))
        self._pump()

    def check_room(self, token_count: int) -> None:
        """Refuse a request of `token_count` tokens when the service is leaving or the queue is full."""
        if self.draining:
            raise leaving()
        waiting, limit = self.waiting_count, self._config.max_waiting_requests
        if waiting >= limit:
            raise overloaded(f"{waiting} requests are waiting, the limit is {limit}")
        tokens, limit = self.scheduler.waiting_token_count, self._config.max_waiting_tokens
        if waiting and tokens + token_count > limit:
            raise overloaded(f"{tokens} tokens are waiting and this request has {token_count}, the limit is {limit}")

    def _is_half_full(self, token_count: int) -> bool:
        scheduler, config = self.scheduler, self._config
        return scheduler.waiting_count > 0 and (
            scheduler.waiting_count >= config.max_waiting_requests // 2
            or scheduler.waiting_token_count + token_count > config.max_waiting_tokens // 2
        )

    async def wait_for_room(self, arrival: Arrival, token_count: int) -> None:
        """Wait until the queue has room for this in its first half: a batch leaves the rest to everybody else. Raises
        `RefusedError` when the request is cancelled meanwhile.
        """
        if not self._is_half_full(token_count):
            return
        with self.arrivals.held(arrival, Hold.ROOM):
            while self._is_half_full(token_count):
                self.check_arriving(arrival)
                self._room.clear()
                await self._room.wait()

    def cancel_id(self, request_id: str) -> None:
        """End the request of that id, if there is one."""
        if self.arrivals.cancel(request_id):
            self._room.set()
        elif (request := self.scheduler.get(request_id)) is not None:
            self.cancel(request)

    def cancel(self, request: Request, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request that nobody wants any more; its answer, if somebody still reads it, says so."""
        if request.has_ended:
            return
        ending = [choice for choice in request.family if choice.state is not RequestState.FINISHED]
        self.scheduler.cancel(request, reason)
        self._tell_ends(ending)
        self._pump()

    def _abandon(self, request: Request) -> None:
        """Nobody reads it any more. Is its deadline over, or nearly? That has ended the call, before the timer rang."""
        is_late = time.monotonic() > request.deadline - EARLY_S
        self.cancel(request, FinishReason.DEADLINE if is_late else FinishReason.CANCELLED)

    def _watch_deadlines(self) -> None:
        """Have the timer ring when a deadline passes, or cannot be met any more."""
        moment = self.scheduler.next_moment
        if moment is None:
            return
        wait_s = moment - time.monotonic() + 0.002  # the loop counts milliseconds and may be that much early
        if self._expiry is None or self._expiry.when() > self._loop.time() + wait_s:
            if self._expiry is not None:
                self._expiry.cancel()
            self._expiry = self._loop.call_later(wait_s, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self._tell_ends(self.scheduler.expire(time.monotonic()))
        self._watch_deadlines()
        self._pump()

    # --- executors ----------------------------------------------------------------------------------------------

    def attached(self, link: Link, capacity: Capacity, inventory: Inventory) -> None:
        """An executor is ready for plans, with what it still has. Raises `ProtocolError` when that makes no sense."""
        awaiting = self.scheduler.absent.get(link.executor_id, [])
        outputs = self.scheduler.resume(link.executor_id, capacity, inventory)
        given_up = [request for request in awaiting if request.state is RequestState.WAITING]
        self._links[link.executor_id] = link
        self.meter.tell_at_once()  # it is what somebody waits for
        now = time.monotonic()
        self.observer.on_attached(self.scheduler.executors[link.executor_id], link.steps, now)
        self.observer.on_lost(given_up, link.executor_id, now, Loss.CAME_WITHOUT)
        if inventory.held:
            running_count = len(self.scheduler.executors[link.executor_id].running)
            log.info(
                "executor resumed",
                executor_id=link.executor_id,
                request_count=running_count,
                token_count=len(outputs.tokens),
            )
        if link.draining:
            self.drain(link)
        self._plan_and_tell(link, inventory.last_step, outputs)
        if self.scheduler.stranded_count:
            log.warning("requests wait for a larger executor", request_count=self.scheduler.stranded_count)

    def find(self, request_id: str, choice: int) -> Request | None:
        """A choice of a request that has not ended, if it is known."""
        request = self.scheduler.get(request_id)
        return request.family[choice] if request is not None and choice < len(request.family) else None

    def fenced(self, reason: str) -> None:
        """Another scheduler, with a higher epoch, has taken over: this one can do nothing any more."""
        if not self.is_fenced.is_set():
            log.error("another scheduler has taken over; this one ends", reason=reason)
            self.is_fenced.set()
            self.answers.interrupt(RefusedError(grpc.StatusCode.UNAVAILABLE, "another scheduler has taken over"))

    def started(self, link: Link, step: int) -> None:
        """A step that was to be announced begins."""
        if self._links.get(link.executor_id) is link:
            self.scheduler.executors[link.executor_id].started_step = step

    def lost(self, link: Link, *, died: bool = False, may_return: bool = False) -> None:
        """An attachment is over. Its requests are planned again elsewhere, or wait: for any executor, or first for this
        one where it `may_return`. Those that it computed when it `died` are suspected of that.
        """
        if self._is_closed:
            return  # what is there goes on in the next life
        died = died and not link.draining  # it was to leave
        executor_id = link.executor_id
        if self._links.get(executor_id) is link or (
            executor_id not in self._links and executor_id in self.scheduler.executors
        ):
            self._links.pop(executor_id, None)
            lost = self.scheduler.lose(executor_id, died=died, may_return=may_return)
            self._waiting.note(lost, time.monotonic())
            loss = Loss.CUT_OFF if may_return else Loss.LOST
            self.observer.on_lost(lost, executor_id, time.monotonic(), loss)
            if not may_return:  # else it may be back before that is news
                self.observer.on_gone(executor_id)
                self._note_lost(link, lost)
            self._pump()
        elif executor_id not in self._links and not may_return:  # it was waited for
            lost = self.scheduler.give_up(executor_id, died=died)
            self.observer.on_lost(lost, executor_id, time.monotonic(), Loss.NOT_BACK)
            self.observer.on_gone(executor_id)
            self._note_lost(link, lost)

    def _note_lost(self, link: Link, requests: list[Request]) -> None:
        given_up = [request for request in requests if request.state is RequestState.FINISHED]
        if requests:
            log.warning(
                "requests wait again", executor_id=link.executor_id, request_count=len(requests) - len(given_up)
            )
        for request in given_up:
            log.error("request given up", **log_ids(request), reason=request.error)
        self._tell_ends(given_up)
        self._pump()

    def drain(self, link: Link) -> None:
        """An executor is to leave. One that leaves together with the scheduler is still needed for what waits."""
        if self._links.get(link.executor_id) is link and not self.draining:
            self.scheduler.drain(link.executor_id)
            self._pump()

    def hand_over(self, link: Link) -> None:
        """What an executor that drains has not finished goes on elsewhere."""
        if self._links.get(link.executor_id) is link and not self.draining:
            self.scheduler.hand_over(link.executor_id)
            self._note_preempted("drained")
            self._pump()

    def answered(self, link: Link, result: Result) -> None:
        """A step has run: plan the next before anything else, then tell the readers.

        Raises `ProtocolError` when the executor makes no sense.
        """
        self.observer.on_answered(link.executor_id, result.step, time.monotonic())
        began_at = time.perf_counter()
        outputs = self.scheduler.apply(link.executor_id, result)
        self.meter.apply.add(time.perf_counter() - began_at)
        self._note_preempted("out of memory")
        self.observer.on_finished(outputs.finished, time.monotonic())
        self._plan_and_tell(link, result.step, outputs)

    def _note_preempted(self, cause: str) -> None:
        if self.scheduler.preempted:
            now = time.monotonic()
            self.observer.on_preempted(self.scheduler.preempted, now, cause)
            self._waiting.note(self.scheduler.preempted, now)
            self.scheduler.preempted.clear()

    def _plan_and_tell(self, link: Link, step: int, outputs: Outputs) -> None:
        """What came is told even if planning fails: nobody would ever hear of it otherwise."""
        try:
            self._pump()
        finally:
            self._take_outputs(link, step, outputs)

    def _take_outputs(self, link: Link, step: int, outputs: Outputs) -> None:
        """Write down what came, then release it to its readers, then let the executor forget it."""
        self._recorder.stepped(link.executor_id, step, outputs.tokens)
        for request in outputs.finished:
            self._recorder.ended(self._answer_of(request), request)
        self._recorder.journal.then(partial(self._release, link, step, outputs))

    def _release(self, link: Link, step: int, outputs: Outputs) -> None:
        now = time.monotonic()
        stopped = False
        gaps: dict[float, int] = {}  # how many tokens follow one that was released when
        self.meter.generated_token_count += len(outputs.tokens)
        for request, token_id in outputs.tokens:
            stream = self._streams.get(request)
            if stream is None:
                continue  # its end was told meanwhile
            if (previous_at := stream.last_token_at) is not None:
                gaps[previous_at] = gaps.get(previous_at, 0) + 1
            stopped_at = stream.push(token_id, now)
            if stopped_at is not None:
                self._stop(request, stopped_at)
                stopped = True
        self.observer.on_released(now, gaps)
        for request in outputs.finished:
            self._end_stream(request)
        link.acknowledge(step)
        if stopped:
            self._pump()

    def _stop(self, request: Request, output_count: int) -> None:
        """A stop string was found, some tokens late: they do not count, whatever they have led to."""
        if request.state is RequestState.FINISHED:
            del request.token_ids[request.prompt_count + output_count :]
            request.finish_reason = FinishReason.STOP
        else:
            self.scheduler.finish(request, output_count, FinishReason.STOP)
        self._recorder.ended(self._answer_of(request), request)
        self._end_stream(request)

    def _answer_of(self, request: Request) -> Answer:
        return self.answers[request.request_id]

    def _tell_ends(self, requests: Iterable[Request]) -> None:
        """These have ended without a result: tell their readers once everything before is told."""
        for request in requests:
            self._recorder.ended(self._answer_of(request), request)
            self._recorder.journal.then(partial(self._end_stream, request))

    def _pump(self) -> None:
        """Send plans while somebody has credit and work, and let go of executors that have drained.

        A plan for one executor may place a request on another: go round until nobody has anything new.
        """
        progress = True
        while progress:
            progress = False
            now = time.monotonic()
            for executor_id, link in self._links.items():
                began_at = time.perf_counter()
                while (plan := self.scheduler.plan(executor_id, now)) is not None:
                    self.meter.plan.add(time.perf_counter() - began_at)
                    link.send(plan)
                    self._note_preempted("preempted")
                    self.observer.on_planned(executor_id, plan, now)
                    self.meter.computed_token_count += plan.token_count
                    self._recorder.placed(executor_id, link.incarnation, plan)
                    progress = True
                    began_at = time.perf_counter()
        self._note_preempted("preempted")  # also on executors that had nothing to plan
        self.observer.on_pumped(self.scheduler.obstacle)
        for executor_id, link in self._links.items():
            executor = self.scheduler.executors[executor_id]
            if executor.draining and executor.is_idle:
                link.detach()
        self._room.set()

    def _end_stream(self, request: Request) -> None:
        stream = self._streams.pop(request, None)
        if stream is None:
            return
        self._waiting.forget(request)
        assert request.finish_reason is not None
        now = time.monotonic()
        stream.end(request.finish_reason, now)
        self.observer.on_finished((request,), now)
        answer = self._answer_of(request)
        if answer.has_ended:
            self.observer.on_ended(answer, now)
            self.answers.note_ended(answer)
        self._ended.set()

    async def drain_all(self, timeout_s: float) -> None:
        """Refuse new requests, and wait until those accepted have ended; leave what has not after `timeout_s`: to the
        next life of this scheduler where it is written down, else it is cut off.
        """
        self.draining = True
        for executor_id in self._links:
            self.scheduler.drain(executor_id, draining=False)
        self._pump()
        try:
            async with asyncio.timeout(timeout_s):
                while self._streams:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            self._leave_unfinished()
        await self.durable()

    def close(self) -> None:
        """Stop all timers, and leave everything as it is: executors that are lost from now on keep their requests."""
        self._is_closed = True
        self.answers.close()
        for timer in (self._expiry, self._waiting_for_owners):
            if timer is not None:
                timer.cancel()

    def _leave_unfinished(self) -> None:
        is_durable = self._recorder.journal.durability is Durability.ON
        left = [request for request in self._streams if is_durable and self._answer_of(request).number]
        cut_off = [request for request in self._streams if not (is_durable and self._answer_of(request).number)]
        log.warning("leaving", go_on_after_the_next_start=len(left), cut_off=len(cut_off))
        for request in cut_off:
            self.scheduler.finish(request, request.output_count, FinishReason.CUT_OFF)
        self._tell_ends(cut_off)
        self.answers.interrupt(
            RefusedError(grpc.StatusCode.UNAVAILABLE, "the scheduler restarts; the answer goes on when it is back")
        )
