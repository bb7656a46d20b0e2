"""Steps of one model on one device: queued while those before them run, and replayed where their shape was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Protocol

import numpy as np
import structlog
import torch

from executor_svc.batch import IntArray, SamplingBatch, StepBatch, StepError, StepOutput
from executor_svc.gpu.input_buffer import InputBuffer, StepShape
from executor_svc.gpu.inputs import RecordedRows, StepInputs, StepRows
from executor_svc.gpu.packed_step import PagedAttention
from executor_svc.gpu.queue import Moment, Queue, Recording
from executor_svc.gpu.sampling import sample_rows
from executor_svc.kv_cache import PagedPool

log = structlog.get_logger()

_RESULTS_IN_FLIGHT = 4  # two steps on their way, one whose result is just being read, and one to spare
_FINELY_RECORDED = 64  # rows up to which decoding steps are recorded in small intervals
_MIXED_INTERVAL = 64  # tokens between the sizes of recorded steps with prompts in them
_WIDE_FROM = 512  # tokens from which on the interval is wider, and only what is launched slowly is recorded
_WIDE_INTERVAL = 256
_HIDDEN = 1.5  # so many times as long as its launches a step may take to be recorded: else they are hidden behind it


class InputsModel(Protocol):
    """A model that computes from inputs on the device."""

    attention: PagedAttention

    def compute(self, inputs: StepInputs, pool: PagedPool) -> torch.Tensor:
        """Queue a step; returns the logits of its sampled tokens, `[S, vocabulary]`, once it has run."""
        ...


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step."""

    row_count: int
    token_count: int
    entry_count: int  # of all block tables together


