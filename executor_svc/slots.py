"""What the executor knows of its requests: one entry of every array for each slot."""

import numpy as np
from numpy.typing import NDArray

from common.token_hashes import hash_tokens
from executor_svc.batch import NO_BLOCK, IntArray, RunnerInfo, SamplingBatch, StepBatch
from paceline.internal.v1 import executor_pb2 as pb


class PlanError(Exception):
    """A plan contradicts what the executor knows: one side has a bug."""


def read_array(data: bytes, dtype: str) -> IntArray:
    """The integers of a packed field. Raises `PlanError` when it is cut off."""
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise PlanError(f"a field of {len(data)} bytes is not a whole number of {size}-byte integers")
    return np.frombuffer(data, dtype=dtype).astype(np.int64)


def read_block_ids(data: bytes) -> IntArray:
    """The block ids of a packed field, `NO_BLOCK` where there is none."""
    return read_array(data, "<u4").astype(np.uint32).astype(np.int32).astype(np.int64)


class Slots:
    """The state of every slot, kept as arrays so that a step of hundreds of decoding requests is a few operations.

    A slot is empty, catching up (some known tokens are not computed) or decoding (all are, and each step computes
    the token sampled last). A halted slot, stopped by its own tokens or failed, keeps its place and computes nothing.
    """

    def __init__(self, info: RunnerInfo) -> None:
        """Start with all slots empty."""
        count = info.slot_count
        self._info = info
        self._groups = info.layer_groups
        self.occupied: NDArray[np.bool_] = np.zeros(count, dtype=bool)
        self.decoding: NDArray[np.bool_] = np.zeros(count, dtype=bool)
        self.halted: NDArray[np.bool_] = np.zeros(count, dtype=bool)
        self.computed: IntArray = np.zeros(count, dtype=np.int64)  # tokens in the cache
        self.last_token: IntArray = np.zeros(count, dtype=np.int64)  # sampled last, as in a batch; decoding slots only
        self.output_count: IntArray = np.zeros(count, dtype=np.int64)  # tokens generated, earlier placements and those
        # on their way included
        self.awaited_steps: IntArray = np.zeros(count, dtype=np.int64)  # begun last of those that sample the slot
        self.max_output_count: IntArray = np.zeros(count, dtype=np.int64)
        self.block_tables = [
            np.zeros((count, -(-info.context_length // group.block_size)), dtype=np.int32) for group in self._groups
        ]  # by layer group; behind a table's end are zeros
        self.entry_counts: IntArray = np.zeros((len(self._groups), count), dtype=np.int64)  # in those tables
        self.first_blocks: IntArray = np.zeros(
            (len(self._groups), count), dtype=np.int64
        )  # entries before are no block
        self.temperature = np.zeros(count, dtype=np.float32)
        self.top_k: IntArray = np.zeros(count, dtype=np.int64)
        self.top_p = np.ones(count, dtype=np.float32)
        self.min_p = np.zeros(count, dtype=np.float32)
        self.seed: NDArray[np.uint64] = np.zeros(count, dtype=np.uint64)
        self.choice: IntArray = np.zeros(count, dtype=np.int64)
        self.known: list[IntArray] = [np.zeros(0, dtype=np.int64)] * count  # tokens that the scheduler sent
        self.stop_token_ids: list[frozenset[int]] = [frozenset()] * count
        self.request_ids: list[str] = [""] * count
        self.trace_ids: list[bytes] = [b""] * count
        self.attempts: list[tuple[int, int]] = [(0, 0)] * count  # (epoch, attempt)
        self.generated: list[list[int]] = [[] for _ in range(count)]  # tokens sampled here
        self.sampled_steps: IntArray = np.zeros(count, dtype=np.int64)  # in which the last of them was
        self.keys: list[int] = [0] * count  # the scheduler's numbers for its requests
        self.errors: list[str] = [""] * count  # why a slot failed
        self.out_of_memory: NDArray[np.bool_] = np.zeros(count, dtype=bool)  # ... for want of memory alone

    def drop(self, slots: IntArray) -> None:
        """Empty slots."""
        self.require(slots, occupied=True, act="dropped")
        self.occupied[slots] = self.decoding[slots] = False

    def pause(self, slots: IntArray) -> None:
        """Stop slots from decoding."""
        self.require(slots, occupied=True, act="paused")
        self.decoding[slots] = False

    def start(self, request: pb.NewRequest, epoch: int) -> None:
        """Put a new request into its slot, on behalf of the scheduler with this epoch."""
        slot = request.slot
        self.require(np.array([slot]), occupied=False, act="started")
        known = read_array(request.token_ids, "<u4")
        if len(request.block_tables) != len(self._groups):
            raise PlanError(
                f"slot {slot} starts with {len(request.block_tables)} block tables; the model has "
                f"{len(self._groups)} layer groups"
            )
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
        self.trace_ids[slot] = request.trace.trace_id
        self.attempts[slot] = (epoch, request.attempt)
        self.keys[slot] = request.key
        self.generated[slot] = []
        self.sampled_steps[slot] = self.awaited_steps[slot] = 0
        self.errors[slot] = ""
        sampling = request.sampling
        self.temperature[slot], self.top_k[slot] = sampling.temperature, sampling.top_k
        self.top_p[slot], self.min_p[slot], self.seed[slot] = sampling.top_p, sampling.min_p, sampling.seed
        self.choice[slot] = request.choice
        for group, count in enumerate(self.entry_counts[:, slot].tolist()):
            self.block_tables[group][slot, :count] = 0
        self.entry_counts[:, slot] = self.first_blocks[:, slot] = 0
        for group, table in enumerate(request.block_tables):
            self._extend_table(group, slot, read_block_ids(table))
        self._check_computed(slot, request.computed_count)

    def append_blocks(self, slots: IntArray, block_ids: IntArray, groups: IntArray) -> None:
        """Append each block to the table that the slot beside it has for that layer group."""
        self.require(slots, occupied=True, act="given a block")
        if not len(slots) == len(block_ids) == len(groups):
            raise PlanError(f"{len(block_ids)} blocks are given to {len(slots)} slots in {len(groups)} layer groups")
        if len(groups) and groups.max() >= len(self._groups):
            raise PlanError(f"a block is given to layer group {groups.max()}, but there are {len(self._groups)}")
        for group, slot, block in zip(groups.tolist(), slots.tolist(), block_ids, strict=True):
            self._extend_table(group, slot, block[None])

    def _extend_table(self, group: int, slot: int, block_ids: IntArray) -> None:
        if len(block_ids) and not NO_BLOCK <= block_ids.min() <= block_ids.max() < self._info.block_count:
            raise PlanError(f"blocks {block_ids} are given away, but there are {self._info.block_count}")
        start = self.entry_counts[group, slot]
        end = start + len(block_ids)
        table = self.block_tables[group][slot]
        if end > len(table):
            raise PlanError(f"slot {slot} is given more than the {len(table)} blocks of the longest context")
        table[start:end] = block_ids
        self.entry_counts[group, slot] = end
        absent = np.flatnonzero(block_ids == NO_BLOCK)
        if len(absent):
            self.first_blocks[group, slot] = start + absent[-1] + 1

    def adopt(self, slots: IntArray, token_counts: IntArray) -> None:
        """Take the next known tokens of slots that are catching up as computed: their blocks hold them already."""
        self.require(slots, occupied=True, act="spared tokens")
        if len(slots) != len(token_counts) or token_counts.min() < 1:
            raise PlanError(f"{len(slots)} slots adopt the token counts {token_counts.tolist()}")
        for slot, count in zip(slots.tolist(), token_counts.tolist(), strict=True):
            end = self.computed[slot] + count
            if self.decoding[slot] or end >= len(self.known[slot]):
                raise PlanError(
                    f"slot {slot} adopts up to token {end} of {len(self.known[slot])} known; it needs one to compute"
                )
            self._check_computed(slot, end)
            self.computed[slot] = end

    def _check_computed(self, slot: int, count: int) -> None:
        """Refuse tokens that are said to be in the cache where the slot has no block for them."""
        for group, entry_count in zip(self._groups, self.entry_counts[:, slot], strict=True):
            if count > entry_count * group.block_size:
                raise PlanError(f"slot {slot} has {count} computed tokens but {entry_count} blocks in a layer group")

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
        sampling = rows[samples]
        return StepBatch(
            slots=rows,
            token_ids=token_ids,
            query_lengths=lengths,
            context_lengths=context_lengths,
            block_tables=tuple(
                self._tables_of(group, rows, int(context_lengths.max(initial=0))) for group in range(len(self._groups))
            ),
            sampling=SamplingBatch(
                row_index=np.flatnonzero(samples),
                temperature=self.temperature[sampling],
                top_k=self.top_k[sampling],
                top_p=self.top_p[sampling],
                min_p=self.min_p[sampling],
                seed=self.seed[sampling],
                choice=self.choice[sampling],
                output_index=self.output_count[sampling],
            ),
        )

    def _tables_of(self, group: int, rows: IntArray, token_count: int) -> NDArray[np.int32]:
        width = -(-token_count // self._groups[group].block_size)
        return self.block_tables[group][rows, :width]

    def computing(self, slots: IntArray) -> NDArray[np.bool_]:
        """Which of these slots still compute something, as far as that can be known now."""
        return ~self.halted[slots] & (self.output_count[slots] < self.max_output_count[slots])

    def begin(self, sampled: IntArray, batch: StepBatch, step: int) -> None:
        """A step is on its way: it computes `batch`, and `sampled` decode from then on."""
        self.computed[batch.slots] += batch.query_lengths
        self.decoding[sampled] = True
        awaited = batch.slots[batch.sampling.row_index]
        self.output_count[awaited] += 1
        self.awaited_steps[awaited] = step
        self.last_token[awaited] = -1 - np.arange(len(awaited))

    def take_back(self, batch: StepBatch, in_vain: NDArray[np.bool_], gave_nothing: NDArray[np.bool_]) -> None:
        """Some rows of a step, `[R]`, were computed in vain, as they had ended before it; some gave no token."""
        self.computed[batch.slots[in_vain]] -= batch.query_lengths[in_vain]
        rows = batch.sampling.row_index
        self.output_count[batch.slots[rows[gave_nothing[rows]]]] -= 1

    def fail(self, slot: int, error: str, *, out_of_memory: bool) -> None:
        """Stop a slot for good."""
        self.halted[slot] = True
        self.errors[slot] = error
        self.out_of_memory[slot] = out_of_memory

    def record(self, sampled: IntArray, token_ids: IntArray, step: int) -> None:
        """Take in the tokens that slots have sampled in this step; halt those which are through."""
        is_last = self.awaited_steps[sampled] == step  # else one more is on its way
        self.last_token[sampled[is_last]] = token_ids[is_last]
        self.sampled_steps[sampled] = step
        through = is_last & (self.output_count[sampled] >= self.max_output_count[sampled])
        self.halted[sampled[through]] = True
        for slot, token in zip(sampled.tolist(), token_ids.tolist(), strict=True):
            self.generated[slot].append(token)
            if token in self.stop_token_ids[slot]:
                self.halted[slot] = True

    def held(self, slot: int) -> pb.HeldAttempt:
        """What is there to know of a slot for a scheduler that takes it over."""
        known, generated = self.known[slot].astype("<u4"), np.array(self.generated[slot], dtype="<u4")
        before = int(self.output_count[slot]) - len(generated)  # outputs that came with the request
        epoch, attempt = self.attempts[slot]
        return pb.HeldAttempt(
            slot=slot,
            request_id=self.request_ids[slot],
            choice=int(self.choice[slot]),
            epoch=epoch,
            attempt=attempt,
            output_ids=known[len(known) - before :].tobytes() + generated.tobytes(),
            tokens_hash=hash_tokens(known.tobytes(), generated.tobytes()),
            computed_count=int(self.computed[slot]),
            state=self._held_state(slot),
            block_tables=[
                table[slot, :count].astype("<i4").tobytes()  # NO_BLOCK is the largest uint32
                for table, count in zip(self.block_tables, self.entry_counts[:, slot].tolist(), strict=True)
            ],
            error=self.errors[slot],
            out_of_memory=bool(self.errors[slot]) and bool(self.out_of_memory[slot]),
            key=self.keys[slot],
        )

    def _held_state(self, slot: int) -> pb.HeldState.ValueType:
        if self.halted[slot]:
            return pb.HELD_STATE_HALTED
        if self.decoding[slot]:
            return pb.HELD_STATE_DECODING
        catches_up = self.computed[slot] < len(self.known[slot])
        return pb.HELD_STATE_CATCHING_UP if catches_up else pb.HELD_STATE_HALTED

    def check_fits(self, rows: IntArray, lengths: IntArray) -> None:
        """Refuse a step that computes tokens which are not known, or have no block."""
        starts = self.computed[rows]
        ends = starts + lengths
        for group, entry_counts, first_blocks in zip(self._groups, self.entry_counts, self.first_blocks, strict=True):
            short = np.flatnonzero(ends > entry_counts[rows] * group.block_size)
            if len(short):
                slot, end = rows[short[0]], ends[short[0]]
                raise PlanError(f"slot {slot} computes up to token {end} but has {entry_counts[slot]} blocks")
            blind = np.flatnonzero(group.first_seen(starts) // group.block_size < first_blocks[rows])
            if len(blind):
                slot, start = rows[blind[0]], starts[blind[0]]
                raise PlanError(f"slot {slot} computes token {start}, which sees tokens that have no block")

    def require(self, slots: IntArray, *, occupied: bool, act: str) -> None:
        if len(slots) and not 0 <= slots.min() <= slots.max() < self._info.slot_count:
            raise PlanError(f"slot {slots.max()} is {act}, but there are {self._info.slot_count}")
        wrong = slots[self.occupied[slots] != occupied]
        if len(wrong):
            raise PlanError(f"slot {wrong[0]} is {act} but is {'empty' if occupied else 'taken'}")
