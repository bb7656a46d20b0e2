"""A transformers model whose steps run in C++; what it takes and gives is what `PackedModel` takes and gives."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from executor_svc.batch import IntArray
from executor_svc.kv_cache import PagedPool
from executor_svc.native.build import NativeUnavailableError
from executor_svc.native.library import PHASES, NativeLayer, NativeStep, library
from executor_svc.native.weights import BLOCK, PackedWeights, aligned, check_native
from executor_svc.packed_model import PackedTraits
from executor_svc.rotations import Rotations


class NativeDecoder:
    """Runs packed steps of one model, in the order in which they are launched. Launched by one thread at a time."""

    mode = "native"
    reads_inputs = False

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        traits: PackedTraits,
        context_length: int,
        thread_count: int,
        as_int8: bool = False,
    ) -> None:
        """Take `model`, whatever its own type, apart for steps in `dtype`; it must not be used any more.

        With `as_int8` its matrices are rounded as `round_to_int8` does.

        Positions beyond `context_length` are not asked of its rotation unless a step has them.
        Raises `NativeUnavailableError` before it is taken apart.
        """
        check_native(model, dtype)
        _check_traits(traits)
        self._library = library()
        self._team = self._library.paceline_team(thread_count)
        if not self._team:
            raise NativeUnavailableError(f"the system has no room for {thread_count} threads; set fewer threads")
        self.traits = traits
        self.device: torch.device = model.device
        with torch.inference_mode():
            self._rotations = Rotations(model, context_length)
            self._weights = PackedWeights(model, dtype, _only_width(self._rotations), as_int8)
        self._bound: tuple[PagedPool, ctypes.Array[NativeLayer]] | None = None
        self._scratch = self._logits = torch.empty(0)
        self._last: NativeRun | None = None  # launched

    def __del__(self) -> None:
        team, self._team = getattr(self, "_team", None), None
        if team:
            self._library.paceline_team_end(team)

    def step(
        self,
        query_lengths: IntArray,
        context_lengths: IntArray,
        block_tables: Sequence[NDArray[np.int32]],
        token_ids: torch.Tensor,
        pool: PagedPool,
        row_index: torch.Tensor,
    ) -> torch.Tensor:
        """Compute a step and return the logits of the tokens in `row_index`, `[rows, vocabulary]` in float32.

        The arguments are those of a `StepBatch`. What is returned is overwritten by the next step.
        """
        run = self.launch(query_lengths, context_lengths, block_tables, token_ids.numpy(), pool, row_index.numpy())
        run.wait()
        return run.logits

    def launch(
        self,
        query_lengths: IntArray,
        context_lengths: IntArray,
        block_tables: Sequence[NDArray[np.int32]],
        token_ids: IntArray,
        pool: PagedPool,
        row_index: IntArray,
    ) -> NativeRun:
        """Have a step run after those before it, which the tokens may come from, as in a `StepBatch`."""
        row_start = np.zeros(len(query_lengths) + 1, dtype=np.int64)
        np.cumsum(query_lengths, out=row_start[1:])
        contexts = np.ascontiguousarray(context_lengths, dtype=np.int64)
        tables = [np.ascontiguousarray(table, dtype=np.int32) for table in block_tables]
        table_starts = _pointers([table.ctypes.data for table in tables])
        widths = np.array([table.shape[1] for table in tables], dtype=np.int64)
        token_ids, sampled = np.ascontiguousarray(token_ids), np.ascontiguousarray(row_index)
        rotations = self._rotations.up_to(int(contexts.max()))
        cosines, sines = (_pointers([pair[part].data_ptr() for pair in rotations]) for part in (0, 1))
        # Not torch's: its allocator can take longer for a few bytes than all that is done here.
        highest, likeliest = np.empty(len(sampled), dtype=np.float32), np.empty(len(sampled), dtype=np.int64)
        scratch, logits = self._scratch_for(len(token_ids)), self._logits_of(len(sampled))
        previous = self._last.likeliest if self._last is not None else likeliest
        model = self._weights.model
        model.layers = ctypes.addressof(self._layers(pool))
        step = NativeStep(
            token_count=len(token_ids),
            row_count=len(contexts),
            sampled_count=len(sampled),
            row_start=row_start.ctypes.data,
            context=contexts.ctypes.data,
            tables=ctypes.addressof(table_starts),
            widths=widths.ctypes.data,
            cosine=ctypes.addressof(cosines),
            sine=ctypes.addressof(sines),
            tokens=token_ids.ctypes.data,
            previous=previous.ctypes.data,
            sampled=sampled.ctypes.data,
            logits=logits.data_ptr(),
            likeliest=likeliest.ctypes.data,
            highest=highest.ctypes.data,
            scratch=scratch.data_ptr(),
        )
        arrays = row_start, contexts, tables, table_starts, widths, token_ids, sampled, previous
        read = (*arrays, rotations, cosines, sines, scratch)
        self._last = NativeRun(self, step, logits[:, : model.vocabulary], highest, likeliest, read)
        return self._last

    def submit(self, step: NativeStep) -> int:
        """Put a step behind those before it; returns its number."""
        number: int = self._library.paceline_submit(self._team, ctypes.byref(self._weights.model), ctypes.byref(step))
        return number

    def wait(self, number: int) -> float:
        """Wait until the step of that number is over; returns the seconds that it took."""
        took_ns: int = self._library.paceline_wait(self._team, number) if self._team else 0  # else it has ended
        return took_ns / 1e9

    def likeliest(self, _logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The highest logit of each row of the last step, NaN where one of its logits is, and its token."""
        assert self._last is not None
        return torch.from_numpy(self._last.highest), torch.from_numpy(self._last.likeliest)

    def phases(self) -> dict[str, float]:
        """Seconds by phase of all steps since the last call: each phase of a layer summed over the layers."""
        spent = (ctypes.c_int64 * len(PHASES))()
        self._library.paceline_spent_ns(self._team, spent)
        return {name: nanoseconds / 1e9 for name, nanoseconds in zip(PHASES, spent, strict=True)}

    def _layers(self, pool: PagedPool) -> ctypes.Array[NativeLayer]:
        """The layers with their parts of the pool."""
        if self._bound is None or self._bound[0] is not pool:
            layers = self._weights.bind()
            for number, layer in enumerate(layers):
                place = pool.place(number)
                layer.keys, layer.values = pool.keys(number).data_ptr(), pool.values(number).data_ptr()
                layer.key_stride, layer.value_stride = place.keys.stride, place.values.stride
                layer.group, layer.block_size = place.group, pool.geometry.groups[place.group].block_size
                layer.window = self.traits.visibility[number].window
                layer.rotation = self._rotations.table_of(number)
                layer.score_cap = self.traits.score_caps[number]
            self._bound = pool, layers
        return self._bound[1]

    def _scratch_for(self, token_count: int) -> torch.Tensor:
        needed = self._library.paceline_scratch_bytes(ctypes.byref(self._weights.model), token_count)
        if self._scratch.numel() < needed:
            self._scratch = aligned(needed)
        return self._scratch

    def _logits_of(self, count: int) -> torch.Tensor:
        width = -(-self._weights.model.vocabulary // BLOCK) * BLOCK
        if self._logits.numel() < count * width:
            self._logits = aligned(4 * count * width).view(torch.float32)
        return self._logits[: count * width].view(count, width)


class NativeRun:
    """A step on its way, and all that it reads and writes."""

    def __init__(
        self,
        decoder: NativeDecoder,
        step: NativeStep,
        logits: torch.Tensor,
        highest: NDArray[np.float32],
        likeliest: IntArray,
        read: tuple[Any, ...],
    ) -> None:
        """Begin; `read` is what the pointers of `step` lead to."""
        self.logits = logits  # [rows, vocabulary], overwritten by the next step
        self.highest = highest  # [rows] NaN where one of the row's logits is
        self.likeliest = likeliest  # [rows]
        self.seconds = 0.0
        self._decoder: NativeDecoder | None = decoder  # it must not go before the step is over
        self._kept: tuple[Any, ...] = (step, *read)
        self._number = decoder.submit(step)

    def wait(self) -> None:
        """Wait until the step is over."""
        if self._decoder is not None:
            self.seconds = self._decoder.wait(self._number)
            self._decoder, self._kept = None, ()

    def __del__(self) -> None:
        self.wait()


def _pointers(addresses: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _only_width(rotations: Rotations) -> int:
    if len(rotations.widths) > 1:
        raise NativeUnavailableError(f"its layers rotate {sorted(rotations.widths)} numbers of a head, by their type")
    return next(iter(rotations.widths))


def _check_traits(traits: PackedTraits) -> None:
    layers = traits.shapes.keys()
    plain = not traits.gathered and all(traits.sources[layer] == layer for layer in layers)
    if not plain or any(visibility.chunk for visibility in traits.visibility.values()):
        raise NativeUnavailableError("its layers share keys, rework them, or see chunks of positions")
