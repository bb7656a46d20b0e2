"""Steps in C++: what they need, what happens without it, and that nothing but their speed is new."""

import os
import stat
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from executor_svc.attention.torch_backend import TorchAttention
from executor_svc.kv_cache import PagedPool
from executor_svc.machine import usable_core_count
from executor_svc.model import ModelError, load_model
from executor_svc.native import build, library
from executor_svc.native.build import NativeUnavailableError, library_path
from executor_svc.native.model import NativeDecoder
from executor_svc.native.weights import PackedWeights, check_native
from tests.executor_svc.conftest import load_folder, needs_compiler
from tests.executor_svc.step_driver import DrivenRequest, drive
from tests.tiny_models import build_model, save_serving_folder


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As on a machine where nothing was built yet."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    library.library.cache_clear()
    yield tmp_path / "cache" / "native"
    library.library.cache_clear()


@needs_compiler
def test_it_is_built_once(fresh, monkeypatch):
    """The first start pays three seconds, and no other one."""
    path = library_path()
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("it was built again"))

    assert library_path() == path
    assert [entry.name for entry in fresh.iterdir()] == [path.name]


@needs_compiler
def test_another_processor_builds_its_own(fresh, monkeypatch):
    """A folder that several machines share must not hand one's instructions to the other."""
    path = library_path()
    monkeypatch.setattr(build, "processor", lambda: "model name: another")

    assert library_path() != path


def compiler(folder, script):
    """A program that stands in for the compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "there is no C.. compiler .*nowhere.*; install g"),
        ("echo 'step.cpp:1: error: unknown option' >&2; exit 1", "cannot build it: step.cpp:1: error: unknown option"),
        ('echo nonsense > "$(echo "$@" | sed \'s/.*-o \\([^ ]*\\).*/\\1/\')"', "cannot be loaded"),
    ],
    ids=["none", "fails", "lies"],
)
def test_without_a_compiler_the_model_runs_in_torch(fresh, monkeypatch, tmp_path, serving_folder, script, reason):
    """A small image has none; serving goes on, and whoever wonders about the speed finds the reason."""
    monkeypatch.setenv("CXX", compiler(tmp_path, script) if script else "/nowhere/c++")
    with pytest.raises(NativeUnavailableError, match=reason):
        library.library()

    assert load_folder(serving_folder("llama")).info.mode == "packed"


def test_a_cache_that_cannot_be_written_is_no_end(monkeypatch, tmp_path):
    """Containers often have a root that is only read."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 0"))
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "file"))

    with pytest.raises(NativeUnavailableError, match="cannot be kept"):
        library_path()


@needs_compiler
def test_too_many_threads_for_the_system_leave_the_model_whole(serving_folder, monkeypatch):
    """Containers limit them; a process that ends without a word would be the worse answer."""
    monkeypatch.setattr(library.library(), "paceline_team", lambda _count: None)

    assert load_folder(serving_folder("llama")).info.mode == "packed"


@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("starcoder2", {}, "Starcoder2DecoderLayer"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("gpt2", {}, "none known"),
        ("llama", {"mlp_bias": True}, "have a bias"),
        ("llama", {"hidden_act": "gelu"}, "another activation"),
        ("llama", {"head_dim": 8}, "not multiples of 16"),
        ("llama", {"hidden_size": 80, "head_dim": 16}, "hidden size not one of 32"),
        ("llama", {"head_dim": 512}, "512 numbers"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mixtures of experts beside plain ones"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "another activation than silu or gelu_pytorch_tanh"),
    ],
)
def test_models_that_it_is_not_made_for_run_in_torch(architecture, changes, reason):
    """Faster and wrong is no choice."""
    with pytest.raises(NativeUnavailableError, match=reason):
        check_native(build_model(architecture, **changes), torch.float32)


@needs_compiler
def test_quantised_weights_are_left_to_torch():
    """Their matrices look plain before they are loaded."""
    model = build_model("llama")
    model.config.quantization_config = {"quant_method": "fp8"}

    with pytest.raises(NativeUnavailableError, match="quantised"):
        check_native(model, torch.float32)


def test_a_build_that_failed_is_not_waited_for_again(fresh, monkeypatch, tmp_path):
    """It is begun beside the imports and asked for later; each try may take two minutes."""
    monkeypatch.setenv("CXX", compiler(tmp_path, f"echo once >> {tmp_path}/tries; exit 1"))
    for _ in range(2):
        with pytest.raises(NativeUnavailableError, match="cannot build it"):
            library_path()

    assert (tmp_path / "tries").read_text() == "once\n"


@needs_compiler
def test_a_step_in_cpp_that_computes_something_else_is_not_used(tmp_path, monkeypatch):
    """The self-test is the judge: what it refuses is loaded anew and runs in torch."""
    right = library.NativeModel.__init__

    def wrong(self, **values):
        right(self, **(values | {"scaling": 3 * values["scaling"]}))

    monkeypatch.setattr(library.NativeModel, "__init__", wrong)

    assert load_folder(save_serving_folder("llama", tmp_path)).info.mode == "packed"


