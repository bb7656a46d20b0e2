"""Attention by the library FlashInfer, and by our own kernels where it has none.

This has not run on a GPU yet: it is written to the sources of its releases 0.6.4 to 0.7.2, and tested with a stand-in.

FlashInfer plans every step on the host, once for all layers that are alike: how long rows are split, and which part
computes what. So the rows of a step are told before it is queued or replayed. What layers a model has shows when they
attend for the first time; from then on they are planned ahead. Always its kernels `fa2` are taken, which run on every
GPU from compute capability 8.0 on, read blocks that are any distance apart, and may be recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import KeySource
from executor_svc.gpu.inputs import RecordedRows, StepInputs, StepRows
from executor_svc.gpu.queue import Moment, moment_on
from executor_svc.gpu.triton_attention import TritonAttention
from executor_svc.model import ModelError

log = structlog.get_logger()

_HEAD_DIMS = (64, 128, 256)
_TYPES = (torch.float16, torch.bfloat16)
_PROMPT_TILE = 128  # queries, times heads that share keys, that one program of a step with prompts takes at most
_DECODE_TILES = (16, 64, 128)  # of a step that only decodes: the first that holds the heads that share keys
_PROGRAMS_PER_CORE = 2  # up to which long rows are split
_LEAST_SCRATCH = 128 << 20  # bytes; what the library recommends
_PLAN_BYTES = 1 << 20  # of the plan of a recorded step: 13 for each part of a row, of which there are few
_PLAN_BYTES_PER_ROW = 64


@dataclass(frozen=True, slots=True)
class _LayerKind:
    """Layers for which this is equal share a plan."""

    group: int  # index of the layer group whose blocks hold the keys
    window: int  # 0: they see all
    query_heads: int
    key_heads: int
    dim: int
    dtype: torch.dtype
    rule: ScoreRule


@dataclass(frozen=True, slots=True)
class _StepKind:
    """Steps for which this is equal take turns with the same wrappers."""

    is_decode: bool
    recorded: RecordedRows | None


@dataclass(frozen=True, slots=True)
class _RowBlocks:
    """The blocks of one layer group that the rows of a step see, rows of padding included."""

    starts: torch.Tensor  # [R + 1] int32 on the host, where in `ids` those of each row begin
    ids: torch.Tensor  # int32 on the device, of all rows end to end
    last_counts: torch.Tensor  # [R] int32 on the host, tokens in each row's last block


class FlashInferAttention:
    """`PagedAttention` on one device."""

    records_prompts = False  # room for every way in which prompts could be split would take gigabytes

    def __init__(self, device: torch.device) -> None:
        """Load the library. Raises `ModelError` where it cannot be had."""
        self._library = _library()
        self._device = device
        self._triton = TritonAttention(device)
        self._rows: StepRows | None = None  # of the step that is queued next
        self._here: dict[_LayerKind, Any] = {}  # wrappers for steps of its kind
        self._blocks: dict[int, _RowBlocks] = {}  # by layer group, of that step
        self._query_starts: torch.Tensor | None = None
        self._wrappers: dict[_StepKind, dict[_LayerKind, Any]] = {}  # all that there are, for one set of layer groups
        self._scratch = torch.zeros(0, dtype=torch.uint8, device=device)  # steps use it one after the other
        self._id_buffers: dict[int, torch.Tensor] = {}  # by layer group, for recorded steps, one after the other
        self._copied: Moment | None = None  # when the device has what was planned last
        self._told: set[str] = set()

    def prepare(self, rows: StepRows) -> None:
        """Plan the step that is queued next, for all layers that have attended in a step of its kind.

        A plan is written to memory of the host that the device copies from when its step begins. It is overwritten
        here, so what was planned last must have been copied: that is when the step before has begun, and nobody queues
        more than one step behind the one that runs.
        """
        if self._copied is not None:
            self._copied.await_on_host()
        if self._rows is not None and rows.groups != self._rows.groups:  # the model got another pool
            self._wrappers.clear()
            self._id_buffers.clear()
        self._rows, self._blocks, self._query_starts = rows, {}, None
        self._here = self._wrappers.setdefault(_StepKind(rows.is_decode, rows.recorded), {})
        for layer, wrapper in self._here.items():
            self._plan(wrapper, layer, rows)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: StepInputs,
        source: KeySource,
    ) -> None:
        """Write the keys and values of the step's tokens to their slots; those of padding nowhere."""
        self._triton.store(key, value, keys, values, inputs, source)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: StepInputs,
        source: KeySource,
        rule: ScoreRule,
    ) -> torch.Tensor:
        """Attend from every token of the step; `[T, query heads, value dim]`, contiguous."""
        if reason := _reason_against(query, keys, values, source, rule):
            self._tell(reason)
            return self._triton.attend(query, keys, values, inputs, source, rule)
        query_heads, token_count, dim = query.shape
        layer = _LayerKind(source.group, source.visibility.window, query_heads, keys.shape[1], dim, query.dtype, rule)
        wrapper = self._wrapper(layer, inputs)
        cache = tuple(
            _in_blocks(tensor, stride, inputs.groups[source.group].block_size)
            for tensor, stride in ((keys, source.key_stride), (values, source.value_stride))
        )
        output = query.new_empty(token_count, query_heads, dim)
        wrapper.run(query.transpose(0, 1), cache, out=output)
        return output

    def _wrapper(self, layer: _LayerKind, inputs: StepInputs) -> Any:
        """What computes a layer in the step that was prepared; it is made where such a layer attends first."""
        rows = self._rows
        assert rows is not None, "attention was not told the rows of the step"
        assert inputs.row_count == rows.padded_count, "attention was told the rows of another step"
        wrapper = self._here.get(layer)
        if wrapper is None:
            try:
                wrapper = self._new_wrapper(layer, _StepKind(rows.is_decode, rows.recorded))
                self._plan(wrapper, layer, rows)  # compiles the kernels
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise ModelError(
                    f"FlashInfer {self._library.__version__} cannot compute heads of {layer.dim} numbers in "
                    f"{str(layer.dtype).removeprefix('torch.')} here: {type(error).__name__}: {_end_of(error)}; it "
                    "compiles its kernels, for which it needs ninja and nvcc of the CUDA release that torch was built "
                    "for: install them, or choose --attention triton"
                ) from error
            self._here[layer] = wrapper
        return wrapper

    def _new_wrapper(self, layer: _LayerKind, kind: _StepKind) -> Any:
        scratch = self._scratch_of(_scratch_bytes(layer, kind, _core_count(self._device)))
        if not kind.is_decode:
            return self._library.BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD", backend="fa2")
        decode = self._library.BatchDecodeWithPagedKVCacheWrapper
        if kind.recorded is None:
            return decode(scratch, "NHD", use_tensor_cores=True, backend="fa2")
        count = kind.recorded.row_count
        wrapper = decode(
            scratch,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self._words(count + 1),
            paged_kv_indices_buffer=self._id_buffer(layer.group, count * kind.recorded.block_limit),
            paged_kv_last_page_len_buffer=self._words(count),
            backend="fa2",
        )
        plan_bytes = max(_PLAN_BYTES, _PLAN_BYTES_PER_ROW * count)  # its own has 8 MiB, here and on the host
        wrapper.reset_workspace_buffer(scratch, torch.empty(plan_bytes, dtype=torch.uint8, device=self._device))
        return wrapper

    def _plan(self, wrapper: Any, layer: _LayerKind, rows: StepRows) -> None:
        """Plan a layer of the step; the device is given what it needs for it, in the order of steps."""
        blocks = self._blocks.get(layer.group)
        if blocks is None:
            blocks = self._blocks[layer.group] = self._row_blocks(rows, layer.group)
        options = {
            "window_left": layer.window - 1,  # those before its own; -1: all
            "logits_soft_cap": layer.rule.softcap,
            "sm_scale": layer.rule.scaling,
            "q_data_type": layer.dtype,
            "kv_data_type": layer.dtype,
        }
        heads = layer.query_heads, layer.key_heads, layer.dim, rows.groups[layer.group].block_size
        where = blocks.starts, blocks.ids, blocks.last_counts
        if rows.is_decode:
            wrapper.plan(*where, *heads, **options)
        else:
            if self._query_starts is None:
                self._query_starts = self._on_host(np.append(0, np.cumsum(rows.query_lengths)))
            wrapper.plan(self._query_starts, *where, *heads, causal=True, **options)
        self._copied = moment_on(self._device)

    def _row_blocks(self, rows: StepRows, group: int) -> _RowBlocks:
        """From the block with the first token that a row sees on: those before it may have been given back.

        That shifts a row's positions by whole blocks, its queries' and its keys' alike. Rows of padding have one token
        of a block that there always is.
        """
        layers, table, contexts = rows.groups[group], rows.block_tables[group], rows.context_lengths
        first = layers.first_seen(contexts - rows.query_lengths) // layers.block_size
        end = -(-contexts // layers.block_size)
        columns = np.arange(table.shape[1])
        ids = table[(columns >= first[:, None]) & (columns < end[:, None])]
        assert ids.min(initial=0) >= 0, "a position without a block is read"
        padding = np.ones(rows.padded_count - len(contexts), dtype=np.int64)
        counts = np.concatenate((end - first, padding))
        return _RowBlocks(
            starts=self._on_host(np.append(0, np.cumsum(counts))),
            ids=self._on_host(np.concatenate((ids, 0 * padding))).to(self._device, non_blocking=True),
            last_counts=self._on_host(np.concatenate((contexts - (end - 1) * layers.block_size, padding))),
        )

    def _on_host(self, array: NDArray[np.int64]) -> torch.Tensor:
        """The numbers as the library takes them. The device may copy them later on: torch keeps them until it has."""
        tensor = torch.from_numpy(array.astype(np.int32))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _words(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)

    def _id_buffer(self, group: int, count: int) -> torch.Tensor:
        """Where recorded steps find the blocks of a group; the largest are recorded first."""
        buffer = self._id_buffers.get(group)
        if buffer is None or len(buffer) < count:
            buffer = self._id_buffers[group] = self._words(count)
        return buffer

    def _scratch_of(self, byte_count: int) -> torch.Tensor:
        if len(self._scratch) < byte_count:
            self._scratch = torch.zeros(byte_count, dtype=torch.uint8, device=self._device)
        return self._scratch

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log.warning("FlashInfer does not compute some layers, our own kernels do", reason=reason)


def _library() -> Any:
    """The module. Raises `ModelError`."""
    try:
        import flashinfer
    except Exception as error:  # whatever it finds missing, or of releases that do not fit together
        raise ModelError(
            f"attention 'flashinfer' needs FlashInfer, which cannot be loaded: {type(error).__name__}: {error}; "
            "`pip install flashinfer-python`, with nvcc and ninja for it, or choose --attention triton"
        ) from error
    return flashinfer


def _reason_against(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, source: KeySource, rule: ScoreRule
) -> str:
    """Why a layer is left to our own kernels; empty: it is not."""
    dim = query.shape[-1]
    if query.dtype not in _TYPES or keys.dtype != query.dtype:
        return f"their type is {str(keys.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    if rule.sinks is not None:
        return "their scores have sinks"
    if source.visibility.chunk:
        return f"they see chunks of {source.visibility.chunk} positions"
    if keys.shape[1:] != values.shape[1:] or source.key_stride != source.value_stride:
        return "their values are laid out differently from their keys"
    if dim not in _HEAD_DIMS:
        return f"their heads have {dim} numbers, not {', '.join(map(str, _HEAD_DIMS))}"
    return ""


def _in_blocks(tokens: torch.Tensor, stride: int, block_size: int) -> torch.Tensor:
    """Keys or values `[slots, heads, dim]` as `[blocks, block_size, heads, dim]`; blocks are `stride` slots apart."""
    slot_count, heads, dim = tokens.shape
    width = heads * dim
    block_count = (slot_count - block_size) // stride + 1
    return tokens.as_strided((block_count, block_size, heads, dim), (stride * width, width, dim, 1))


def _scratch_bytes(layer: _LayerKind, kind: _StepKind, core_count: int) -> int:
    """What the parts of split rows leave, at most: a tile of float32 values and a sum for each query head and part."""
    group_size = layer.query_heads // layer.key_heads
    tile = next((tile for tile in _DECODE_TILES if tile >= group_size), _PROMPT_TILE)
    if not kind.is_decode:
        tile = _PROMPT_TILE
    parts = _PROGRAMS_PER_CORE * core_count // layer.key_heads
    if kind.recorded is not None:
        parts = max(parts, kind.recorded.row_count * (1 + math.ceil(group_size / tile)))
    return max(_LEAST_SCRATCH, 4 * layer.query_heads * tile * (layer.dim + 1) * parts + 1024)


def _core_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _end_of(error: Exception) -> str:
    """The last lines of a message: a compiler's begins with pages of commands."""
    return " ".join(str(error).strip().splitlines()[-5:])[-500:]
