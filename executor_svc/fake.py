"""`--model fake`: the real stream edge, slots and block tables without a model.

The next token is a hash of the tokens read through the block table, so a wrong table gives a wrong token; the time
of a step follows a formula. Made for tests and for measurements of everything but the model.
"""

import os
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from executor_svc.batch import IntArray, LayerGroup, RunnerInfo, StepBatch, StepOutput
from executor_svc.config import ExecutorConfig

Hashes = NDArray[np.uint64]

FINGERPRINT = "fake"
VOCABULARY_SIZE = 257  # the bytes, and an end token that never comes by itself
END_TOKEN_ID = 256
CONTEXT_LENGTH = 8192
_FIRST_TOKEN, _TOKEN_COUNT = 32, 95  # what comes is printable ASCII


class FakeRunner:
    """Stores tokens where a model would store their keys and values."""

    def __init__(self, config: ExecutorConfig, layer_groups: Sequence[LayerGroup] = ()) -> None:
        """Make an empty cache of `config.fake_block_count` blocks; the layers see everything unless told otherwise."""
        config = config.sized_for("cpu")
        groups = tuple(layer_groups) or (LayerGroup(config.block_size),)
        tokens_per_block = max(group.block_size for group in groups)
        self._step_s = config.fake_step_us / 1e6
        self._token_s = config.fake_token_us / 1e6
        self._deadly_token = config.fake_deadly_token
        self.info = RunnerInfo(
            name="fake",
            fingerprint=FINGERPRINT,
            context_length=config.max_model_len or CONTEXT_LENGTH,
            vocabulary_size=VOCABULARY_SIZE,
            end_token_ids=(END_TOKEN_ID,),
            dtype="none",
            mode="fake",
            layer_groups=groups,
            block_count=config.fake_block_count,
            slot_count=config.max_num_seqs,
            step_token_count=config.max_num_batched_tokens,
            cache_bytes=8 * config.fake_block_count * tokens_per_block,
        )
        self._cache: IntArray = np.full((config.fake_block_count, tokens_per_block), -1, dtype=np.int64)

    def run(self, batch: StepBatch) -> StepOutput:
        """Store the step's tokens, read every sampling row's context back and hash it."""
        started_at = time.perf_counter()
        if self._deadly_token in batch.token_ids:
            os._exit(1)  # as a bug of a device's driver would
        self._write(batch)
        token_ids = self._sample(batch)
        rest = self._step_s + self._token_s * len(batch.token_ids) - (time.perf_counter() - started_at)
        if rest > 0:
            time.sleep(rest)
        return StepOutput(token_ids, forward_s=time.perf_counter() - started_at, sample_s=0.0)

    def check_device(self) -> None:
        """There is none that could fail."""

    def copy_blocks(self, sources: IntArray, destinations: IntArray) -> None:
        """Copy what blocks hold."""
        self._cache[destinations] = self._cache[sources]

    def _write(self, batch: StepBatch) -> None:
        rows = np.repeat(np.arange(len(batch.slots)), batch.query_lengths)
        offsets = np.arange(len(batch.token_ids)) - np.repeat(
            np.cumsum(batch.query_lengths) - batch.query_lengths, batch.query_lengths
        )
        positions = (batch.context_lengths - batch.query_lengths)[rows] + offsets
        for number, (group, tables) in enumerate(zip(self.info.layer_groups, batch.block_tables, strict=True)):
            blocks = tables[rows, positions // group.block_size]
            self._cache[blocks, positions % group.block_size] = _entries(batch.token_ids, number)

    def _sample(self, batch: StepBatch) -> IntArray:
        sampling = batch.sampling
        if not len(sampling):
            return np.zeros(0, dtype=np.int64)
        lengths = batch.context_lengths[sampling.row_index]
        hashes: Hashes = np.zeros(len(sampling), dtype=np.uint64)
        for group, tables in zip(self.info.layer_groups, batch.block_tables, strict=True):
            width = -(-int(lengths.max()) // group.block_size)
            entries = self._cache[tables[sampling.row_index, :width], : group.block_size].reshape(len(sampling), -1)
            hashes += _hash_contexts(entries, group.first_seen(lengths - 1), lengths)
        noise = _mix(sampling.seed ^ _noise_index(sampling.choice, sampling.output_index))
        hashes ^= np.where(sampling.temperature > 0, noise, np.uint64(0))
        return _FIRST_TOKEN + (_mix(hashes) % np.uint64(_TOKEN_COUNT)).astype(np.int64)


def next_token(
    token_ids: Sequence[int],
    seed: int | None = None,
    output_index: int = 0,
    choice: int = 0,
    layer_groups: Sequence[LayerGroup] = (LayerGroup(1),),
) -> int:
    """What the fake model says after `token_ids`; greedy without a seed. The oracle of tests."""
    length = np.array([len(token_ids)])
    hashes: Hashes = np.zeros(1, dtype=np.uint64)
    for number, group in enumerate(layer_groups):
        entries = _entries(np.array([token_ids], dtype=np.int64), number)
        hashes += _hash_contexts(entries, group.first_seen(length - 1), length)
    if seed is not None:
        hashes ^= _mix(np.uint64(seed) ^ _noise_index(np.array([choice]), np.array([output_index])))
    return _FIRST_TOKEN + int(_mix(hashes)[0] % np.uint64(_TOKEN_COUNT))


def _entries(token_ids: IntArray, group: int) -> IntArray:
    """What the cache keeps of tokens for a layer group; no other group keeps the same."""
    return token_ids + (group << 16)


def _noise_index(choice: IntArray, output_index: IntArray) -> Hashes:
    return (choice.astype(np.uint64) << np.uint64(48)) + (output_index.astype(np.uint64) << np.uint64(32))


def _hash_contexts(entries: IntArray, first: IntArray, end: IntArray) -> Hashes:
    """Hash each row's entries [first, end): a sum over positions of mixed (position, entry) pairs."""
    positions = np.arange(entries.shape[1])
    terms = _mix(entries.astype(np.uint64) + (positions.astype(np.uint64) << np.uint64(20)))
    is_seen = (positions >= first[:, None]) & (positions < end[:, None])
    return np.where(is_seen, terms, np.uint64(0)).sum(axis=1, dtype=np.uint64)


def _mix(values: Hashes) -> Hashes:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = values ^ (values >> np.uint64(31))
    return mixed
