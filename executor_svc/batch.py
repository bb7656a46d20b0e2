"""One step's work as arrays: what the executor builds from its slots and a runner computes."""

from dataclasses import dataclass
from typing import Protocol

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

    slots: IntArray  # [R] ascending; for messages only
    token_ids: IntArray  # [T]
    query_lengths: IntArray  # [R] at least 1
    context_lengths: IntArray  # [R] tokens in the cache once this step has run
    block_tables: tuple[NDArray[np.int32], ...]  # by layer group [R, W]; see `NO_BLOCK`; entries past the end are 0
    sampling: SamplingBatch


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a runner computed."""

    token_ids: IntArray  # [S] one for each sampling row
    forward_s: float  # the forward pass
    sample_s: float  # sampling, and fetching the tokens


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


class Runner(Protocol):
    """Runs steps of one model over one paged cache. Called from one thread only."""

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
