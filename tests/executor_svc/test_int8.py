"""Weights as int8: the model is another one, and its steps must be exactly that one's."""

import numpy as np
import pytest
import torch

from executor_svc import model as model_module
from executor_svc.attention.torch_backend import TorchAttention
from executor_svc.kv_cache import PagedPool
from executor_svc.model import ModelError, load_model
from executor_svc.native import library
from executor_svc.native.model import NativeDecoder
from executor_svc.native.weights import PackedWeights, round_to_int8
from tests.executor_svc.conftest import load_folder, needs_compiler
from tests.executor_svc.step_driver import DrivenRequest
from tests.executor_svc.test_native import distance
from tests.executor_svc.test_parity import NATIVE, OUTPUT_COUNT, assert_parity, prompts
from tests.tiny_models import build_model, save_serving_folder

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not compute in bfloat16"
)


def rounded_model(architecture, **changes):
    """What int8 weights make of a model, as transformers runs it."""
    model = build_model(architecture, **changes)
    round_to_int8(model, torch.float32)
    return model


@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "changes"), [*((name, {}) for name in NATIVE), ("llama", {"tie_word_embeddings": True})], ids=str
)
def test_gives_the_tokens_of_generate_with_rounded_weights(architecture, changes, tmp_path):
    """Rounding is all that a user agreed to; nothing else may change a token."""
    runner = load_folder(save_serving_folder(architecture, tmp_path, **changes), weights="int8")
    requests = [DrivenRequest(p, OUTPUT_COUNT, first_step=2 * i) for i, p in enumerate(reversed(prompts()))]

    assert runner.info.mode == "native"
    assert_parity(rounded_model(architecture, **changes), runner, requests)


def test_rounding_moves_a_weight_by_half_a_step_of_its_output_at_most():
    """One large weight costs the others of its output their exactness, and those of no other output."""
    model = build_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        linear.weight[3, 5] = 100.0
        linear.weight[4] = 0.0
    before = linear.weight.detach().clone()
    round_to_int8(model, torch.float32)

    steps = before.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((linear.weight - before).abs() <= steps * 0.501).all())
    assert linear.weight[3, 5] == 100.0
    assert not torch.equal(linear.weight, before)


def chunks_of(steps, token_ids, sizes):
    """The logits of a prompt that is computed in chunks of these sizes."""
    pool = PagedPool(steps.traits.geometry(4), len(token_ids), steps.traits.cache_dtype, CPU)
    table = [np.arange(-(-len(token_ids) // 4), dtype=np.int32)[None]]
    logits, end = [], 0
    for size in sizes:
        begin, end = end, end + size
        with torch.inference_mode():
            rows = torch.arange(size)
            computed = steps.step(np.array([size]), np.array([end]), table, token_ids[begin:end], pool, rows)
        logits.append(computed.clone())
    return torch.cat(logits)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=str)
def test_any_number_of_rows_gives_the_same_logits(tmp_path, dtype):
    """Few rows take weights as they come, many a copy that was turned into numbers once: the same products, in
    bfloat16 closer to float32 than those of transformers.
    """
    folder = str(save_serving_folder("llama", tmp_path, head_dim=32))
    steps = load_model(folder, CPU, dtype, TorchAttention(), native_threads=2, weights="int8").steps
    token_ids = torch.arange(150) * 7919 % 320
    model = rounded_model("llama", head_dim=32)
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0]
        far = distance(model.to(dtype)(token_ids[None]).logits[0].float(), expected) + 1e-5

    assert isinstance(steps, NativeDecoder)
    for sizes in ([1] * 150, [2, 3, 4, 5, 11, 12, 13, 25, 75], [30, 120]):
        assert distance(chunks_of(steps, token_ids, sizes), expected) < far


@needs_compiler
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_a_byte_each(tied, dtype):
    """Half of what bfloat16 takes, and half as much to read for every token; a tied embedding is in there."""
    model = build_model("llama", tie_word_embeddings=tied)
    count = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    with torch.inference_mode():
        weights = PackedWeights(model, dtype, rotated=16, as_int8=True)

    embedding_bytes = 0 if tied else model.get_input_embeddings().weight.numel() * dtype.itemsize
    assert sum(kept.nbytes for kept in weights._kept) - embedding_bytes < 1.2 * count


@needs_compiler
def test_weights_of_the_files_are_rounded_once(tmp_path):
    """Rounded to bfloat16 first, a quarter of the large ones would end a step away."""
    folder = str(save_serving_folder("llama", tmp_path, head_dim=32))
    model = rounded_model("llama", head_dim=32)
    files = model_module._ModelFiles(*_files_of(folder), torch.bfloat16, "int8")

    converted = files.converted().lm_head.weight
    assert converted.dtype == torch.bfloat16
    assert torch.equal(converted, model.lm_head.weight.to(torch.bfloat16))


def _files_of(folder):
    path = model_module.open_folder(folder).path
    return path, model_module.load_config(path), CPU


@needs_compiler
def test_the_type_says_that_weights_are_int8(load_runner):
    """Whoever compares speed or text with bfloat16 must see that it is something else."""
    assert load_runner("llama", weights="int8").info.dtype == "float32 with int8 weights"


@needs_compiler
def test_the_self_test_knows_the_rounded_weights(load_runner, monkeypatch):
    """Against the weights as they were it would find a difference, and could not tell it from a mistake."""
    monkeypatch.setattr(model_module, "round_to_int8", lambda *_: None)

    with pytest.raises(ModelError, match=r"int8 weights need steps in C.*failed the self-test.*leave --weights out"):
        load_runner("llama", weights="int8")


@needs_compiler
def test_steps_that_fail_the_self_test_are_refused(load_runner, monkeypatch):
    """There is no other way to run them, and to serve the model in its own type was not asked for."""
    right = library.NativeModel.__init__

    def wrong(self, **values):
        right(self, **(values | {"scaling": 3 * values["scaling"]}))

    monkeypatch.setattr(library.NativeModel, "__init__", wrong)

    with pytest.raises(ModelError, match="failed the self-test"):
        load_runner("llama", weights="int8")


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("gpt2", {}, "none known"),
        ("llama", {"native": False}, "not with --no-native"),
        ("llama", {"dtype": "float16"}, "its type is torch.float16"),
    ],
    ids=str,
)
@needs_compiler
def test_what_runs_in_torch_is_refused_with_a_remedy(load_runner, architecture, settings, reason):
    """Served silently in another type it would be slower, larger, and not what was asked for."""
    with pytest.raises(ModelError, match=f"int8 weights need steps in C.*{reason}.*leave --weights out"):
        load_runner(architecture, weights="int8", **settings)


def test_without_a_compiler_they_are_refused(load_runner, monkeypatch):
    """A small image has none; the message is the place to learn that."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    library.library.cache_clear()
    try:
        with pytest.raises(ModelError, match=r"there is no C.. compiler .*leave --weights out"):
            load_runner("llama", weights="int8")
    finally:
        library.library.cache_clear()
