"""FlashInfer as attention: what it is told of each step, and who computes what it cannot.

No GPU has run this yet. Here a stand-in checks what it is called with as the library does and computes from that
alone; the tests marked `gpu` run the library itself where it is installed.
"""

import itertools
import sys
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import structlog
import torch

from executor_svc.attention.backend import ScoreRule
from executor_svc.batch import LayerGroup
from executor_svc.gpu import flashinfer_attention
from executor_svc.gpu.flashinfer_attention import FlashInferAttention
from executor_svc.gpu.inputs import RecordedRows, StepRows
from executor_svc.gpu.queue import queue_for
from executor_svc.layer_groups import Visibility
from executor_svc.model import ModelError
from tests.executor_svc.conftest import load_folder
from tests.executor_svc.gpu import flashinfer_stand_in
from tests.executor_svc.gpu.test_attention import DECODES, Case, Pool
from tests.executor_svc.gpu.test_steps import requests
from tests.executor_svc.step_driver import DrivenRequest, drive
from tests.executor_svc.test_parity import assert_parity, prompts
from tests.tiny_models import build_model, save_serving_folder

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def no_stand_in_on_a_gpu(request):
    if DEVICE.type == "cuda" and "gpu" not in request.keywords:
        pytest.skip("a stand-in tells nothing where there is a GPU, and kernels are not interpreted there")


@pytest.fixture
def library(monkeypatch):
    """The stand-in, which also takes what the library has no kernels for: float32 and tiny heads, to be exact."""
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_stand_in)
    for module, dims, types in (
        (flashinfer_stand_in, "head_dims", "types"),
        (flashinfer_attention, "_HEAD_DIMS", "_TYPES"),
    ):
        monkeypatch.setattr(module, dims, (16, 64, 128, 256))
        monkeypatch.setattr(module, types, {torch.float16, torch.bfloat16, torch.float32})
    return flashinfer_stand_in


def kinds_of(runner) -> set[tuple[bool, bool]]:
    """Of the steps that were planned: whether they only decode, and whether they were recorded."""
    kinds = runner._model.attention._wrappers
    return {(kind.is_decode, kind.recorded is not None) for kind, layers in kinds.items() if layers}


def test_gives_the_tokens_of_generate(load_runner, library):
    """Prompts in pieces, decodes and replayed steps, with windows and soft caps, through all that runs on a GPU."""
    runner = load_runner("gemma2", attention="flashinfer", native=False)

    assert_parity(build_model("gemma2"), runner, requests()[:3], chunk=16)
    attention = runner._model.attention
    assert kinds_of(runner) == {(True, True), (True, False), (False, False)}
    assert {len(layers) for layers in attention._wrappers.values()} == {2}  # those with a window, and those without
    assert not attention._told


def test_fused_models_in_half_precision_are_left_to_no_other_kernels(tmp_path, monkeypatch):
    """With the heads and types that the library has; launched kernel by kernel, steps give the same tokens."""
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_stand_in)
    folder = save_serving_folder("llama", tmp_path, head_dim=64, num_hidden_layers=1)
    outputs = []
    for graphs in (True, False):
        runner = load_folder(folder, attention="flashinfer", dtype="float16", max_num_seqs=2, graphs=graphs)
        driven = [DrivenRequest(prompt, 3) for prompt in prompts((9, 4))]
        drive(runner, driven)
        outputs.append([request.output_ids for request in driven])

        assert runner.info.mode == "fused"
        assert ((True, True) in kinds_of(runner)) == graphs
        assert not runner._model.attention._told
    assert outputs[0] == outputs[1]


