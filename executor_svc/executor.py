"""The executor: runs plans, one after the other, on a runner."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from executor_svc.batch import NO_BLOCK, AheadRunner, Ended, Failed, IntArray, Launched, Runner, StepBatch, StepOutput
from executor_svc.slots import PlanError, Slots, read_array, read_block_ids
from paceline.internal.v1 import executor_pb2 as pb

log = structlog.get_logger()

__all__ = ["Begun", "BrokenDeviceError", "Executor", "PlanError"]

_MOST_DEPARTED = 4096
"""Attempts without a slot that are kept for a scheduler that comes back; older ones only cost it a recomputation."""


class BrokenDeviceError(Exception):
    """The device computes nothing any more; only a new process can help."""


@dataclass(eq=False, slots=True)
class Begun:
    """A step from the moment its plan is taken in until its tokens are."""

    step: int
    rows: IntArray  # [R] slots of the step, ascending; those that compute nothing any more too
    lengths: IntArray  # [R] tokens that each computes
    samples: NDArray[np.bool_]  # [R]
    batch: StepBatch  # of the rows that compute
    launched: Launched
    prepare_s: float = 0.0  # in which the device had nothing else to do
    gap_s: float | None = None  # in which it did nothing since the step before, once it has ended and can tell
    is_gone: NDArray[np.bool_] = field(init=False)  # rows of the batch whose slots were dropped after their end

    def __post_init__(self) -> None:
        """All rows are there."""
        self.is_gone = np.zeros(len(self.batch.slots), dtype=bool)

    @property
    def keeps_tokens(self) -> bool:
        """Whether the next step can be begun before this one has ended."""
        return self.launched.keeps_tokens


@dataclass(slots=True)
class _Computed:
    """What came of the rows of a step, in parts where the whole of it failed."""

    token_ids: IntArray  # [slots] by slot; -1 where nothing was sampled
    failures: dict[int, str] = field(default_factory=dict)  # slot -> what went wrong
    out_of_memory: set[int] = field(default_factory=set)  # of these, slots that only lacked memory
    forward_s: float = 0.0
    sample_s: float = 0.0


class Executor:
    """Keeps the slots in step with the scheduler and runs what each plan asks for.

    Steps are begun and finished in the order of their plans; one thread may begin the next while another waits for the
    end of the last. Where the device works by itself it goes on from one to the next without waiting for either.
    """

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start with all slots empty."""
        self._runner = runner
        self._ahead = runner if isinstance(runner, AheadRunner) else None
        # Behind a window or chunk: before that, requests keep their blocks until they are dropped.
        self._gives_blocks_back = any(group.window or group.chunk for group in runner.info.layer_groups)
        self._clock = clock
        self._lock = threading.Lock()  # of all that follows; not held while a step that was launched is waited for
        self.reset()

    def reset(self) -> None:
        """Forget every slot and every step that was begun. The next plan has step 1."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._slots = Slots(self._runner.info)
        self._step = 0  # begun last
        self._in_flight: deque[Begun] = deque()
        self._last_tokens: IntArray = np.zeros(0, dtype=np.int64)  # of the step that was finished last
        self._acknowledged_step = 0
        self._departed: deque[tuple[int, pb.HeldAttempt]] = deque()  # (step, attempt): dropped before that step's
        # tokens were acknowledged

    def inventory(self) -> pb.Attached:
        """What is there for a scheduler that takes this executor over, once every step has been finished."""
        with self._lock:
            departed = [held for step, held in self._departed if step > self._acknowledged_step]
            held = [self._slots.held(slot) for slot in np.flatnonzero(self._slots.occupied).tolist()]
            return pb.Attached(last_step=self._step, held=departed + held)

    def execute(self, plan: pb.Plan, epoch: int = 0) -> pb.StepResult:
        """Run one plan of the scheduler with this epoch. Raises what `begin` and `finish` raise."""
        result = self.finish(self.begin(plan, epoch))
        assert result is not None, "somebody has reset this executor meanwhile"
        return result

    def has_to_wait(self, plan: pb.Plan) -> bool:
        """Whether the step before must be finished before this plan is begun."""
        with self._lock:
            if not self._in_flight:
                return False
            before = self._in_flight[-1]
            dropped = read_array(plan.dropped_slots, "<u2")
            dropped = dropped[dropped < len(self._slots.halted)]  # `begin` refuses the others
            # Of what had ended before, nothing is awaited any more; what has not may still be owed a token.
            is_owed = np.isin(before.batch.slots, dropped[~self._slots.halted[dropped]])
            return (
                len(self._in_flight) > 1
                or not before.keeps_tokens
                or bool(plan.copies)
                or bool(is_owed.any())
                or (self._gives_blocks_back and self._takes_blocks(plan, before.batch, dropped))
            )

    def _takes_blocks(self, plan: pb.Plan, batch: StepBatch, dropped: IntArray) -> bool:
        """Whether it has blocks written that rows of this batch would have to read again, should one of them fail."""
        batch = batch.part(np.flatnonzero(~np.isin(batch.slots, dropped)))
        groups = self._runner.info.layer_groups
        given = [read_block_ids(plan.appended_block_ids)]
        for request in plan.new_requests:
            for group, table in zip(groups, request.block_tables, strict=False):  # `begin` counts them
                given.append(read_block_ids(table)[request.computed_count // group.block_size :])
        taken = np.concatenate(given)
        taken = taken[taken != NO_BLOCK]
        for group, tables in zip(groups, batch.block_tables, strict=True):
            is_entry = np.arange(tables.shape[1]) < -(-batch.context_lengths[:, None] // group.block_size)
            if np.isin(tables[is_entry], taken).any():
                return True
        return False

    def begin(self, plan: pb.Plan, epoch: int = 0) -> Begun:
        """Take in a plan of the scheduler with this epoch, and have the device begin with it.

        Raises `PlanError` when it contradicts what is known here.
        """
        with self._lock:
            started_at = self._clock()
            slots = self._slots
            if plan.step != self._step + 1:
                raise PlanError(f"plan of step {plan.step}, but step {self._step + 1} is next")
            self._acknowledge(plan.acknowledged_step)
            self._take_changes(plan, epoch)
            chunk_slots = read_array(plan.chunk_slots, "<u2")
            decoding = self._decoding(plan)
            rows, lengths, samples = self._rows(decoding, chunk_slots, read_array(plan.chunk_token_counts, "<u4"))
            if int(samples.sum()) != plan.sampling_row_count:
                raise PlanError(
                    f"step {plan.step} samples {plan.sampling_row_count} rows by the scheduler's count, "
                    f"{samples.sum()} by the executor's"
                )
            active = slots.computing(rows)
            slots.check_fits(rows[active], lengths[active])
            batch = slots.batch(rows[active], lengths[active], samples[active])
            prepared_at = self._clock()
            begun = Begun(plan.step, rows, lengths, samples, batch, self._launch(batch))
            if not self._in_flight:
                begun.prepare_s = prepared_at - started_at
            slots.begin(rows[samples], batch, plan.step)
            self._step = plan.step
            self._in_flight.append(begun)
            return begun

    def _launch(self, batch: StepBatch) -> Launched:
        if not len(batch.slots):
            return Ended(StepOutput(np.zeros(0, dtype=np.int64), 0.0, 0.0))
        try:
            return self._ahead.launch(batch) if self._ahead else Ended(self._runner.run(batch))
        except Exception as error:  # noqa: BLE001  it is found out row by row, whose fault that is
            return Failed(error)

    def finish(self, begun: Begun) -> pb.StepResult | None:
        """Wait for the end of the oldest step that was begun and take its tokens in; None: it was forgotten meanwhile.

        A row that fails by itself is reported in the result; the others go on. Raises `BrokenDeviceError` when nothing
        can be computed any more.
        """
        begun.launched.wait()
        with self._lock:
            if not self._in_flight or self._in_flight[0] is not begun:
                return None
            self._in_flight.popleft()
            try:
                return self._take_in(begun, self._compute(begun))
            except BaseException:
                self._forget()  # before anybody begins a step with tokens that never came
                raise

    def _take_in(self, begun: Begun, computed: _Computed) -> pb.StepResult:
        slots, sampled = self._slots, begun.rows[begun.samples]
        in_vain = slots.halted[begun.batch.slots] & ~begun.is_gone
        has_failed = np.isin(begun.batch.slots, list(computed.failures))
        slots.take_back(begun.batch, in_vain, in_vain | has_failed)
        for slot, message in computed.failures.items():
            slots.fail(slot, message, out_of_memory=slot in computed.out_of_memory)
        tokens = computed.token_ids[sampled]
        slots.record(sampled[tokens >= 0], tokens[tokens >= 0], begun.step)
        self._last_tokens = computed.token_ids[begun.batch.slots[begun.batch.sampling.row_index]]
        return pb.StepResult(
            step=begun.step,
            token_ids=tokens.astype("<i4").tobytes(),
            errors=[
                pb.SlotError(slot=slot, message=message, out_of_memory=slot in computed.out_of_memory)
                for slot, message in sorted(computed.failures.items())
            ],
            timings=pb.Timings(
                prepare_us=_microseconds(begun.prepare_s),
                forward_us=_microseconds(computed.forward_s),
                sample_us=_microseconds(computed.sample_s),
            ),
        )

    def _acknowledge(self, step: int) -> None:
        """The tokens of all steps up to this one are kept elsewhere."""
        self._acknowledged_step = max(self._acknowledged_step, step)
        while self._departed and self._departed[0][0] <= self._acknowledged_step:
            self._departed.popleft()

    def _drop(self, dropped: IntArray) -> None:
        """Empty slots, but keep what they have generated until that is acknowledged."""
        self._slots.require(dropped, occupied=True, act="dropped")
        for begun in self._in_flight:
            is_gone = np.isin(begun.batch.slots, dropped) & ~begun.is_gone
            self._slots.take_back(begun.batch, is_gone, is_gone)
            begun.is_gone |= is_gone
        for slot in dropped[self._slots.sampled_steps[dropped] > self._acknowledged_step].tolist():
            held = self._slots.held(slot)
            held.ClearField("slot")
            held.ClearField("block_tables")
            self._departed.append((self._step, held))
        while len(self._departed) > _MOST_DEPARTED:
            self._departed.popleft()
        self._slots.drop(dropped)

    def _take_changes(self, plan: pb.Plan, epoch: int) -> None:
        """Take in what the plan changes, in the order in which its fields take effect."""
        if plan.dropped_slots:
            self._drop(read_array(plan.dropped_slots, "<u2"))
        if plan.copies:
            self._copy_blocks(read_array(plan.copies, "<u4"))
        for request in plan.new_requests:
            self._slots.start(request, epoch)
        if plan.appended_slots:
            slots = read_array(plan.appended_slots, "<u2")
            groups = read_array(plan.appended_groups, "<u1") if plan.appended_groups else np.zeros_like(slots)
            self._slots.append_blocks(slots, read_block_ids(plan.appended_block_ids), groups)
        if plan.adopting_slots:
            self._slots.adopt(read_array(plan.adopting_slots, "<u2"), read_array(plan.adopted_token_counts, "<u4"))
        if plan.paused_slots:
            self._slots.pause(read_array(plan.paused_slots, "<u2"))

    def _copy_blocks(self, pairs: IntArray) -> None:
        if len(pairs) % 2 or pairs.max() >= self._runner.info.block_count:
            raise PlanError(
                f"{len(pairs)} blocks up to {pairs.max()} are no pairs of the {self._runner.info.block_count} there are"
            )
        self._runner.copy_blocks(pairs[::2], pairs[1::2])

    def _decoding(self, plan: pb.Plan) -> IntArray:
        """The slots that decode in this step, ascending."""
        if not plan.skipped_slots:
            return np.flatnonzero(self._slots.decoding)
        skipped = read_array(plan.skipped_slots, "<u2")
        self._slots.require(skipped, occupied=True, act="skipped")
        goes_on = self._slots.decoding.copy()
        goes_on[skipped] = False
        return np.flatnonzero(goes_on)

    def _rows(
        self, decoding: IntArray, chunk_slots: IntArray, counts: IntArray
    ) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
        """The slots of this step in ascending order, how many tokens each computes, and whether it samples."""
        slots = self._slots
        if not len(chunk_slots):
            return decoding, np.ones(len(decoding), dtype=np.int64), np.ones(len(decoding), dtype=bool)
        if len(counts) != len(chunk_slots) or counts.min() < 1:
            raise PlanError(f"{len(chunk_slots)} chunks have the token counts {counts.tolist()}")
        slots.require(chunk_slots, occupied=True, act="given a chunk")
        if len(np.unique(chunk_slots)) < len(chunk_slots):
            raise PlanError(f"of the chunks in slots {chunk_slots.tolist()} two are for the same slot")
        if slots.decoding[chunk_slots].any():
            raise PlanError(f"of the chunks in slots {chunk_slots.tolist()} one is for a slot that is not catching up")
        missing = np.array([len(slots.known[slot]) for slot in chunk_slots.tolist()]) - slots.computed[chunk_slots]
        if (counts > missing).any():
            raise PlanError(f"chunks of {counts.tolist()} tokens, but only {missing.tolist()} are known")
        rows = np.concatenate((decoding, chunk_slots))
        order = np.argsort(rows, kind="stable")
        lengths = np.concatenate((np.ones(len(decoding), dtype=np.int64), counts))[order]
        samples = np.concatenate((np.ones(len(decoding), dtype=bool), counts == missing))[order]
        return rows[order], lengths, samples

    def _compute(self, begun: Begun) -> _Computed:
        """What came of a step; where it failed as a whole, of halves of it, until the rows that fail by themselves are
        found.

        Running a row again writes the same values to the same positions. A row that ended with the step before has been
        computed in vain.
        """
        computed = _Computed(np.full(self._runner.info.slot_count, -1, dtype=np.int64))
        batch, goes_on = begun.batch, ~self._slots.halted[begun.batch.slots] & ~begun.is_gone
        try:
            output = begun.launched.result()
        except Exception as error:  # noqa: BLE001  it is told of the row that is at fault
            self._spoil()
            rest = batch.known(self._last_tokens).part(np.flatnonzero(goes_on))
            is_new = isinstance(error, _SpoiledError) or not goes_on.all()
            self._compute_part(rest, computed, None if is_new else error)
            if computed.failures:
                self._check_device(computed.failures)
            return computed
        sampled = batch.sampling.row_index
        computed.token_ids[batch.slots[sampled]] = np.where(goes_on[sampled], output.token_ids, -1)
        computed.forward_s, computed.sample_s = output.forward_s, output.sample_s
        begun.gap_s = output.gap_s
        return computed

    def _spoil(self) -> None:
        """The steps after the one that failed went on from wrong tokens: they have to be run again."""
        for begun in self._in_flight:
            begun.launched.wait()
            begun.launched = Failed(_SpoiledError())

    def _check_device(self, failures: dict[int, str]) -> None:
        """Tell rows that fail by themselves from a device that fails every row."""
        try:
            self._runner.check_device()
        except Exception as error:
            reasons = "; ".join(failures.values())
            raise BrokenDeviceError(f"the device fails by itself ({_describe(error)}) after: {reasons}") from error

    def _compute_part(self, batch: StepBatch, computed: _Computed, failed: Exception | None = None) -> None:
        """Run some rows, or their halves; where `failed` is given they have been run, with that result."""
        if not len(batch.slots):
            return
        try:
            if failed is not None:
                raise failed
            output = self._runner.run(batch)
        except Exception as error:  # noqa: BLE001  the row that is at fault is told of it
            traceback.clear_frames(error.__traceback__)  # what is in there may be all the memory that the halves need
            if len(batch.slots) == 1:
                self._note_failure(int(batch.slots[0]), error, computed)
                return
            half = len(batch.slots) // 2
            for rows in (np.arange(half), np.arange(half, len(batch.slots))):
                self._compute_part(batch.part(rows), computed)
            return
        computed.token_ids[batch.slots[batch.sampling.row_index]] = output.token_ids
        computed.forward_s += output.forward_s
        computed.sample_s += output.sample_s

    def _note_failure(self, slot: int, error: Exception, computed: _Computed) -> None:
        request_id, trace_id = self._slots.request_ids[slot], self._slots.trace_ids[slot].hex()
        computed.failures[slot] = f"request '{request_id}' failed: {_describe(error)}"
        log.warning("a request fails by itself", request_id=request_id, trace_id=trace_id, exc_info=error)
        if _is_out_of_memory(error):
            computed.out_of_memory.add(slot)


class _SpoiledError(Exception):
    """A step went on from tokens that were wrong."""


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had no memory; torch's own error is known by its name, as torch is not needed."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _microseconds(seconds: float) -> int:
    return min(round(seconds * 1e6), 0xFFFFFFFF)


def _describe(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
