"""Attention's kernels alone: right against float64, and how near they come to what the device can read and multiply.

Both run on a CPU too, under Triton's interpreter and with tiny sizes, to rehearse.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import KeySource
from executor_svc.batch import LayerGroup
from executor_svc.gpu.attention import attend, store
from executor_svc.gpu.inputs import StepInputs, inputs_of
from executor_svc.layer_groups import FULL, Visibility

_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2**-6}  # of the worst head: weights and result have 8 bits in bfloat16
_COLD_BYTES = 512 << 20  # read in turn by a graph's launches, so that no cache holds what the next one reads
_LAUNCHES = (8, 64)  # of one graph
_TURNS = 10


@dataclass(frozen=True)
class _Layer:
    """Attention of one model's layers."""

    name: str
    query_heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    block_size: int = 16
    visibility: Visibility = FULL
    softcap: float = 0.0
    has_sinks: bool = False
    dtype: torch.dtype = torch.bfloat16


_LLAMA = _Layer("Llama 8B", 32, 8, 128, 128)
_LAYERS = [
    _LLAMA,
    replace(_LLAMA, name="Llama 8B, float32", dtype=torch.float32),
    replace(_LLAMA, name="Llama 8B, blocks of 96", block_size=96),
    _Layer("Qwen 2.5 0.5B", 14, 2, 64, 64),
    _Layer("Gemma 2", 8, 4, 256, 256, softcap=50.0),
    _Layer("Gemma 2, window", 8, 4, 256, 256, visibility=Visibility(window=1024), softcap=50.0),
    _Layer("GPT-OSS, window", 64, 8, 64, 64, visibility=Visibility(window=128), has_sinks=True),
    _Layer("Llama 4, chunks", 40, 8, 128, 128, visibility=Visibility(chunk=2048)),
    _Layer("Phi-2: heads of 80, no groups", 32, 32, 80, 80),
    _Layer("values narrower than keys", 16, 2, 192, 128),
    _Layer("heads of 512", 8, 2, 512, 512),
]
_REHEARSED = [
    replace(_LLAMA, query_heads=4, key_heads=2, key_dim=16, value_dim=16),
    _Layer("window, softcap, sinks", 3, 1, 24, 8, 3, Visibility(window=6), softcap=2.0, has_sinks=True),
    _Layer("float32", 3, 1, 16, 16, dtype=torch.float32, visibility=Visibility(chunk=8)),
]


def check(device: str, rehearse: bool) -> Iterator[dict[str, Any]]:
    """The worst relative error of any head of any token, for each kind of layer and of step, as they come."""
    steps = {
        "decodes": ([1, 1, 1, 1], [5, 33, 1, 20] if rehearse else [1, 3000, 33, 9001]),
        "prompts and decodes": ([1, 7, 9], [30, 7, 21]) if rehearse else ([1, 700, 300, 1], [4097, 700, 2500, 17]),
    }
    for layer in _REHEARSED if rehearse else _LAYERS:
        for step, lengths in steps.items():
            error = _Step(layer, *lengths, torch.device(device)).error()
            limit = _LIMITS[layer.dtype]
            name = f"attention, {layer.name}, {step}"
            yield {"name": name, "error": error, "limit": limit, "is_right": error <= limit}  # NaN is not


