"""The runner that computes: a transformers model in packed mode, its paged cache and the sampler."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from common.serving_folder import weight_names
from executor_svc.attention.torch_backend import TorchAttention
from executor_svc.batch import Ended, IntArray, Launched, LayerGroup, RunnerInfo, StepBatch, StepOutput
from executor_svc.config import ExecutorConfig
from executor_svc.kept_checks import CheckFile, Checks, versions
from executor_svc.kv_cache import PagedPool
from executor_svc.machine import available_memory_bytes, resident_bytes, usable_core_count
from executor_svc.memory import trim
from executor_svc.model import LoadedModel, ModelError, choose_device, choose_dtype, load_model, open_folder
from executor_svc.native.build import library_key, processor
from executor_svc.native.model import NativeDecoder, NativeRun
from executor_svc.pool_geometry import PoolGeometry
from executor_svc.ranks.group import RankGroup
from executor_svc.sampler import NonFiniteLogitsError, sample
from executor_svc.self_test import StepModel
from executor_svc.start_times import Progress

log = structlog.get_logger()

_CPU_CACHE_LIMIT = 4 << 30
_TRIAL_DECODE_LENGTH = 1024  # longer rows take a CPU seconds, and no more memory: groups of rows have a limit


class StepError(RuntimeError):
    """A step computed something that must not be used; the message names the slots."""


class TorchRunner:
    """Runs steps of one model over one paged cache; those in C++ by themselves, as an `AheadRunner`."""

    def __init__(self, loaded: LoadedModel, pool: PagedPool, config: ExecutorConfig) -> None:
        self._model = loaded.steps
        self._pool = pool
        self.info = RunnerInfo(
            name=loaded.model_name,
            fingerprint=loaded.fingerprint,
            context_length=loaded.context_length,
            vocabulary_size=loaded.steps.traits.vocabulary_size,
            end_token_ids=loaded.end_token_ids,
            dtype=loaded.type_name,
            mode=loaded.mode,
            layer_groups=pool.geometry.groups,
            block_count=pool.block_count,
            slot_count=config.max_num_seqs,
            step_token_count=config.max_num_batched_tokens,
            cache_bytes=pool.byte_count,
        )

    @classmethod
    def load(cls, config: ExecutorConfig, progress: Progress, group: RankGroup | None = None) -> TorchRunner:
        """Load the model, test it, measure what memory is left and make the cache of it.

        `progress` is told the name of each phase and how much of the whole is done, from 0 to 1. With a `group` this
        process has one rank's part of the model, and every rank does the same at once.

        Raises:
            ModelError: the model or the settings cannot be served; the message says what to change.
        """
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        threads = thread_count(config.threads, device)
        torch.set_num_threads(threads)
        native_threads = (config.threads or usable_core_count()) if device.type == "cpu" and config.native else 0
        check_file = _check_file(config, device, dtype, (threads, native_threads))
        kept = check_file.read() if config.keep_checks else None
        loaded = load_model(
            config.model,
            device,
            dtype,
            TorchAttention(),
            config.max_model_len,
            native_threads,
            kept,
            progress,
            config.weights,
            group.size if group else 1,
        )
        available = available_memory_bytes()  # as long as no step has run, whether the largest one does now or did then
        step_bytes = _step_bytes(loaded, config, kept, check_file, progress)
        progress("making the cache", 0.9)
        traits = loaded.steps.traits
        geometry = traits.geometry(config.block_size)
        budget = config.cache_memory_bytes or _measured_budget(device, config.memory_utilization, available, step_bytes)
        block_count = _block_count(loaded, geometry, config, budget)
        if group:
            block_count = group.least(block_count)  # a block is in the caches of all ranks
        pool = PagedPool(geometry, block_count, traits.cache_dtype, device)
        trim()
        progress("ready", 1.0)
        return cls(loaded, pool, config)

    def launch(self, batch: StepBatch) -> Launched:
        """Begin the step where C++ runs it; else compute it now. Raises what `run` does."""
        if isinstance(self._model, NativeDecoder):
            given = (*_lengths_and_tables(batch), batch.token_ids, self._pool, _sampled_tokens(batch))
            with torch.inference_mode():
                run = self._model.launch(*given)
            return _OnItsWay(run, batch, self._sample)
        return Ended(self.run(batch))

    def run(self, batch: StepBatch) -> StepOutput:
        """Compute the step: write keys and values of every token, sample one token for each sampling row.

        Raises:
            StepError: a row's logits are not finite.
        """
        if isinstance(self._model, NativeDecoder):
            return self.launch(batch).result()
        started = perf_counter()
        with torch.inference_mode():
            logits = _forward(self._model, self._pool, batch)
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)  # or the forward pass would be timed as sampling
            forward_done = perf_counter()
            token_ids = self._sample(logits, self._model.likeliest(logits), batch)
        return StepOutput(token_ids, forward_done - started, perf_counter() - forward_done)

    def check_device(self) -> None:
        """Compute something that cannot fail; raises when the device does not work any more."""
        ones = torch.ones(16, 16, device=self._model.device)
        if not bool((ones @ ones == 16).all()):
            raise StepError(f"device '{self._model.device}' multiplies ones to something else; replace this executor")

    def copy_blocks(self, sources: IntArray, destinations: IntArray) -> None:
        """Copy whole blocks, all layers of them: every source is read before any destination is written."""
        with torch.inference_mode():
            self._pool.copy_blocks(sources, destinations)

    def _sample(self, logits: torch.Tensor, likeliest: tuple[torch.Tensor, torch.Tensor], batch: StepBatch) -> IntArray:
        if not len(batch.sampling):
            return np.empty(0, dtype=np.int64)
        try:
            return sample(logits, likeliest, batch.sampling)
        except NonFiniteLogitsError as error:
            slots = batch.slots[batch.sampling.row_index[error.rows]].tolist()
            raise StepError(
                f"slots {slots} have NaN or infinite logits in {self.info.dtype}; try float32 if this repeats"
            ) from error


def thread_count(wanted: int, device: torch.device) -> int:
    """Threads for the model: what is wanted, or all cores, but one where a CPU runs the model.

    The core that is left serves the scheduler and clients: threads that wait for each other at every layer lose more
    by sharing it than they gain.
    """
    if wanted:
        return wanted
    cores = usable_core_count()
    return max(1, cores - 1) if device.type == "cpu" else cores


def _check_file(
    config: ExecutorConfig, device: torch.device, dtype: torch.dtype, threads: tuple[int, int]
) -> CheckFile:
    """Where the results of a start are kept, by whatever could change them."""
    is_cpu = device.type == "cpu"
    machine = processor() if is_cpu else str(torch.cuda.get_device_properties(device))
    folder = open_folder(config.model)
    stats = {name: (folder.path / name).stat() for name in _model_files(folder.path)}
    return CheckFile(
        {
            "model": folder.fingerprint,
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "dtype": str(dtype),
            "weights": config.weights,
            "device": device.type,
            "machine": hashlib.blake2b(machine.encode(), digest_size=10).hexdigest(),
            "native_library": library_key() if threads[1] else "",
            "threads": list(threads),
            "max_model_len": config.max_model_len,
            "block_size": config.block_size,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            **versions(),
        }
    )


def _model_files(path: Path) -> list[str]:
    """What a model is made of, as far as it is there."""
    return [name for name in ("config.json", *weight_names(path)) if (path / name).is_file()]


class _OnItsWay:
    """A step in C++: those that follow find its tokens there, unless some of them are drawn, which is done here."""

    def __init__(
        self,
        run: NativeRun,
        batch: StepBatch,
        sample_rows: Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor], StepBatch], IntArray],
    ) -> None:
        self.keeps_tokens = not (batch.sampling.temperature > 0).any()
        self._run = run
        self._batch = batch
        self._sample_rows = sample_rows

    def wait(self) -> None:
        self._run.wait()

    def result(self) -> StepOutput:
        run = self._run
        run.wait()
        began = perf_counter()
        with torch.inference_mode():
            likeliest = torch.from_numpy(run.highest), torch.from_numpy(run.likeliest)
            token_ids = self._sample_rows(run.logits, likeliest, self._batch)
        return StepOutput(token_ids, run.seconds, perf_counter() - began)


def _lengths_and_tables(batch: StepBatch) -> tuple[IntArray, IntArray, tuple[NDArray[np.int32], ...]]:
    return batch.query_lengths, batch.context_lengths, batch.block_tables


def _sampled_tokens(batch: StepBatch) -> IntArray:
    """Which of the step's tokens give logits."""
    last_token: IntArray = np.cumsum(batch.query_lengths) - 1
    return last_token[batch.sampling.row_index]


