"""The runner that computes: a transformers model, its paged cache and the sampler."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from common.serving_folder import weight_names
from executor_svc.attention.torch_backend import TorchAttention
from executor_svc.batch import Ended, IntArray, Launched, RunnerInfo, StepBatch, StepError, StepOutput
from executor_svc.config import ExecutorConfig
from executor_svc.gpu.packed_step import PagedAttention
from executor_svc.kept_checks import CheckFile, Checks, versions
from executor_svc.kv_cache import PagedPool
from executor_svc.machine import available_memory_bytes, has_nvidia_gpu, usable_core_count
from executor_svc.memory import trim
from executor_svc.model import LoadedModel, ModelError, choose_device, choose_dtype, load_model, open_folder
from executor_svc.native.build import library_key, processor
from executor_svc.native.model import NativeDecoder, NativeRun
from executor_svc.pool_geometry import PoolGeometry
from executor_svc.ranks.group import RankGroup
from executor_svc.sampler import NonFiniteLogitsError, sample
from executor_svc.self_test import StepModel
from executor_svc.sizing import (
    block_count,
    bytes_kept_by,
    device_cache_budget,
    host_cache_budget,
    run_largest_step,
    taken_bytes,
)
from executor_svc.sole_start import sole_start
from executor_svc.start_times import Progress

if TYPE_CHECKING:  # kernels need Triton, which a CPU can do without
    from executor_svc.gpu.input_buffer import StepShape
    from executor_svc.gpu.steps import DeviceSteps

log = structlog.get_logger()

_LEAST_CAPABILITY = (8, 0)

__all__ = ["StepError", "TorchRunner", "thread_count"]


class TorchRunner:
    """Runs steps of one model over one paged cache; those in C++ or on a GPU by themselves, as an `AheadRunner`."""

    def __init__(
        self, loaded: LoadedModel, pool: PagedPool, config: ExecutorConfig, device_steps: DeviceSteps | None = None
    ) -> None:
        self._model = loaded.steps
        self._pool = pool
        self._device_steps = device_steps
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
        if device.type == "cpu" and config.device == "auto" and has_nvidia_gpu():
            way_out = "install a CUDA build of torch, or look whether CUDA_VISIBLE_DEVICES hides it"
            log.warning(
                "the CPU is used though there is a GPU: torch sees none", torch=torch.__version__, way_out=way_out
            )
        try:
            with sole_start(device, progress):
                return cls._load(config, device, progress, group)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"the device has no memory for a start: {(str(error).splitlines() or [''])[0]}; free some, lower "
                "max_num_batched_tokens, max_num_seqs or memory_utilization, or share the model between GPUs"
            ) from error

    @classmethod
    def _load(
        cls, config: ExecutorConfig, device: torch.device, progress: Progress, group: RankGroup | None
    ) -> TorchRunner:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # Triton launches kernels where this thread is, wherever their tensors are
        config = config.sized_for(device.type)
        dtype = choose_dtype(config.dtype, device)
        threads = thread_count(config.threads, device)
        torch.set_num_threads(threads)
        paged = paged_attention(config.attention, device)
        is_native = device.type == "cpu" and config.native and paged is None
        native_threads = (config.threads or usable_core_count()) if is_native else 0
        check_file = _check_file(config, device, dtype, (threads, native_threads))
        kept = check_file.read() if config.keep_checks else None
        taken_at_start = taken_bytes(device)
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
            paged,
            config.native,
            group.size if group else 1,
        )
        available = available_memory_bytes()  # as long as no step has run, whether the largest one does now or did then
        hides_launches: dict[StepShape, bool] = {}
        step_bytes = _step_bytes(loaded, config, kept, check_file, progress)
        step_bytes += _recorded_bytes(loaded, config, progress, hides_launches)
        progress("making the cache", 0.85)
        if device.type == "cpu":
            budget = host_cache_budget(available, step_bytes)
        else:
            budget = device_cache_budget(device, config.memory_utilization, taken_at_start, step_bytes)
        geometry = loaded.steps.traits.geometry(config.block_size)
        count = block_count(loaded, geometry, config, config.cache_memory_bytes or budget)
        if group:
            count = group.least(count)  # a block is in the caches of all ranks
        pool = _pool(loaded, geometry, count)
        told = _within(progress, 0.87, 1.0)
        reads_inputs = loaded.steps.reads_inputs
        device_steps = _device_steps(loaded, pool, config, told, hides_launches) if reads_inputs else None
        trim()
        progress("ready", 1.0)
        return cls(loaded, pool, config, device_steps)

    @property
    def recorded_count(self) -> int:
        """Shapes of steps that are recorded; 0 where there is no GPU, or where they could not be."""
        return self._device_steps.recorded_count if self._device_steps is not None else 0

    def launch(self, batch: StepBatch) -> Launched:
        """Begin the step where it runs by itself; else compute it now. Raises what `run` does."""
        if self._device_steps is not None:
            return self._device_steps.launch(batch)
        if isinstance(self._model, NativeDecoder):
            given = (*_lengths_and_tables(batch), batch.token_ids, self._pool, batch.sampled_tokens)
            with torch.inference_mode():
                run = self._model.launch(*given)
            return _OnItsWay(run, batch, self._sample)
        return Ended(self.run(batch))

    def run(self, batch: StepBatch) -> StepOutput:
        """Compute the step: write keys and values of every token, sample one token for each sampling row.

        Raises:
            StepError: a row's logits are not finite.
        """
        if self._device_steps is not None or isinstance(self._model, NativeDecoder):
            return self.launch(batch).result()
        started = perf_counter()
        with torch.inference_mode():
            logits = _forward(self._model, self._pool, batch)
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)  # or the forward pass would be timed as sampling
            forward_done = perf_counter()
            highest, likeliest = logits.max(dim=-1)  # NaN where one of a row is
            token_ids = self._sample(logits, (highest, likeliest), batch)
        return StepOutput(token_ids, forward_done - started, perf_counter() - forward_done)

    def check_device(self) -> None:
        """Compute something that cannot fail; raises when the device does not work any more."""
        ones = torch.ones(16, 16, device=self._model.device)
        if not bool((ones @ ones == 16).all()):
            raise StepError(f"device '{self._model.device}' multiplies ones to something else; replace this executor")

    def copy_blocks(self, sources: IntArray, destinations: IntArray) -> None:
        """Copy whole blocks, all layers of them: every source is read before any destination is written."""
        with torch.inference_mode(), self._device_steps.queue.steps() if self._device_steps else nullcontext():
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


def paged_attention(name: str, device: torch.device) -> PagedAttention | None:
    """The attention that reads block tables on the device; None: it is left to torch. Raises `ModelError`."""
    if name == "torch" or (name == "auto" and device.type == "cpu"):
        return None
    if device.type == "cuda":
        _check_capability(name, device)
    elif os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelError(
            f"attention '{name}' needs a GPU, and the device is a CPU; leave --attention out, or set "
            "TRITON_INTERPRET=1 to try kernels out very slowly"
        )
    try:
        from executor_svc.gpu.triton_attention import TritonAttention
    except ImportError as error:
        raise ModelError(
            f"attention '{name}' needs Triton, which is not installed: {error}; install the triton that belongs to "
            "this torch, or choose --attention torch"
        ) from error
    if name == "flashinfer":
        from executor_svc.gpu.flashinfer_attention import FlashInferAttention

        return FlashInferAttention(device)
    return TritonAttention(device)


def _check_capability(name: str, device: torch.device) -> None:
    if torch.version.hip:
        log.warning("kernels have never been run on a GPU of this kind; --attention torch does without them", rocm=True)
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise ModelError(
            f"attention '{name}' needs compute capability 8.0 (Ampere) or later and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; choose --attention torch"
        )


def _recorded_bytes(
    loaded: LoadedModel, config: ExecutorConfig, progress: Progress, hides_launches: dict[StepShape, bool]
) -> int:
    """What recorded steps take on a GPU beside the memory of those that are launched: found over a cache of one block.

    What kernels take once they are compiled and loaded, which the first start does here, stays taken and is not in it.
    """
    if not loaded.steps.reads_inputs:
        return 0
    told, trial = _within(progress, 0.72, 0.85), _pool(loaded, loaded.steps.traits.geometry(config.block_size), 1)
    return bytes_kept_by(loaded.steps.device, lambda: _device_steps(loaded, trial, config, told, hides_launches))


def _within(progress: Progress, start: float, end: float) -> Progress:
    """Tell `progress` of a part of the whole, from `start` to `end`."""
    return lambda phase, share: progress(phase, start + (end - start) * share)


def _pool(loaded: LoadedModel, geometry: PoolGeometry, count: int) -> PagedPool:
    return PagedPool(geometry, count, loaded.steps.traits.cache_dtype, loaded.steps.device)


def _device_steps(
    loaded: LoadedModel,
    pool: PagedPool,
    config: ExecutorConfig,
    progress: Progress,
    hides_launches: dict[StepShape, bool],
) -> DeviceSteps:
    """Steps over `pool`, recorded where that is wanted and can be done; see `DeviceSteps` for `hides_launches`."""
    from executor_svc.gpu.queue import queue_for
    from executor_svc.gpu.steps import DeviceSteps, InputsModel, StepLimits

    entries = sum(-(-loaded.context_length // group.block_size) for group in pool.geometry.groups)
    limits = StepLimits(config.max_num_seqs, config.max_num_batched_tokens, config.max_num_seqs * entries)
    model = cast(InputsModel, loaded.steps)  # it reads inputs: whoever calls this has asked
    steps = DeviceSteps(model, pool, limits, queue_for(loaded.steps.device), hides_launches)
    if loaded.steps.device.type == "cuda":
        torch.cuda.synchronize(loaded.steps.device)  # steps run on streams of their own, which wait for nothing of this
    steps.load_kernels()
    if config.graphs:
        try:
            steps.record(progress)
        except (ModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001  whatever a model's own code does that cannot be recorded
            log.warning("steps are launched kernel by kernel: they cannot be recorded", reason=str(error))
            steps.forget_recorded()
    return steps


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
            "attention": config.attention,
            "native": config.native,
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


def _forward(model: StepModel, pool: PagedPool, batch: StepBatch) -> torch.Tensor:
    """Compute the step and return the logits of its sampling rows, `[S, vocabulary]`."""
    token_ids = torch.from_numpy(np.ascontiguousarray(batch.token_ids)).to(model.device)
    row_index = torch.from_numpy(batch.sampled_tokens).to(model.device)
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
    step_bytes = run_largest_step(loaded, config)
    if config.keep_checks and not is_proven and not loaded.failed_native:
        check_file.write(Checks(loaded.mode, step_bytes, datetime.now(UTC).isoformat(timespec="seconds")))
    return step_bytes