def rows_of(pool: Pool, recorded: RecordedRows | None = None) -> StepRows:
    """The rows of a case as a step has them: what nobody sees any more has no block."""
    case, inputs = pool.case, pool.inputs()
    is_gone = np.arange(pool.tables.shape[1]) < (pool.first_seen // case.block_size)[:, None]
    tables = [np.full_like(pool.tables, 10_000), np.where(is_gone, case.stale_entry, pool.tables)]
    return StepRows(np.array(case.query_lengths), pool.contexts, tables, inputs.groups, recorded)


def attend(attention: FlashInferAttention, pool: Pool, recorded: RecordedRows | None = None) -> torch.Tensor:
    attention.prepare(rows_of(pool, recorded))
    return attention.attend(pool.query, pool.keys, pool.values, pool.inputs(), pool.source, pool.rule)


WINDOW = Visibility(window=6)
CASES = {
    "prompts and decodes": Case(),
    "decodes": DECODES,
    "softcap": Case(softcap=0.7),
    "window": Case(visibility=WINDOW),
    "window of decodes": replace(DECODES, visibility=Visibility(window=20)),
    "window of one": Case(visibility=Visibility(window=1)),
    "one head per group": Case(group_size=1),
    "groups of twenty": replace(DECODES, key_heads=1, group_size=20),
    "blocks of 96": Case(block_size=96, key_stride=96, value_stride=96),
    "blocks with room for other layers": Case(key_stride=12, value_stride=12),
    "heads before tokens": Case(token_major=False),
}


def without_nan_in_windows(pool: Pool) -> Pool:
    """Kernels of the library multiply what a window hides with 0; a request has computed all of its blocks' tokens."""
    if pool.case.visibility.window:
        pool.keys, pool.values = (tensor.nan_to_num(nan=50.0) for tensor in (pool.keys, pool.values))
    return pool


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_computes_the_rule(case, library):
    """From what was planned, nothing else: every number in it matters."""
    pool = without_nan_in_windows(Pool(case))
    attended = attend(FlashInferAttention(CPU), pool)

    torch.testing.assert_close(attended.double(), pool.expected(), atol=3e-6, rtol=1e-5)


LEFT = {
    "scores have sinks": Case(has_sinks=True),
    "chunks of 8 positions": Case(visibility=Visibility(chunk=8)),
    "differently from their keys": Case(value_dim=8),
    "laid out differently": Case(key_stride=8, value_stride=12),
    "heads have 24 numbers, not 16, 64, 128, 256": Case(key_dim=24, value_dim=24),
}


@pytest.mark.parametrize(("reason", "case"), LEFT.items(), ids=LEFT.keys())
def test_what_the_library_cannot_compute_is_left_to_our_own_kernels(reason, case, library):
    """The model is served all the same, and an operator is told once why it may be slower."""
    attention, pool = FlashInferAttention(CPU), Pool(case)
    with structlog.testing.capture_logs() as logs:
        attended = [attend(attention, pool) for _ in range(2)][-1]

    torch.testing.assert_close(attended.double(), pool.expected(), atol=3e-6, rtol=1e-5)
    (told,) = (log["reason"] for log in logs)
    assert reason in told


def test_float32_is_left_to_our_own_kernels(monkeypatch):
    """The library has no kernels for it."""
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_stand_in)
    attention, pool = FlashInferAttention(CPU), Pool(DECODES)
    attended = attend(attention, pool)

    torch.testing.assert_close(attended.double(), pool.expected(), atol=3e-6, rtol=1e-5)
    assert attention._told == {"their type is float32, not float16 or bfloat16"}


def test_a_recorded_step_takes_other_rows_each_time(library):
    """A replay calls nothing of ours: all that changes must be where it was when the step was recorded."""
    attention, recorded = FlashInferAttention(CPU), RecordedRows(row_count=7, block_limit=20)
    first = Pool(replace(DECODES, query_lengths=(1,) * 7, context_lengths=(1, 2, 3, 4, 5, 6, 7)))
    attend(attention, first, recorded)
    ((layer, wrapper),) = attention._here.items()
    places = [tensor.data_ptr() for tensor in wrapper._fixed]

    for lengths in ((70, 1, 33, 16), (3, 80), (9,) * 7):
        padding = 7 - len(lengths)
        pool = Pool(Case((1,) * len(lengths), lengths, padding_rows=padding))
        attended = attend(attention, pool, recorded)[: len(lengths)]

        torch.testing.assert_close(attended.double(), pool.expected()[: len(lengths)], atol=3e-6, rtol=1e-5)
    assert attention._here == {layer: wrapper}
    assert wrapper.plan_count == 4
    assert [tensor.data_ptr() for tensor in wrapper._fixed] == places


def test_only_what_a_window_shows_is_planned(library):
    """Blocks behind it may belong to others by now."""
    attention = FlashInferAttention(CPU)
    attend(attention, without_nan_in_windows(Pool(Case((1,) * 4, (70, 1, 33, 16), visibility=WINDOW))))
    blocks = attention._blocks[1]

    assert blocks.starts.diff().tolist() == [2, 1, 3, 2]  # positions 64..69, 0, 27..32, 10..15 in blocks of 4
    assert blocks.last_counts.tolist() == [2, 1, 1, 4]


class CountingMoment:
    """A moment that tells when it is waited for."""

    events: ClassVar[list[str]] = []

    def __init__(self, *_):
        self.events.append("given")

    def await_on_host(self):
        self.events.append("taken")


def test_a_plan_is_not_overwritten_before_the_device_has_it(library, monkeypatch):
    """The library copies plans from memory of its own, which the next plan is written to."""
    events: list[str] = []
    monkeypatch.setattr(CountingMoment, "events", events)
    monkeypatch.setattr(flashinfer_attention, "moment_on", CountingMoment)
    attention, pool = FlashInferAttention(CPU), Pool(DECODES)
    plan = library.BatchDecodeWithPagedKVCacheWrapper.plan

    def planned(self, *arguments, **options):
        events.append("planned")
        plan(self, *arguments, **options)

    monkeypatch.setattr(library.BatchDecodeWithPagedKVCacheWrapper, "plan", planned)
    for _ in range(3):
        attend(attention, pool)

    assert events == ["planned", "given", "taken", "planned", "given", "taken", "planned", "given"]