def _forward(model: StepModel, pool: PagedPool, batch: StepBatch) -> torch.Tensor:
    """Compute the step and return the logits of its sampling rows, `[S, vocabulary]`."""
    token_ids = torch.from_numpy(np.ascontiguousarray(batch.token_ids)).to(model.device)
    row_index = torch.from_numpy(_sampled_tokens(batch)).to(model.device)
    return model.step(*_lengths_and_tables(batch), token_ids, pool, row_index)


def _step_bytes(
    loaded: LoadedModel, config: ExecutorConfig, kept: Checks | None, check_file: CheckFile, progress: Progress
) -> int:
    """What the largest step takes: as an earlier start found it, or as it is found, and kept, now."""
    is_proven = kept is not None and kept.mode == loaded.mode
    if kept and is_proven:
        log.info("tested by an earlier start", made_at=kept.made_at, kept_in=str(check_file.path))
        if loaded.steps.device.type == "cpu":  # a GPU runs it again, which also loads what its libraries take
            return kept.largest_step_bytes
    progress("running the largest step", 0.7)
    step_bytes = _run_largest_step(loaded, config)
    if config.keep_checks and not is_proven and not loaded.failed_native:
        check_file.write(Checks(loaded.mode, step_bytes, datetime.now(UTC).isoformat(timespec="seconds")))
    return step_bytes