class _Step:
    """One step over a pool in which all is NaN but what its rows see."""

    def __init__(
        self, layer: _Layer, query_lengths: list[int], context_lengths: list[int], device: torch.device
    ) -> None:
        self.layer, self.device, self.query_lengths = layer, device, query_lengths
        lengths, contexts = np.array(query_lengths), np.array(context_lengths)
        counts = -(-contexts // layer.block_size)
        tables = np.zeros((len(contexts), counts.max()), dtype=np.int32)
        tables[np.arange(counts.max()) < counts[:, None]] = np.random.default_rng(3).permutation(counts.sum())
        group = LayerGroup(layer.block_size, layer.visibility.window, layer.visibility.chunk)
        tokens = torch.zeros(int(lengths.sum()))
        self.inputs = inputs_of(lengths, contexts, [tables], tokens, tokens[:0], (group,), device)
        self.source = KeySource(0, layer.visibility, layer.key_heads, layer.block_size, layer.block_size)
        self._draw = torch.Generator(device).manual_seed(5)
        self.query = self._random(len(tokens), layer.query_heads, layer.key_dim).transpose(0, 1)
        slot_count = int(counts.sum()) * layer.block_size
        self.keys = torch.full((slot_count, layer.key_heads, layer.key_dim), torch.nan, dtype=layer.dtype).to(device)
        self.values = self.keys.new_full((slot_count, layer.key_heads, layer.value_dim), torch.nan)
        sinks = self._random(layer.query_heads) if layer.has_sinks else None
        self.rule = ScoreRule(layer.key_dim**-0.5, layer.softcap, sinks)
        self.rows = [
            self._row(table[np.arange(context) // layer.block_size], length)
            for table, length, context in zip(tables, query_lengths, context_lengths, strict=True)
        ]

    def _random(self, *shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self._draw, device=self.device, dtype=torch.float32)
        return numbers.to(self.layer.dtype)

    def _row(self, blocks: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a row, `[context, heads, dim]`: those before the step are in the pool, where seen."""
        layer = self.layer
        positions = np.arange(len(blocks))
        first = int(layer.visibility.first_key(np.array([len(blocks) - length]))[0])
        slots = torch.from_numpy(blocks * np.int64(layer.block_size) + positions % layer.block_size).to(self.device)
        key, value = (self._random(len(blocks), layer.key_heads, dim) for dim in (layer.key_dim, layer.value_dim))
        before = slice(first, len(blocks) - length)
        self.keys[slots[before]], self.values[slots[before]] = key[before], value[before]
        return key, value

    def error(self) -> float:
        """Store what is new, attend, and compare."""
        new = [
            torch.cat([row[kind][-length:] for row, length in zip(self.rows, self.query_lengths, strict=True)])
            for kind in (0, 1)
        ]
        store(new[0].transpose(0, 1), new[1].transpose(0, 1), self.keys, self.values, self.inputs, self.source)
        cores = core_count(self.device)
        actual = attend(self.query, self.keys, self.values, self.inputs, self.source, self.rule, core_count=cores)
        expected = torch.cat(list(self._expected()))
        errors = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        return float(errors.max())

    def _expected(self) -> Iterator[torch.Tensor]:
        end = 0
        for (key, value), length in zip(self.rows, self.query_lengths, strict=True):
            end += length
            query = self.query[:, end - length : end].double() * self.rule.scaling
            group_size = len(query) // key.shape[1]
            k, v = (rows.double().transpose(0, 1).repeat_interleave(group_size, 0) for rows in (key, value))
            scores = query @ k.transpose(1, 2)
            if self.rule.softcap:
                scores = torch.tanh(scores / self.rule.softcap) * self.rule.softcap
            position = np.arange(len(key) - length, len(key))
            first = torch.from_numpy(self.layer.visibility.first_key(position)).to(self.device)[:, None]
            keys, last = torch.arange(len(key), device=self.device), torch.from_numpy(position).to(self.device)[:, None]
            scores = scores.masked_fill((keys > last) | (keys < first), -torch.inf)
            if self.rule.sinks is not None:
                sinks = self.rule.sinks.double()[:, None, None].expand(-1, length, 1)
                scores = torch.cat([scores, sinks], dim=-1)
            yield (scores.softmax(-1)[..., : len(key)] @ v).transpose(0, 1)


def speed(device: str, rehearse: bool) -> Iterator[dict[str, Any]]:
    """How long attention of one layer of Llama 8B takes."""
    layer = _REHEARSED[0] if rehearse else _LLAMA
    batches = (1, 3) if rehearse else (1, 16, 64, 256)
    contexts = (20, 50) if rehearse else (1024, 8192, 32768)
    prompts = ((9, 9), (9, 30)) if rehearse else ((2048, 2048), (8192, 8192), (2048, 32768))
    pool = _Pool(layer, batches[-1] * -(-contexts[-1] // layer.block_size), torch.device(device))
    for batch, context in itertools.product(batches, contexts):
        if pool.holds(batch, context):
            yield pool.decode(batch, context)
    for length, context in prompts:
        if pool.holds(1, context):
            yield pool.prompt(length, context)
    yield pool.store(prompts[-1][0])


class _Pool:
    """Keys and values of many tokens: so many blocks, or as many as fit."""

    def __init__(self, layer: _Layer, block_count: int, device: torch.device) -> None:
        self.layer, self.device = layer, device
        itemsize = layer.dtype.itemsize
        self.token_bytes = layer.key_heads * (layer.key_dim + layer.value_dim) * itemsize
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            block_count = min(block_count, int(0.6 * free) // (self.token_bytes * layer.block_size))
        self.block_count = block_count
        slot_count = self.block_count * layer.block_size
        self.keys = torch.empty(slot_count, layer.key_heads, layer.key_dim, dtype=layer.dtype, device=device).normal_()
        self.values = torch.empty(slot_count, layer.key_heads, layer.value_dim, dtype=layer.dtype, device=device)
        self.values.normal_()
        self.source = KeySource(0, FULL, layer.key_heads, layer.block_size, layer.block_size)
        self.rule = ScoreRule(layer.key_dim**-0.5)
        self._draw = np.random.default_rng(1)

    def holds(self, batch: int, context: int) -> bool:
        """Whether so many rows of so many tokens fit."""
        return batch * -(-context // self.layer.block_size) <= self.block_count

    def decode(self, batch: int, context: int) -> dict[str, Any]:
        """A decoding step, its launches over different blocks in turn."""
        read_bytes = batch * context * self.token_bytes
        launches = self._launches([1] * batch, [context] * batch, read_bytes)
        seconds = _seconds_each(launches, self.device)
        rate = read_bytes / seconds / 1e9
        return {
            "name": "decode attention",
            "batch": batch,
            "context": context,
            "µs": round(1e6 * seconds, 2),
            "GB/s": round(rate, 1),
        }

    def prompt(self, length: int, context: int) -> dict[str, Any]:
        """The last `length` tokens of a prompt."""
        launches = self._launches([length], [context], context * self.token_bytes)[: _LAUNCHES[0]]
        seconds = _seconds_each(launches, self.device)
        seen = length * context - length * (length - 1) // 2
        products = 2 * seen * self.layer.query_heads * (self.layer.key_dim + self.layer.value_dim)
        return {
            "name": f"prompt attention, last {length:,} tokens",
            "context": context,
            "µs": round(1e6 * seconds, 2),
            "TFLOP/s": round(products / seconds / 1e12, 2),
        }

    def store(self, length: int) -> dict[str, Any]:
        """Keys and values of one prompt."""
        inputs = self._inputs([length], [length])
        key, value = (rows[:length].clone().transpose(0, 1) for rows in (self.keys, self.values))

        def launch() -> None:
            store(key, value, self.keys, self.values, inputs, self.source)

        seconds = _seconds_each([launch] * _LAUNCHES[0], self.device)
        rate = 2 * length * self.token_bytes / seconds / 1e9
        return {"name": f"store {length:,} tokens", "µs": round(1e6 * seconds, 2), "GB/s": round(rate, 1)}

    def _launches(self, lengths: list[int], contexts: list[int], read_bytes: int) -> list[Callable[[], object]]:
        fewest, most = (1, 2) if self.device.type == "cpu" else _LAUNCHES
        count = min(max(_COLD_BYTES // read_bytes, fewest), most)
        heads, dim, cores = self.layer.query_heads, self.layer.key_dim, core_count(self.device)
        query = torch.empty(sum(lengths), heads, dim, dtype=self.layer.dtype, device=self.device).normal_()

        def launch_over(inputs: StepInputs) -> Callable[[], object]:
            def launch() -> object:
                return attend(
                    query.transpose(0, 1), self.keys, self.values, inputs, self.source, self.rule, core_count=cores
                )

            return launch

        return [launch_over(self._inputs(lengths, contexts)) for _ in range(count)]

    def _inputs(self, lengths: list[int], contexts: list[int]) -> StepInputs:
        width = -(-max(contexts) // self.layer.block_size)
        blocks = self._draw.choice(self.block_count, len(lengths) * width, replace=False).astype(np.int32)
        tokens = torch.zeros(sum(lengths))
        group = LayerGroup(self.layer.block_size)
        tables = [blocks.reshape(len(lengths), width)]
        return inputs_of(np.array(lengths), np.array(contexts), tables, tokens, tokens[:0], (group,), self.device)


def core_count(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _seconds_each(launches: list[Callable[[], object]], device: torch.device) -> float:
    """Seconds that one of these launches takes, the median of some turns of a graph that has all of them."""
    if device.type == "cpu":
        start = time.perf_counter()
        launches[0]()
        return time.perf_counter() - start
    launches[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    seconds = []
    for _ in range(_TURNS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        seconds.append(began.elapsed_time(ended) / 1000 / len(launches))
    return statistics.median(seconds)