class DeviceSteps:
    """Runs steps in the order in which they are launched; each finds the tokens of the one before on the device."""

    def __init__(
        self,
        model: InputsModel,
        pool: PagedPool,
        limits: StepLimits,
        queue: Queue,
        hides_launches: dict[StepShape, bool] | None = None,
    ) -> None:
        """Record nothing yet: every step is launched kernel by kernel.

        `hides_launches` is what is known of large shapes, and is added to: another one that records the same must not
        find otherwise, or it would take other memory.
        """
        self._known_to_hide = {} if hides_launches is None else hides_launches
        self._model, self._pool, self._limits, self.queue = model, pool, limits, queue
        groups = pool.geometry.groups
        rows, tokens, entries = limits.row_count, limits.token_count, limits.entry_count
        self._decode_inputs = InputBuffer(rows, rows, entries, groups, queue)
        self._mixed_inputs = InputBuffer(rows, tokens, entries, groups, queue)
        self._results = torch.zeros(2, rows, dtype=torch.int64, device=queue.device)  # tokens; whether they may be used
        self._hosts = [queue.host_words(4 * rows).view(torch.int64).view(2, rows) for _ in range(_RESULTS_IN_FLIGHT)]
        self._recorded: dict[StepShape, Recording] = {}
        self._logits: torch.Tensor | None = None  # [rows, vocabulary] of recorded steps
        self._last_end: Moment | None = None

    def load_kernels(self) -> None:
        """Run a step of one row that draws, so that what it needs is compiled and loaded; call it before any other.

        Of the kernels that choose tokens nothing else does, and everybody would wait for the seconds that it takes.
        """
        self.launch(_one_row(len(self._pool.geometry.groups)))
        self._last_end = None  # nobody waits for a step yet

    def record(self, progress: Callable[[str, float], None]) -> None:
        """Record the shapes that steps are padded to, largest first, so that smaller ones fit into its memory.

        Whatever cannot be recorded raises; what was recorded before is used all the same.
        """
        records_prompts = self._model.attention.records_prompts
        shapes = [shape for shape in shapes_to_record(self._limits) if shape.is_decode or records_prompts]
        for number, shape in enumerate(shapes):
            kind = "decoding" if shape.is_decode else "mixed"
            progress(f"recording {kind} steps: {number + 1} of {len(shapes)} shapes", number / len(shapes))
            with torch.inference_mode(), self.queue.steps():
                empty = _empty_batch(len(self._pool.geometry.groups))
                self._buffer(shape).fill(empty, shape)
                self._prepare(empty, self._recorded_rows(shape))
                self._make_room(self._forward(shape))  # which compiles and loads what it needs
                if shape.token_count > _WIDE_FROM and self._hides_launches(shape):
                    continue
                self._recorded[shape] = self.queue.record(partial(self._forward_in_place, shape))

    @property
    def recorded_count(self) -> int:
        """Shapes that are replayed; 0 where every step is launched kernel by kernel."""
        return len(self._recorded)

    def forget_recorded(self) -> None:
        """Launch every step kernel by kernel again."""
        self._recorded.clear()

    def launch(self, batch: StepBatch) -> DeviceStep:
        """Queue a step behind those before it."""
        shape = self._shape_of(batch)
        buffer, sampling_count = self._buffer(shape), len(batch.sampling)
        with torch.inference_mode():
            buffer.fill(batch, shape)
            with self.queue.steps():
                recorded = self._recorded.get(shape)
                self._prepare(batch, None if recorded is None else self._recorded_rows(shape))
                began = self.queue.mark()
                if recorded is not None:
                    recorded.replay()
                logits = recorded.output if recorded is not None else self._forward(shape)
                forwarded = self.queue.mark()
                chosen, finite = self._results[:, :sampling_count]
                if sampling_count:
                    draws = bool((batch.sampling.temperature > 0).any())
                    parameters = buffer.sampling(sampling_count)
                    sample_rows(logits[:sampling_count], parameters, chosen, finite, draws=draws)
                host = self._hosts[0]
                self._hosts.append(self._hosts.pop(0))
                host.copy_(self._results, non_blocking=True)
                step = DeviceStep(batch, host, self._last_end, began, forwarded, self.queue.mark())
        self._last_end = step.ended
        return step

    def _buffer(self, shape: StepShape) -> InputBuffer:
        return self._decode_inputs if shape.is_decode else self._mixed_inputs

    def _prepare(self, batch: StepBatch, recorded: RecordedRows | None) -> None:
        arrays = batch.query_lengths, batch.context_lengths, batch.block_tables
        self._model.attention.prepare(StepRows(*arrays, self._pool.geometry.groups, recorded))

    def _recorded_rows(self, shape: StepShape) -> RecordedRows:
        return RecordedRows(shape.row_count, self._limits.entry_count // self._limits.row_count)

    def _forward(self, shape: StepShape) -> torch.Tensor:
        inputs = self._buffer(shape).inputs(shape, self._results[0])
        return self._model.compute(inputs, self._pool)

    def _hides_launches(self, shape: StepShape) -> bool:
        """Whether the device works on a step for so long that launching its kernels one by one costs nothing."""
        if shape in self._known_to_hide:
            return self._known_to_hide[shape]
        self.queue.mark().await_on_host()
        began, at = self.queue.mark(), perf_counter()
        self._forward(shape)
        launched_s = perf_counter() - at
        ended = self.queue.mark()
        ended.await_on_host()
        self._known_to_hide[shape] = ended.seconds_since(began) > _HIDDEN * launched_s
        return self._known_to_hide[shape]

    def _make_room(self, logits: torch.Tensor) -> None:
        """Have a place where recorded steps leave logits like these: one for all, since a step's are read before the
        next one's come.
        """
        if self._logits is None:
            self._logits = logits.new_empty(self._limits.row_count, logits.shape[-1])

    def _forward_in_place(self, shape: StepShape) -> torch.Tensor:
        assert self._logits is not None
        return self._logits[: shape.sampled_count].copy_(self._forward(shape))

    def _shape_of(self, batch: StepBatch) -> StepShape:
        """The smallest recorded shape that holds the step, or its own."""
        is_decode = bool((batch.query_lengths == 1).all())
        own = StepShape(len(batch.slots), len(batch.token_ids), len(batch.sampling), is_decode)
        holding = (shape for shape in self._recorded if _holds(shape, own))
        return min(holding, key=lambda shape: shape.token_count, default=own)


def shapes_to_record(limits: StepLimits) -> Iterator[StepShape]:
    """Shapes for all steps, largest first; those of many tokens need be recorded only where that pays."""
    rows, most = limits.row_count, limits.token_count
    narrow = range(_MIXED_INTERVAL, min(most, _WIDE_FROM) + 1, _MIXED_INTERVAL)
    for tokens in reversed([*narrow, *range(_WIDE_FROM + _WIDE_INTERVAL, most + 1, _WIDE_INTERVAL)]):
        yield StepShape(rows, tokens, rows, is_decode=False)
    for count in reversed(decode_sizes(rows)):
        yield StepShape(count, count, count, is_decode=True)


def decode_sizes(most: int) -> list[int]:
    """Numbers of rows to which decoding steps are padded: 1, 2, 4, then by 8, from 64 on by a quarter of a doubling."""
    sizes = [1, 2, 4, *range(8, _FINELY_RECORDED, 8)]
    size = _FINELY_RECORDED
    while size < most:
        sizes += range(size, 2 * size, size // 4)
        size *= 2
    return [*(size for size in sizes if size < most), most]


def _holds(shape: StepShape, own: StepShape) -> bool:
    return (
        shape.is_decode == own.is_decode and shape.row_count >= own.row_count and shape.token_count >= own.token_count
    )


class DeviceStep:
    """A step that was queued."""

    keeps_tokens = True

    def __init__(
        self,
        batch: StepBatch,
        results: torch.Tensor,  # [2, rows] on the host, once it has ended
        before_ended: Moment | None,
        began: Moment,
        forwarded: Moment,
        ended: Moment,
    ) -> None:
        """Wait for nothing."""
        self.ended = ended
        self._batch, self._results = batch, results
        self._before_ended, self._began, self._forwarded = before_ended, began, forwarded
        self._error: Exception | None = None

    def wait(self) -> None:
        """Wait for its end, good or bad."""
        try:
            self.ended.await_on_host()
        except RuntimeError as error:  # the device does not work any more: the result says so
            self._error = error

    def result(self) -> StepOutput:
        """Wait for its end.

        Raises `StepError` where a row's logits are not finite, and what the device failed with.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        sampling = self._batch.sampling
        chosen, finite = self._results.numpy()[:, : len(sampling)]
        if not finite.all():
            rows = sampling.row_index[np.flatnonzero(finite == 0)]
            raise StepError(f"slots {self._batch.slots[rows].tolist()} have NaN or infinite logits")
        gap_s = None if self._before_ended is None else max(0.0, self._began.seconds_since(self._before_ended))
        return StepOutput(
            token_ids=chosen.copy(),
            forward_s=self._forwarded.seconds_since(self._began),
            sample_s=self.ended.seconds_since(self._forwarded),
            gap_s=gap_s,
        )


def _empty_batch(group_count: int) -> StepBatch:
    """A step of nothing but padding."""
    none: IntArray = np.zeros(0, dtype=np.int64)
    numbers = np.zeros(0, dtype=np.float32)
    return StepBatch(
        slots=none,
        token_ids=none,
        query_lengths=none,
        context_lengths=none,
        block_tables=(np.zeros((0, 0), dtype=np.int32),) * group_count,
        sampling=SamplingBatch(none, numbers, none, numbers, numbers, none.astype(np.uint64), none, none),
    )


def _one_row(group_count: int) -> StepBatch:
    """A first token, at the beginning of block 0, after which one is drawn."""
    zero: IntArray = np.zeros(1, dtype=np.int64)
    one = np.ones(1, dtype=np.float32)
    return StepBatch(
        slots=zero,
        token_ids=zero,
        query_lengths=zero + 1,
        context_lengths=zero + 1,
        block_tables=(np.zeros((1, 1), dtype=np.int32),) * group_count,
        sampling=SamplingBatch(zero, one, zero, one, 0 * one, zero.astype(np.uint64), zero, zero),
    )
