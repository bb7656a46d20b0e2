"""Kernels of layers and of sampling: right against float64 and against the sampler's rule, and how long they take."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.gpu.ceilings import median_s
from benchmarks.gpu.given import Given, Row, Tell
from executor_svc.attention.layout import KeySource
from executor_svc.batch import LayerGroup, SamplingBatch
from executor_svc.gpu.inputs import StepInputs, inputs_of
from executor_svc.layer_groups import Visibility
from executor_svc.sampler import row_keys, sample

# What several roundings of the type may add up to, as a share of the norm of the result.
_LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
_EPSILON = 1e-5
_REPEATS = 20  # launches in one graph, so that launching is not what is timed
_FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "all of them": {"temperature": 1.3, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
}
_Case = tuple[str, torch.Tensor, torch.Tensor]  # what it is, as the kernel computes it, in float64


def check(given: Given, tell: Tell) -> None:
    """Tell the worst error of each kernel, for each type and over steps of several sizes."""
    counts = (3, 9) if given.rehearse else (1, 64, 1000)
    for dtype, limit in _LIMITS.items():
        errors: dict[str, list[float]] = defaultdict(list)
        for token_count in counts:
            for name, actual, expected in _layer_cases(_Sizes(given, dtype, token_count)):
                errors[name].append(float((actual.double() - expected).norm() / expected.norm()))
        for name, found in errors.items():
            is_right = all(error <= limit for error in found)  # which NaN never is
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            tell({"name": what, "error": max(found, key=_badness), "limit": limit, "is_right": is_right})
    for name, settings in _FILTERS.items():
        tell(_sampling_row(given, name, settings))
    tell(_not_finite_row(given))


def speed(given: Given, tell: Tell) -> None:
    """Tell the microseconds of each kernel, at the sizes of decoding steps."""
    for count in given.batches[: 1 if given.rehearse else None]:
        row: Row = {"name": "layers and sampling", "batch": count}
        for name, launch in _launches(_Sizes(given, torch.bfloat16, count)).items():
            row[f"{name}, µs"] = round(1e6 * _launch_s(launch, given.device), 2)
        tell(row)


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error


class _Sizes:
    """A layer of the largest model, and its input."""

    def __init__(self, given: Given, dtype: torch.dtype, token_count: int) -> None:
        self.device, self.dtype, self.token_count = given.device, dtype, token_count
        self.hidden, self.inner = (96, 80) if given.rehearse else (4096, 14336)
        self.query_heads, self.key_heads, self.dim = (4, 2, 16) if given.rehearse else (32, 8, 128)
        self.vocabulary_size = 5000 if given.rehearse else 128256
        self._seed = 0

    def numbers(self, *shape: int, spread: float = 1.0, middle: float = 0.0) -> torch.Tensor:
        """Random numbers of the type, others each time."""
        self._seed += 1
        generator = torch.Generator().manual_seed(self._seed)
        return (torch.randn(shape, generator=generator) * spread + middle).to(self.device, self.dtype)


def _layer_cases(sizes: _Sizes) -> Iterator[_Case]:
    from executor_svc.gpu.layer_kernels import Norm, add_rms_norm, gated_product, rms_norm

    weight = sizes.numbers(sizes.hidden, spread=0.1, middle=1.0)
    x, residual = (sizes.numbers(sizes.token_count, sizes.hidden) for _ in range(2))
    yield "norm", rms_norm(x, Norm(weight, _EPSILON)), _norm(x, weight)
    total = x.double() + residual.double()
    normed = add_rms_norm(x, residual, Norm(weight, _EPSILON))
    yield "sum", residual, total
    yield "norm of sum", normed, _norm(residual, weight)  # as the model does: of the sum as it was rounded
    gate_up = sizes.numbers(sizes.token_count, 2 * sizes.inner, spread=3.0)
    gate, up = gate_up.double().chunk(2, dim=1)
    yield "gated product", gated_product(gate_up, "silu"), functional.silu(gate) * up
    yield from _rotation_cases(sizes)


def _rotation_cases(sizes: _Sizes) -> Iterator[_Case]:
    from executor_svc.gpu.layer_kernels import rotate_and_store

    qkv, rotation, (keys, values), inputs, source = _rotation_arguments(sizes)
    query = rotate_and_store(qkv, rotation, None, keys, values, inputs, source)
    heads = qkv.double().unflatten(1, (-1, sizes.dim)).split([sizes.query_heads, sizes.key_heads, sizes.key_heads], 1)
    cosine, sine = (table[inputs.positions].double()[:, None] for table in rotation)
    block_size = inputs.groups[0].block_size
    tables = inputs.tables[inputs.table_starts[0].long() + inputs.positions // block_size].long()
    slots = tables * source.key_stride + inputs.positions % block_size
    yield "rotated queries", query, heads[0] * cosine + _turned(heads[0]) * sine
    yield "stored keys", keys[slots], heads[1] * cosine + _turned(heads[1]) * sine
    yield "stored values", values[slots], heads[2]


def _rotation_arguments(
    sizes: _Sizes,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], list[torch.Tensor], StepInputs, KeySource]:
    """Rows that decode, each one at a place of its own."""
    count, block_size, width = sizes.token_count, 16, 4
    contexts = np.arange(count) % (width * block_size) + 1
    tables = np.random.default_rng(1).permutation(width * count).astype(np.int32).reshape(count, width)
    none = torch.zeros(0, dtype=torch.int64)
    groups = (LayerGroup(block_size),)
    zeros = torch.zeros(count, dtype=torch.int64)
    inputs = inputs_of(
        np.ones(count, dtype=np.int64), contexts, (tables,), zeros, none, groups, torch.device(sizes.device)
    )
    angles = torch.arange(width * block_size)[:, None] / 10000.0 ** (torch.arange(sizes.dim // 2) / (sizes.dim // 2))
    angles = torch.cat([angles, angles], dim=1)
    rotation = angles.cos().to(sizes.device, sizes.dtype), angles.sin().to(sizes.device, sizes.dtype)
    qkv = sizes.numbers(count, (sizes.query_heads + 2 * sizes.key_heads) * sizes.dim)
    shape = (width * count * block_size, sizes.key_heads, sizes.dim)
    pools = [torch.full(shape, torch.nan, dtype=sizes.dtype, device=sizes.device) for _ in range(2)]
    return qkv, rotation, pools, inputs, KeySource(0, Visibility(), sizes.key_heads, block_size, block_size)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    exact = x.double()
    return exact * (exact.square().mean(-1, keepdim=True) + _EPSILON).rsqrt() * weight.double()


def _turned(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _sampling_row(given: Given, name: str, settings: dict[str, float]) -> Row:
    """Whether each row gets the token that the sampler's rule gives it."""
    row_count = 2 if given.rehearse else 16
    sizes = _Sizes(given, torch.bfloat16, row_count)
    logits, batch = sizes.numbers(row_count, sizes.vocabulary_size, spread=4.0), _sampling_batch(row_count, settings)
    chosen, finite = _sampled(logits, batch)
    on_host = logits.cpu()
    best, tokens = on_host.max(dim=-1)
    expected = sample(on_host, (best, tokens), batch)
    same_count = int((chosen.cpu().numpy() == expected).sum())
    is_right = same_count == row_count and bool(finite.bool().all())
    return {"name": f"sampling, {name}", "same": f"{same_count} of {row_count} tokens", "is_right": is_right}


