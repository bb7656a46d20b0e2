"""What the executor knows of its requests: one entry of every array for each slot."""

import numpy as np
from numpy.typing import NDArray

from executor_svc.batch import IntArray, RunnerInfo, SamplingBatch, StepBatch
from paceline.internal.v1 import executor_pb2 as pb


class PlanError(Exception):
    """A plan contradicts what the executor knows: one side has a bug."""


def read_array(data: bytes, dtype: str) -> IntArray:
    """The integers of a packed field. Raises `PlanError` when it is cut off."""
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise PlanError(f"a field of {len(data)} bytes is not a whole number of {size}-byte integers")
    return np.frombuffer(data, dtype=dtype).astype(np.int64)


class Slots:
    """The state of every slot, kept as arrays so that a step of hundreds of decoding requests is a few operations.

    A slot is empty, catching up (some known tokens are not computed) or decoding (all are, and each step computes
    the token sampled last). A halted slot, stopped by its own tokens or failed, keeps its place and computes nothing.
    """

    def __init__(self, info: RunnerInfo) -> None:
        """Start with all slots empty."""
        count = info.slot_count
        width = -(-info.context_length // info.block_size)
        self._info = info
        self.occupied: NDArray[np.bool_] = np.zeros(count, dtype=bool)
        self.decoding: NDArray[np.bool_] = np.zeros(count, dtype=bool)
        self.halted: NDArray[np.bool_] = np.zeros(count, dtype=bool)
        self.computed: IntArray = np.zeros(count, dtype=np.int64)  # tokens in the cache
        self.last_token: IntArray = np.zeros(count, dtype=np.int64)  # sampled last; decoding slots only
        self.output_count: IntArray = np.zeros(count, dtype=np.int64)  # tokens generated, earlier placements included
        self.max_output_count: IntArray = np.zeros(count, dtype=np.int64)
        self.block_tables: NDArray[np.int32] = np.zeros((count, width), dtype=np.int32)
        self.block_counts: IntArray = np.zeros(count, dtype=np.int64)
        self.temperature = np.zeros(count, dtype=np.float32)
        self.top_k: IntArray = np.zeros(count, dtype=np.int64)
        self.top_p = np.ones(count, dtype=np.float32)
        self.min_p = np.zeros(count, dtype=np.float32)
        self.seed: NDArray[np.uint64] = np.zeros(count, dtype=np.uint64)
        self.known: list[IntArray] = [np.zeros(0, dtype=np.int64)] * count  # tokens that the scheduler sent
        self.stop_token_ids: list[frozenset[int]] = [frozenset()] * count
        self.request_ids: list[str] = [""] * count

    def drop(self, slots: IntArray) -> None:
        """Empty slots."""
        self.require(slots, occupied=True, act="dropped")
        self.occupied[slots] = self.decoding[slots] = False

    def pause(self, slots: IntArray) -> None:
        """Stop slots from decoding."""
        self.require(slots, occupied=True, act="paused")
        self.decoding[slots] = False

    def start(self, request: pb.NewRequest) -> None:
        """Put a new request into its slot."""
        slot = request.slot
        self.require(np.array([slot]), occupied=False, act="started")
        known = read_array(request.token_ids, "<u4")
        if len(request.block_tables) != 1:
            raise PlanError(f"slot {slot} starts with {len(request.block_tables)} block tables; there is 1 layer group")
        if not len(known) or known.max() >= self._info.vocabulary_size or request.computed_count >= len(known):
            raise PlanError(
                f"slot {slot} starts with {len(known)} tokens up to {known.max(initial=0)}, "
                f"{request.computed_count} of them computed; it needs one to compute, and the vocabulary ends at "
                f"{self._info.vocabulary_size - 1}"
            )
        self.occupied[slot] = True
        self.decoding[slot] = self.halted[slot] = False
        self.computed[slot] = request.computed_count
        self.output_count[slot] = request.output_count
        self.max_output_count[slot] = request.max_output_count
        self.known[slot] = known
        self.stop_token_ids[slot] = frozenset(read_array(request.stop_token_ids, "<u4").tolist())
        self.request_ids[slot] = request.request_id
        sampling = request.sampling
        self.temperature[slot], self.top_k[slot] = sampling.temperature, sampling.top_k
        self.top_p[slot], self.min_p[slot], self.seed[slot] = sampling.top_p, sampling.min_p, sampling.seed
        self.block_counts[slot] = 0
        blocks = read_array(request.block_tables[0], "<u4")
        self.append_blocks(np.full(len(blocks), slot), blocks)

    def append_blocks(self, slots: IntArray, block_ids: IntArray) -> None:
        """Append each block to the table of the slot beside it."""
        self.require(slots, occupied=True, act="given a block")
        if len(slots) != len(block_ids):
            raise PlanError(f"{len(block_ids)} blocks are given to {len(slots)} slots; each needs one")
        if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < self._info.block_count:
            raise PlanError(f"block {block_ids.max()} is given away, but there are {self._info.block_count}")
        for slot, block in zip(slots.tolist(), block_ids.tolist(), strict=True):
            position = self.block_counts[slot]
            if position == self.block_tables.shape[1]:
                raise PlanError(f"slot {slot} is given more than the {position} blocks of the longest context")
            self.block_tables[slot, position] = block
            self.block_counts[slot] = position + 1

    def batch(self, rows: IntArray, lengths: IntArray, samples: NDArray[np.bool_]) -> StepBatch:
        """Lay the next `lengths` tokens of the slots `rows` end to end; `samples` says which of them sample."""
        starts = self.computed[rows]
        decoding = self.decoding[rows]
        token_ids = np.zeros(int(lengths.sum()), dtype=np.int64)
        offsets = np.cumsum(lengths) - lengths
        token_ids[offsets[decoding]] = self.last_token[rows[decoding]]
        for row in np.flatnonzero(~decoding).tolist():
            known = self.known[rows[row]][starts[row] : starts[row] + lengths[row]]
            token_ids[offsets[row] : offsets[row] + lengths[row]] = known
        context_lengths = starts + lengths
        width = -(-int(context_lengths.max()) // self._info.block_size)
        sampling = rows[samples]
        return StepBatch(
            slots=rows,
            token_ids=token_ids,
            query_lengths=lengths,
            context_lengths=context_lengths,
            block_tables=np.where(
                np.arange(width) < self.block_counts[rows, None], self.block_tables[rows, :width], np.int32(0)
            ),
            sampling=SamplingBatch(
                row_index=np.flatnonzero(samples),
                temperature=self.temperature[sampling],
                top_k=self.top_k[sampling],
                top_p=self.top_p[sampling],
                min_p=self.min_p[sampling],
                seed=self.seed[sampling],
                output_index=self.output_count[sampling],
            ),
        )

    def record(self, sampled: IntArray, token_ids: IntArray) -> None:
        """Take in the tokens that slots have sampled; halt those which are through."""
        self.last_token[sampled] = token_ids
        self.output_count[sampled] += 1
        through = self.output_count[sampled] >= self.max_output_count[sampled]
        self.halted[sampled[through]] = True
        for slot, token in zip(sampled.tolist(), token_ids.tolist(), strict=True):
            if token in self.stop_token_ids[slot]:
                self.halted[slot] = True

    def check_fits(self, rows: IntArray, lengths: IntArray) -> None:
        """Refuse a step that computes tokens which are not known, or have no block."""
        ends = self.computed[rows] + lengths
        short = np.flatnonzero(ends > self.block_counts[rows] * self._info.block_size)
        if len(short):
            slot, end = rows[short[0]], ends[short[0]]
            raise PlanError(f"slot {slot} computes up to token {end} but has {self.block_counts[slot]} blocks")

    def require(self, slots: IntArray, *, occupied: bool, act: str) -> None:
        if len(slots) and not 0 <= slots.min() <= slots.max() < self._info.slot_count:
            raise PlanError(f"slot {slots.max()} is {act}, but there are {self._info.slot_count}")
        wrong = slots[self.occupied[slots] != occupied]
        if len(wrong):
            raise PlanError(f"slot {wrong[0]} is {act} but is {'empty' if occupied else 'taken'}")
