"""Attention by our own kernels."""

from __future__ import annotations

import torch

from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import KeySource
from executor_svc.gpu.attention import attend, store
from executor_svc.gpu.inputs import StepInputs, StepRows

_INTERPRETED_CORES = 8  # as if a device had so many: enough that long rows are split


class TritonAttention:
    """`PagedAttention` on one device."""

    store = staticmethod(store)
    records_prompts = True

    def __init__(self, device: torch.device) -> None:
        """Look how many multiprocessors the device has: so many parts of a step should run at once."""
        is_gpu = device.type == "cuda"
        cores = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else _INTERPRETED_CORES
        self._core_count = cores

    def prepare(self, rows: StepRows) -> None:
        """There is nothing to plan: kernels see on the device how long rows are."""

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
        return attend(query, keys, values, inputs, source, rule, core_count=self._core_count)