def _not_finite_row(given: Given) -> Row:
    """Whether rows with NaN or infinity as their highest are found, and no others."""
    sizes = _Sizes(given, torch.bfloat16, 4)
    logits = sizes.numbers(4, sizes.vocabulary_size)
    logits[1, sizes.vocabulary_size // 2] = torch.nan
    logits[2, sizes.vocabulary_size - 1] = torch.inf
    logits[3, 1:] = -torch.inf  # all but one token forbidden
    _, finite = _sampled(logits, _sampling_batch(4, {"temperature": 1.0}))
    found = finite.cpu().bool().tolist()
    return {"name": "logits that are not finite", "same": str(found), "is_right": found == [True, False, False, True]}


def _sampled(logits: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    from executor_svc.gpu.sampling import sample_rows

    chosen, finite = torch.full((2, len(logits)), -1, dtype=torch.int64, device=logits.device)
    sample_rows(logits, _sampling_parameters(batch, logits.device), chosen, finite)
    return chosen, finite


def _sampling_parameters(batch: SamplingBatch, device: torch.device) -> Any:
    from executor_svc.gpu.sampling import SamplingParameters

    key = row_keys(batch.seed, batch.choice, batch.output_index)
    numbers = (batch.temperature, batch.top_k.astype(np.int32), batch.top_p, batch.min_p, key)
    return SamplingParameters(*(torch.from_numpy(one).to(device) for one in numbers))


def _sampling_batch(count: int, settings: dict[str, float]) -> SamplingBatch:
    numbers = np.arange(count)
    return SamplingBatch(
        row_index=numbers,
        temperature=np.full(count, settings["temperature"], dtype=np.float32),
        top_k=np.full(count, settings.get("top_k", 0), dtype=np.int64),
        top_p=np.full(count, settings.get("top_p", 1.0), dtype=np.float32),
        min_p=np.full(count, settings.get("min_p", 0.0), dtype=np.float32),
        seed=numbers.astype(np.uint64) + np.uint64(1000),
        choice=numbers % 2,
        output_index=numbers,
    )


def _launches(sizes: _Sizes) -> dict[str, Callable[[], object]]:
    """What a decoding step calls, ready to be called again and again."""
    from executor_svc.gpu.layer_kernels import Norm, add_rms_norm, gated_product, rotate_and_store
    from executor_svc.gpu.sampling import sample_rows

    norm = Norm(sizes.numbers(sizes.hidden, spread=0.1, middle=1.0), _EPSILON)
    x, residual = (sizes.numbers(sizes.token_count, sizes.hidden) for _ in range(2))
    gate_up = sizes.numbers(sizes.token_count, 2 * sizes.inner)
    qkv, rotation, (keys, values), inputs, source = _rotation_arguments(sizes)
    logits = sizes.numbers(sizes.token_count, sizes.vocabulary_size, spread=4.0)
    chosen, finite = torch.zeros(2, sizes.token_count, dtype=torch.int64, device=sizes.device)
    launches: dict[str, Callable[[], object]] = {
        "sum and norm": lambda: add_rms_norm(x, residual, norm),
        "rotate and store": lambda: rotate_and_store(qkv, rotation, None, keys, values, inputs, source),
        "gated product": lambda: gated_product(gate_up, "silu"),
    }
    for name, settings in _FILTERS.items():
        parameters = _sampling_parameters(_sampling_batch(sizes.token_count, settings), logits.device)
        draws = settings["temperature"] > 0  # as a runner knows, too
        launches[name] = partial(sample_rows, logits, parameters, chosen, finite, draws=draws)
    return launches


def _launch_s(launch: Callable[[], object], device: str) -> float:
    """Seconds of one launch on the device, by graphs of many."""
    if device == "cpu":
        began = time.perf_counter()
        launch()
        return time.perf_counter() - began
    launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            launch()
    return median_s(graph.replay, device) / _REPEATS