def _run_largest_step(loaded: LoadedModel, config: ExecutorConfig) -> int:
    """Run the step that takes most memory: a full token budget of prompt, then every slot decoding.

    Returns the bytes that it took at its peak. One block stands in for the whole cache: what it holds does not matter,
    only how much is read.
    """
    model = loaded.steps
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left there would hide what the step takes
        torch.cuda.reset_peak_memory_stats(model.device)
    before, peak_before = _memory(model.device)
    pool = PagedPool(model.traits.geometry(config.block_size), 1, model.traits.cache_dtype, model.device)
    prompt_lengths = _split(config.max_num_batched_tokens, loaded.context_length)
    slot_count = config.max_num_seqs
    decode_length = max(
        1, min(loaded.context_length, model.traits.decode_token_limit // slot_count, _TRIAL_DECODE_LENGTH)
    )
    for query_lengths, context_lengths in (
        (prompt_lengths, prompt_lengths),
        (np.ones(slot_count, dtype=np.int64), np.full(slot_count, decode_length)),
    ):
        with torch.inference_mode():
            tables = [
                np.zeros((len(query_lengths), -(-loaded.context_length // group.block_size)), dtype=np.int32)
                for group in pool.geometry.groups
            ]
            token_ids = torch.zeros(int(query_lengths.sum()), dtype=torch.int64, device=model.device)
            rows = torch.arange(min(slot_count, len(token_ids)), device=model.device)
            model.step(query_lengths, context_lengths, tables, token_ids, pool, rows).float().argmax(-1).cpu()
    after, peak = _memory(model.device)
    return max(0, (peak if peak > peak_before else after) - before)


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that the model takes on its device now, and the most that it took."""
    if device.type == "cpu":
        return resident_bytes()
    return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)


def _split(total: int, limit: int) -> IntArray:
    """`total` as a sum of lengths of at most `limit`."""
    whole, rest = divmod(total, limit)
    return np.array([limit] * whole + [rest] * (rest > 0), dtype=np.int64)


def _block_count(loaded: LoadedModel, geometry: PoolGeometry, config: ExecutorConfig, budget: int) -> int:
    """Blocks that fit into so many bytes, at most as many as all slots with full contexts could use."""
    block_bytes = geometry.block_elements * loaded.steps.traits.cache_dtype.itemsize
    usable = config.max_num_seqs * sum(
        _most_blocks(group, loaded.context_length, config.max_num_batched_tokens) for group in geometry.groups
    )
    count = min(budget // block_bytes - 1, usable)  # one more is the block of zeros
    group_count = len(geometry.groups)
    if count < group_count:
        sizes = " or ".join(str(size) for size in sorted({group.block_size for group in geometry.groups}))
        shares = f", each of the {group_count} layer groups needs one" if group_count > 1 else ""
        raise ModelError(
            f"the cache may use {budget} bytes but needs {(group_count + 1) * block_bytes}: a block of {sizes} tokens "
            f"takes {block_bytes} bytes{shares} and one block is kept for padding; "
            + (
                "raise cache_memory_bytes or lower block_size"
                if config.cache_memory_bytes
                else "free memory, lower max_num_batched_tokens or set cache_memory_bytes"
            )
        )
    return count


def _most_blocks(group: LayerGroup, context_length: int, step_token_count: int) -> int:
    """Blocks of a group that one request can use.

    Under a window that is what it sees and the tokens of two plans, for so many are on their way at once; one more
    because blocks begin anywhere, and one that is given back late.
    """
    limits = [limit for limit in (group.window, group.chunk) if limit]
    span = min(limits, default=context_length) + 2 * step_token_count
    return min(-(-context_length // group.block_size), -(-span // group.block_size) + 2)


def _measured_budget(device: torch.device, memory_utilization: float, available: int, step_bytes: int) -> int:
    """Bytes for the cache beside the weights, which are loaded, and a step of `step_bytes`.

    `available` is the host's memory before any step.
    """
    if device.type == "cpu":
        return min(_CPU_CACHE_LIMIT, max(0, available - step_bytes) // 4)
    free, total = torch.cuda.mem_get_info(device)
    used_by_others = total - free - torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    return max(0, int(memory_utilization * total) - torch.cuda.memory_reserved(device) - step_bytes - used_by_others)