def test_another_pool_begins_anew(library):
    """What tests at the start have planned for takes no memory afterwards."""
    attention, pool = FlashInferAttention(CPU), Pool(DECODES)
    attend(attention, pool)
    rows = rows_of(pool)
    attention.prepare(replace(rows, groups=(LayerGroup(8), LayerGroup(8))))

    assert sum(map(len, attention._wrappers.values())) == 0


def test_recorded_steps_have_room_for_every_plan():
    """The library ends a step whose plan does not fit."""
    heads = [(8, 8), (14, 2), (32, 8), (64, 8), (71, 1), (128, 8)]
    cores = 132
    for dim, (query_heads, key_heads), rows in itertools.product((64, 128, 256), heads, (1, 3, 64, 256, 1000)):
        group_size = query_heads // key_heads
        layer = flashinfer_attention._LayerKind(0, 0, query_heads, key_heads, dim, torch.bfloat16, ScoreRule(1.0))
        kind = flashinfer_attention._StepKind(is_decode=True, recorded=RecordedRows(rows, 1))
        tile = flashinfer_stand_in.tile_of(group_size, dim)
        parts = max(2 * cores // key_heads, -(-rows * group_size // tile) + rows - 1)
        needed = flashinfer_stand_in.scratch_bytes(query_heads, tile, parts, dim)

        assert flashinfer_attention._scratch_bytes(layer, kind, cores) >= needed, (dim, query_heads, key_heads, rows)


def test_a_missing_library_is_refused_at_the_start(load_runner, monkeypatch):
    """Whoever asks for it is told what to install."""
    monkeypatch.setitem(sys.modules, "flashinfer", None)

    with pytest.raises(ModelError, match=r"pip install flashinfer-python.*--attention triton"):
        load_runner("llama", attention="flashinfer")


def test_kernels_that_cannot_be_compiled_are_refused_at_the_start(load_runner, library, monkeypatch):
    """Not in the first request's first step, and not by serving the model in another way than was asked for."""

    def plan(self, *_, **__):
        raise RuntimeError("Ninja build failed. Ninja output:\n" + 90 * "nvcc -O3\n" + "nvcc fatal: no such file")

    monkeypatch.setattr(library.BatchPrefillWithPagedKVCacheWrapper, "plan", plan)
    with pytest.raises(
        ModelError, match=r"nvcc fatal: no such file; it compiles its kernels.*--attention triton"
    ) as info:
        load_runner("llama", attention="flashinfer")
    assert len(str(info.value)) < 1000


def has_flashinfer() -> bool:
    try:
        import flashinfer  # noqa: F401
    except Exception:  # noqa: BLE001  whatever it finds missing
        return False
    return torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif("not has_flashinfer()", reason="FlashInfer or a GPU is missing")
@pytest.mark.parametrize(
    ("dtype", "softcap", "window"),
    [(torch.bfloat16, 0.0, 0), (torch.float16, 5.0, 50)],  # each is compiled for a minute
    ids=["bfloat16", "float16 with a cap and a window"],
)
def test_the_library_itself_computes_the_rule(dtype, softcap, window):
    """Steps with prompts, then decoding steps that were recorded once, over blocks with room for other layers."""
    common = {
        "key_dim": 64,
        "value_dim": 64,
        "block_size": 16,
        "key_stride": 48,
        "value_stride": 48,
        "visibility": Visibility(window=window),
        "softcap": softcap,
        "dtype": dtype,
    }
    attention, tolerance = FlashInferAttention(DEVICE), 2**-6 if dtype == torch.bfloat16 else 2**-9
    queue = queue_for(DEVICE)
    with torch.inference_mode(), queue.steps():
        pool = without_nan_in_windows(Pool(Case((1, 40, 1, 100), (700, 150, 300, 100), **common)))
        attended = attend(attention, pool).double().cpu()
        torch.testing.assert_close(attended, pool.expected(), atol=tolerance, rtol=tolerance)

        recorded, pools = RecordedRows(6, 64), []
        for lengths in ((700, 1, 33, 160, 3, 90), (30, 801), (16,) * 5):
            pools.append(Pool(Case((1,) * len(lengths), lengths, padding_rows=6 - len(lengths), **common)))
        largest = max(pools, key=lambda pool: len(pool.keys))
        keys, values = largest.keys.clone().nan_to_num(), largest.values.clone().nan_to_num()
        query, inputs = pools[0].query.clone(), pools[0].inputs()
        arguments = query, keys, values, inputs, pools[0].source, pools[0].rule
        attention.prepare(rows_of(pools[0], recorded))
        attention.attend(*arguments)
        recording = queue.record(lambda: attention.attend(*arguments))
        for pool in map(without_nan_in_windows, pools):
            keys[: len(pool.keys)], values[: len(pool.values)] = pool.keys.nan_to_num(), pool.values.nan_to_num()
            query.copy_(pool.query)
            attention.prepare(rows_of(pool, recorded))
            recording.replay()
            count = len(pool.contexts)
            attended = recording.output[:count].double().cpu()
            torch.testing.assert_close(attended, pool.expected()[:count], atol=tolerance, rtol=tolerance)
