"""One step's work as arrays: what the executor builds from its slots and a runner computes."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


NO_BLOCK = -1
"""Entry of a block table behind what the layers of its group see: nothing reads it."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that see the same earlier positions, and so share one block table for each request."""

    block_size: int  # tokens that a block holds for this group
    window: int = 0  # a position sees the last `window` ones, its own included; 0: all
    chunk: int = 0  # a position sees only those of its own chunk of this many; 0: all
    layer_count: int = 1

    def first_seen(self, position: IntArray) -> IntArray:
        """The first position that each position sees."""
        first = np.zeros_like(position)
        if self.window:
            first = np.maximum(first, position - self.window + 1)
        if self.chunk:
            first = np.maximum(first, position // self.chunk * self.chunk)
        return first


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each of the S sampling rows chooses its token; every default resolved."""

    row_index: IntArray  # [S] which rows of the step sample, ascending
    temperature: FloatArray  # [S] 0 is greedy
    top_k: IntArray  # [S] 0 keeps all
    top_p: FloatArray  # [S] 1 keeps all
    min_p: FloatArray  # [S] 0 keeps all
    seed: NDArray[np.uint64]  # [S]
    choice: IntArray  # [S] which of the continuations of its prompt the row is
    output_index: IntArray  # [S] how many tokens the request has generated before this one

    def __len__(self) -> int:
        return len(self.row_index)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """R rows (requests) of one step, their T tokens laid end to end.

    Row i computes `query_lengths[i]` tokens that end at `context_lengths[i]`: its first token has position
    `context_lengths[i] - query_lengths[i]`. For the layers of group g, whose blocks hold B tokens, the keys and values
    of position p belong in block `block_tables[g][i, p // B]` at offset `p % B`.
    """

    slots: IntArray  # [R] ascending; a runner needs them for messages only
    token_ids: IntArray  # [T]; -1 - i is the token of sampling row i of the batch before, while that is on its way
    query_lengths: IntArray  # [R] at least 1
    context_lengths: IntArray  # [R] tokens in the cache once this step has run
    block_tables: tuple[NDArray[np.int32], ...]  # by layer group [R, W]; see `NO_BLOCK`; entries past the end are 0
    sampling: SamplingBatch

    @property
    def sampled_tokens(self) -> IntArray:
        """Which of the step's tokens give logits, `[S]`."""
        last_token: IntArray = np.cumsum(self.query_lengths) - 1
        return last_token[self.sampling.row_index]

    def known(self, before: IntArray) -> StepBatch:
        """The same once the tokens of the batch `before` are known, `[S]` of its sampling rows."""
        is_late = self.token_ids < 0
        if not is_late.any():
            return self
        token_ids = self.token_ids.copy()
        token_ids[is_late] = before[-1 - token_ids[is_late]]
        return replace(self, token_ids=token_ids)

    def part(self, rows: IntArray) -> StepBatch:
        """Some of its rows, ascending."""
        is_in = np.zeros(len(self.slots), dtype=bool)
        is_in[rows] = True
        sampling = self.sampling
        samples = is_in[sampling.row_index]
        return StepBatch(
            slots=self.slots[rows],
            token_ids=self.token_ids[np.repeat(is_in, self.query_lengths)],
            query_lengths=self.query_lengths[rows],
            context_lengths=self.context_lengths[rows],
            block_tables=tuple(table[rows] for table in self.block_tables),
            sampling=SamplingBatch(
                row_index=(np.cumsum(is_in) - 1)[sampling.row_index[samples]],
                temperature=sampling.temperature[samples],
                top_k=sampling.top_k[samples],
                top_p=sampling.top_p[samples],
                min_p=sampling.min_p[samples],
                seed=sampling.seed[samples],
                choice=sampling.choice[samples],
                output_index=sampling.output_index[samples],
            ),
        )


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a runner computed."""

    token_ids: IntArray  # [S] one for each sampling row
    forward_s: float  # the forward pass
    sample_s: float  # sampling, and fetching the tokens
    gap_s: float | None = None  # for which the device did nothing since the step before, where it can tell


class StepError(RuntimeError):
    """A step computed something that must not be used; the message names the slots."""


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """A loaded model: its limits and what fits. Told to the scheduler when the executor joins."""

    name: str
    fingerprint: str  # of the serving folder
    context_length: int  # tokens of prompt and output together
    vocabulary_size: int
    end_token_ids: tuple[int, ...]
    dtype: str  # of steps, and of weights where they have another one: `bfloat16 with int8 weights`
    mode: str  # native, packed, fake
    layer_groups: tuple[LayerGroup, ...]
    block_count: int  # any of them serves any group
    slot_count: int  # requests at once
    step_token_count: int  # tokens one step may compute
    cache_bytes: int
    device_count: int = 1  # that share the model


class Runner(Protocol):
    """Runs steps of one model over one paged cache. Called by one thread at a time."""

    info: RunnerInfo

    def run(self, batch: StepBatch) -> StepOutput:
        """Compute the step: write keys and values of every token, sample one token for each sampling row.

        Running a batch, or any part of its rows, again writes the same values to the same places. Any exception
        means that nothing of the step may be used.
        """
        ...

    def check_device(self) -> None:
        """Compute something that cannot fail; raises when the device does not work any more."""
        ...

    def copy_blocks(self, sources: IntArray, destinations: IntArray) -> None:
        """Copy whole blocks, all layers of them: every source is read before any destination is written."""
        ...


class Launched(Protocol):
    """A step that a device has been given."""

    @property
    def keeps_tokens(self) -> bool:
        """Whether the batch launched next may take its tokens from this one, and be launched before it has ended."""
        ...

    def wait(self) -> None:
        """Wait for its end, good or bad."""
        ...

    def result(self) -> StepOutput:
        """Wait for its end. Raises what `Runner.run` does."""
        ...


@runtime_checkable
class AheadRunner(Runner, Protocol):
    """A runner whose device works by itself: steps run in the order in which they are launched.

    `launch` and `run` are called by one thread at a time; what was launched may be waited for by another one meanwhile.
    """

    def launch(self, batch: StepBatch) -> Launched:
        """Begin a step. Whatever cannot be begun raises."""
        ...


@dataclass(frozen=True, slots=True)
class Failed:
    """A step that cannot be used as it was launched."""

    error: Exception
    keeps_tokens: bool = False

    def __post_init__(self) -> None:
        """Let go what the step had in memory when it failed: it may have failed for want of that."""
        traceback.clear_frames(self.error.__traceback__)

    def wait(self) -> None:
        """There is nothing to wait for."""

    def result(self) -> StepOutput:
        """Raises the error."""
        raise self.error


@dataclass(frozen=True, slots=True)
class Ended:
    """A step that ran when it was launched."""

    output: StepOutput
    keeps_tokens: bool = False

    def wait(self) -> None:
        """It has ended."""

    def result(self) -> StepOutput:
        """What it gave."""
        return self.output