@needs_compiler
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("threads", [1, 2, 3, 4 * usable_core_count()])
def test_any_number_of_threads_gives_the_same_tokens(load_runner, architecture, threads):
    """How work is shared out must not show in a sum, nor that a thread has no core for a while."""
    requests = [DrivenRequest(list(range(3, 3 + length)), 8) for length in (1, 9, 40)]
    runner = load_runner(architecture, threads=threads)
    assert runner.info.mode == "native"
    drive(runner, requests, chunk=16)
    alone = [DrivenRequest(request.prompt_ids, 8) for request in requests]
    drive(load_runner(architecture, threads=1), alone, chunk=16)

    assert [one.output_ids for one in requests] == [one.output_ids for one in alone]


@needs_compiler
def test_a_model_that_is_let_go_ends_its_threads(serving_folder):
    """Tests and replays load many models in one process."""
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        runner = load_folder(serving_folder("llama"), threads=3)
        assert runner.info.mode == "native"
        del runner

    assert len(os.listdir("/proc/self/task")) <= before + 2  # those of the last one, where something still holds it


@needs_compiler
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_in_memory_once(tied, dtype):
    """A machine is sized by the weights; plain copies beside the packed ones would double them."""
    model = build_model("llama", tie_word_embeddings=tied)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    plain = [weakref.ref(linear.weight) for linear in linears]
    embedding = model.get_input_embeddings().weight.detach().clone()
    with torch.inference_mode():
        weights = PackedWeights(model, dtype, rotated=16)

    assert len(plain) == len(weights.layers) * 7 + 1
    assert [weight() for weight in plain] == [None] * len(plain)
    assert model.get_input_embeddings().weight.numel() == (0 if tied else embedding.numel())


@needs_compiler
def test_experts_are_in_memory_once():
    """They are nearly all of a mixture's weights."""
    model = build_model("mixtral")
    with torch.inference_mode():
        PackedWeights(model, torch.float32, rotated=16)

    left = {name: parameter.numel() for name, parameter in model.named_parameters() if "experts" in name}
    assert len(left) == 2 * 3
    assert not any(left.values())


@needs_compiler
@pytest.mark.parametrize("sums_to_one", [False, True])
def test_a_token_gets_the_experts_that_its_router_chooses(tmp_path, sums_to_one):
    """Shares count differently from family to family: of all experts, or of the chosen ones; all may be chosen."""
    changes = {"num_experts": 5, "num_experts_per_tok": 5 if sums_to_one else 3, "norm_topk_prob": sums_to_one}
    loaded = load_folder(save_serving_folder("qwen3_moe", tmp_path, **changes))
    token_ids = torch.arange(100) * 7919 % 320
    with torch.inference_mode():
        expected = build_model("qwen3_moe", **changes)(token_ids[None]).logits[0]

    assert loaded.info.mode == "native"
    assert distance(logits_of(loaded._model, token_ids), expected) < 1e-5


@needs_compiler
def test_weights_of_several_types_keep_what_they_have(tmp_path):
    """Norms are often float32 beside matrices in half a type; rounded, they would be another model's."""
    folder = save_serving_folder("llama", tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    rounded = {name: weight.bfloat16() if weight.dim() > 1 else weight * 1.001 for name, weight in weights.items()}
    save_file(rounded, path, metadata={"format": "pt"})

    norms = load_folder(folder)._model._weights._kept
    expected = rounded["model.norm.weight"]

    assert any(kept.shape == expected.shape and torch.equal(kept, expected) for kept in norms)


def test_damaged_weights_are_refused_with_a_remedy(tmp_path):
    """A disk that was full while they were copied is no reason for a traceback."""
    folder = save_serving_folder("llama", tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x10\x00")

    with pytest.raises(ModelError, match=r"cannot be loaded.*paceline prepare"):
        load_folder(folder)


def logits_of(steps, token_ids):
    """Of all tokens of one prompt."""
    count = len(token_ids)
    geometry = steps.traits.geometry(4)
    tables = [np.arange(count, dtype=np.int32)[None] + count * group for group in range(len(geometry.groups))]
    pool = PagedPool(geometry, count * len(tables), steps.traits.cache_dtype, torch.device("cpu"))
    with torch.inference_mode():
        rows = torch.arange(count)
        return steps.step(np.array([count]), np.array([count]), tables, token_ids, pool, rows).float().clone()


def distance(actual, expected):
    """By which share of their spread logits are off, in the middle of all tokens."""
    spread = expected - expected.mean(-1, keepdim=True)
    return float(((actual - expected).norm(dim=-1) / spread.norm(dim=-1)).median())


@needs_compiler
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not compute in bfloat16")
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_in_bfloat16_it_is_closer_to_float32_than_the_model_itself(tmp_path, architecture, tied):
    """Weights are rounded, sums are not: nothing may get worse than it is in transformers."""
    changes = {"head_dim": 32, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    changes["tie_word_embeddings"] = tied
    folder = str(save_serving_folder(architecture, tmp_path, **changes))
    token_ids = torch.arange(40) * 7919 % 320
    model = build_model(architecture, **changes)
    with torch.inference_mode():
        exact = model(token_ids[None]).logits[0]
        rounded = model.to(torch.bfloat16)(token_ids[None]).logits[0].float()
    cpu = torch.device("cpu")
    loaded = load_model(folder, cpu, torch.bfloat16, TorchAttention(), native_threads=1)

    assert isinstance(loaded.steps, NativeDecoder)
    assert distance(logits_of(loaded.steps, token_ids), exact) < distance(rounded, exact)
