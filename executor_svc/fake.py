"""`--model fake`: the real stream edge, slots and block tables without a model.

The next token is a hash of the tokens read through the block table, so a wrong table gives a wrong token; the time
of a step follows a formula. Made for tests and for measurements of everything but the model.
"""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from executor_svc.batch import IntArray, RunnerInfo, StepBatch, StepOutput
from executor_svc.config import ExecutorConfig

Hashes = NDArray[np.uint64]

FINGERPRINT = "fake"
VOCABULARY_SIZE = 257  # the bytes, and an end token that never comes by itself
END_TOKEN_ID = 256
CONTEXT_LENGTH = 8192
_FIRST_TOKEN, _TOKEN_COUNT = 32, 95  # what comes is printable ASCII


class FakeRunner:
    """Stores tokens where a model would store their keys and values."""

    def __init__(self, config: ExecutorConfig) -> None:
        """Make an empty cache of `config.fake_block_count` blocks."""
        self._step_s = config.fake_step_us / 1e6
        self._token_s = config.fake_token_us / 1e6
        self.info = RunnerInfo(
            name="fake",
            fingerprint=FINGERPRINT,
            context_length=config.max_model_len or CONTEXT_LENGTH,
            vocabulary_size=VOCABULARY_SIZE,
            end_token_ids=(END_TOKEN_ID,),
            dtype="none",
            mode="fake",
            block_size=config.block_size,
            block_count=config.fake_block_count,
            slot_count=config.max_num_seqs,
            step_token_count=config.max_num_batched_tokens,
            cache_bytes=8 * config.fake_block_count * config.block_size,
        )
        self._cache: IntArray = np.full((config.fake_block_count, config.block_size), -1, dtype=np.int64)

    def run(self, batch: StepBatch) -> StepOutput:
        """Store the step's tokens, read every sampling row's context back and hash it."""
        started_at = time.perf_counter()
        self._write(batch)
        token_ids = self._sample(batch)
        rest = self._step_s + self._token_s * len(batch.token_ids) - (time.perf_counter() - started_at)
        if rest > 0:
            time.sleep(rest)
        return StepOutput(token_ids, forward_s=time.perf_counter() - started_at, sample_s=0.0)

    def check_device(self) -> None:
        """There is none that could fail."""

    def _write(self, batch: StepBatch) -> None:
        rows = np.repeat(np.arange(len(batch.slots)), batch.query_lengths)
        offsets = np.arange(len(batch.token_ids)) - np.repeat(
            np.cumsum(batch.query_lengths) - batch.query_lengths, batch.query_lengths
        )
        positions = (batch.context_lengths - batch.query_lengths)[rows] + offsets
        block_size = self.info.block_size
        self._cache[batch.block_tables[rows, positions // block_size], positions % block_size] = batch.token_ids

    def _sample(self, batch: StepBatch) -> IntArray:
        sampling = batch.sampling
        if not len(sampling):
            return np.zeros(0, dtype=np.int64)
        lengths = batch.context_lengths[sampling.row_index]
        tables = batch.block_tables[sampling.row_index, : -(-int(lengths.max()) // self.info.block_size)]
        contexts = self._cache[tables].reshape(len(sampling), -1)
        hashes = _hash_contexts(contexts, lengths)
        noise = _mix(sampling.seed ^ (sampling.output_index.astype(np.uint64) << np.uint64(32)))
        hashes ^= np.where(sampling.temperature > 0, noise, np.uint64(0))
        return _FIRST_TOKEN + (_mix(hashes) % np.uint64(_TOKEN_COUNT)).astype(np.int64)


def next_token(token_ids: Sequence[int], seed: int | None = None, output_index: int = 0) -> int:
    """What the fake model says after `token_ids`; greedy without a seed. The oracle of tests."""
    contexts = np.array([token_ids], dtype=np.int64)
    hashes = _hash_contexts(contexts, np.array([len(token_ids)]))
    if seed is not None:
        hashes ^= _mix(np.array([seed ^ (output_index << 32)], dtype=np.uint64))
    return _FIRST_TOKEN + int(_mix(hashes)[0] % np.uint64(_TOKEN_COUNT))


def _hash_contexts(contexts: IntArray, lengths: IntArray) -> Hashes:
    """Hash each row's first `lengths` tokens: a sum over positions of mixed (position, token) pairs."""
    positions = np.arange(contexts.shape[1], dtype=np.uint64)
    terms = _mix(contexts.astype(np.uint64) + (positions << np.uint64(20)))
    counted: Hashes = np.where(positions < lengths[:, None].astype(np.uint64), terms, np.uint64(0))
    return counted.sum(axis=1, dtype=np.uint64)


def _mix(values: Hashes) -> Hashes:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = values ^ (values >> np.uint64(31))
    return mixed
