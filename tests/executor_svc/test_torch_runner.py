"""Loading a model, its limits and its refusals; and runners that keep out of each other's way."""

import json
import threading

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from executor_svc import packed_model
from executor_svc.batch import NO_BLOCK, LayerGroup
from executor_svc.config import ExecutorConfig
from executor_svc.kv_cache import PagedPool
from executor_svc.model import ModelError, choose_device, choose_dtype, context_length_of
from executor_svc.native.model import NativeDecoder
from executor_svc.packed_model import PackedModel, UnpackableError
from executor_svc.torch_runner import StepError, TorchRunner
from tests import tiny_models
from tests.executor_svc.conftest import HAS_COMPILER, load_folder
from tests.executor_svc.step_driver import DrivenRequest, drive, step_batch
from tests.tiny_models import ARCHITECTURES, WINDOW


def requests(count: int = 4, **sampling) -> list[DrivenRequest]:
    return [DrivenRequest(range(3 + row, 9 + 6 * row), 10, seed=row, **sampling) for row in range(count)]


def load(folder, **settings) -> TorchRunner:
    config = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "cache_memory_bytes": 4 << 20,
        "keep_checks": False,
    } | settings
    return TorchRunner.load(ExecutorConfig(model=str(folder), **config), lambda phase, fraction: None)


def test_tells_what_the_scheduler_needs_to_know(load_runner, serving_folder):
    """The scheduler refuses and places requests by these numbers alone."""
    info = load_runner("llama").info

    assert (info.name, info.mode, info.dtype) == ("llama", "native" if HAS_COMPILER else "packed", "float32")
    assert info.fingerprint == json.loads((serving_folder("llama") / "paceline.json").read_text())["fingerprint"]
    assert (info.context_length, info.vocabulary_size) == (512, tiny_models.VOCABULARY_SIZE)
    assert info.end_token_ids == (tiny_models.END_TOKEN_ID,)
    # 3 layers * (keys + values) * 2 heads * 16 * 4 bytes = 768 bytes a token; all slots full: 8 * 512 / 4 blocks.
    assert info.layer_groups == (LayerGroup(block_size=4, layer_count=3),)
    assert info.block_count == 1024
    assert info.cache_bytes == (1024 + 1) * 4 * 768


def test_tells_how_the_layers_of_a_hybrid_model_share_blocks(load_runner):
    """With these the scheduler knows how many blocks a request needs, and when a block of a window is free again."""
    runner = load_runner("gemma3_text", max_num_batched_tokens=32)
    info = runner.info

    assert info.layer_groups == (
        LayerGroup(block_size=8, layer_count=1),
        LayerGroup(block_size=4, window=WINDOW, layer_count=2),
    )
    # A block is 8 tokens of one layer or 4 of two, 256 bytes a token. Of 8 slots each holds at most 512 / 8 blocks of
    # the full layer, and a window and two steps of the others, 16 + 2 * 32 tokens, and two more.
    assert info.block_count == 8 * (64 + 20 + 2)
    assert info.cache_bytes == (info.block_count + 1) * 8 * 256
    assert info.cache_bytes == sum(plane.nbytes for plane in runner._pool.planes)


@pytest.mark.parametrize("architecture", ["gemma2", "llama4_text"])
def test_a_window_beyond_the_context_limit_is_no_window(load_runner, architecture):
    """Then all layers see all there is, and share one table: fewer blocks for everybody, and plain prefix reuse."""
    assert len(load_runner(architecture).info.layer_groups) == 2
    assert load_runner(architecture, max_model_len=WINDOW).info.layer_groups == (LayerGroup(4, layer_count=3),)


def test_refuses_layers_that_keep_different_types(load_runner):
    """Blocks hold one type; the operator learns that it is the model, not a setting."""
    key, value = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.float16)

    with pytest.raises(UnpackableError, match="write float16 and float32 to the cache, and blocks hold one type"):
        packed_model._check_writes([(0, key, key), (1, key, value)])


def test_reports_progress_up_to_the_end(serving_folder):
    """A loading executor shows how far it is; standing still would look like a hang."""
    seen = []
    config = ExecutorConfig(
        model=str(serving_folder("llama")), dtype="float32", threads=1, cache_memory_bytes=1 << 20, keep_checks=False
    )
    TorchRunner.load(config, lambda phase, fraction: seen.append((phase, fraction)))

    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert seen[-1] == ("ready", 1.0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_row_has_the_same_logits_in_any_batch(load_runner, architecture, monkeypatch):
    """What a moved request computes elsewhere, beside other rows, must continue the same text."""
    runner = load_runner(architecture)
    alone, together = logits_of(runner, requests(1), monkeypatch), logits_of(runner, requests(6), monkeypatch)

    assert len(alone) == 10
    spread = float(torch.stack(alone).std())
    for one, many in zip(alone, together, strict=False):
        assert float((one - many).abs().max()) < 2e-6 * max(1.0, spread) * 10


def logits_of(runner: TorchRunner, driven: list[DrivenRequest], monkeypatch) -> list[torch.Tensor]:
    """Logits of the first request in each step that samples it."""
    seen = []
    original = TorchRunner._sample

    def spy(self, logits, *arguments):
        seen.append(logits[0].clone())
        return original(self, logits, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TorchRunner, "_sample", spy)
        drive(runner, driven, chunk=64)
    return seen[: driven[0].output_count]


def test_seeded_draws_do_not_depend_on_the_batch(load_runner):
    """The same seed gives the same text alone and in company, whatever the chunks and blocks."""
    alone, together = requests(temperature=0.8, top_p=0.9), requests(temperature=0.8, top_p=0.9)
    for request in alone:
        drive(load_runner("llama"), [request], chunk=3, seed=1)
    drive(load_runner("llama"), together, chunk=64, seed=2)

    assert [r.output_ids for r in alone] == [r.output_ids for r in together]


def test_running_a_step_again_changes_nothing(load_runner):
    """After an error the executor runs halves of the step again over the same blocks."""
    runner = load_runner("llama")
    (request,) = requests(1)
    request.block_tables = [[9, 2, 5]]
    batch = step_batch([request], [len(request.prompt_ids)], [True])
    first = runner.run(batch)
    again = runner.run(batch)

    assert first.token_ids.tolist() == again.token_ids.tolist()
    assert first.forward_s > 0
    assert first.sample_s > 0


def test_a_step_without_sampling_rows_returns_no_token(load_runner):
    """The middle chunks of a long prompt sample nothing."""
    runner = load_runner("llama")
    (request,) = requests(1)
    request.block_tables = [[9, 2, 5]]

    assert runner.run(step_batch([request], [4], [False])).token_ids.tolist() == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_models_that_rework_their_keys_pay_for_gathering(load_runner, architecture):
    """Others read the cache in place; only these expand what the cache keeps, or attend to parts of it."""
    assert load_runner(architecture)._model.traits.gathered == (architecture in ("deepseek_v3", "diffllama"))


def test_two_models_take_turns_in_one_thread(load_runner):
    """Models of one process share transformers' registry of attention functions, never each other's steps."""
    first, second = load_runner("llama"), load_runner("gemma2")
    expected = [drive_all(first), drive_all(second)]

    assert [drive_all(first), drive_all(second)] == expected
    assert drive_all(load_runner("llama")) == expected[0]


def test_two_models_run_in_two_threads_at_once(load_runner):
    """A supervisor or a test may keep several executors in one process."""
    runners = [load_runner("llama"), load_runner("gemma2")]
    expected = [drive_all(runner) for runner in runners]
    actual: dict[int, list[list[list[int]]]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(3):
            actual[index].append(drive_all(runners[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert actual == {0: [expected[0]] * 3, 1: [expected[1]] * 3}


def drive_all(runner: TorchRunner) -> list[list[int]]:
    driven = requests()
    drive(runner, driven)
    return [request.output_ids for request in driven]


def test_a_broken_request_is_named_and_harms_nobody(load_runner, monkeypatch):
    """NaN in one request's cache stays there: its neighbour reads other blocks, and padding reads none."""
    runner = load_runner("llama")
    good, bad = requests(2)
    good.block_tables, bad.block_tables = [[1, 2, 3]], [[0, 4, 5, 6]]  # padding of block tables points at block 0
    together = step_batch([good, bad], [6, 11], [True, True])
    expected = runner.run(together).token_ids[0]
    good.computed_count, bad.computed_count = 5, 10  # the last token once more, as a decode
    for layer in range(3):
        runner._pool.values(layer)[:4] = float("nan")
        runner._pool.keys(layer)[:4] = float("nan")
    decode = step_batch([good, bad], [1, 1], [True, True])

    with pytest.raises(StepError, match=r"slots \[1\] have NaN"):
        runner.run(decode)
    assert runner.run(step_batch([good], [1], [True])).token_ids.tolist() == [expected]


def test_checking_the_device_tells_a_broken_one(load_runner, monkeypatch):
    """A row that fails is reported; a device that fails must end the process, or every request would be blamed."""
    runner = load_runner("llama")
    runner.check_device()

    monkeypatch.setattr(torch, "ones", torch.zeros)
    with pytest.raises(StepError, match="device 'cpu'"):
        runner.check_device()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_and_runs_in_half_precision(load_runner, architecture, dtype):
    """GPUs run in these types; the self-test's tolerance must neither refuse a good model nor be met by chance."""
    runner = load_runner(architecture, dtype=dtype)
    driven = requests(2)
    drive(runner, driven)

    assert runner.info.dtype == dtype
    assert all(len(request.output_ids) == 10 for request in driven)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_refuses_a_model_whose_packed_logits_differ(load_runner, architecture, dtype, monkeypatch):
    """The self-test is what stands between a model we compute wrongly and its users."""
    original = PagedPool.keys
    monkeypatch.setattr(PagedPool, "keys", lambda pool, layer: original(pool, layer or 2))

    with pytest.raises(ModelError, match=r"ForCausalLM|LMHeadModel"):
        load_runner(architecture, dtype=dtype)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "mistral", "llama4_text"])
def test_the_self_test_gives_back_what_slides_out_of_a_short_window(architecture, tmp_path, monkeypatch):
    """A model that looks further back than it says is then refused, not served with other requests' keys."""
    seen = []
    for kind in (PackedModel, NativeDecoder):
        monkeypatch.setattr(kind, "step", spying(kind.step, seen))
    load_folder(tiny_models.save_serving_folder(architecture, tmp_path, sliding_window=4, attention_chunk_size=4))

    assert any((table == NO_BLOCK).any() for table in seen)


REFUSED = {
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, "attention interface"),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2, "seq_length": 64}, "attention interface"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}, "cannot be served"),
}


def spying(step, seen):
    """The same step; its block tables are noted."""

    def spy(self, query_lengths, context_lengths, block_tables, *rest):
        seen.extend(block_tables)
        return step(self, query_lengths, context_lengths, block_tables, *rest)

    return spy


@pytest.mark.parametrize(("architecture", "settings", "reason"), [(k, *v) for k, v in REFUSED.items()])
def test_refuses_models_that_packed_mode_cannot_run(architecture, settings, reason, tmp_path):
    """Better no answer than a wrong one; the message says which class and why."""
    config = AutoConfig.for_model(architecture, vocab_size=320, bos_token_id=0, eos_token_id=1, **settings)
    model = AutoModelForCausalLM.from_config(config)
    tiny_models.save_model(model, architecture, tmp_path)

    with pytest.raises(ModelError, match=reason) as caught:
        load(tmp_path)
    assert type(model).__name__ in str(caught.value)
    assert "packed mode is the only one" in str(caught.value)


@pytest.mark.parametrize("changes", [{"model_type": "no_such_model"}, {"model_type": "t5"}])
def test_refuses_what_is_no_known_decoder(changes, tmp_path):
    """A new architecture or an encoder-decoder is told apart from a broken folder."""
    folder = tiny_models.save_serving_folder("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))

    with pytest.raises(ModelError, match=changes["model_type"]):
        load(folder)


def test_refuses_a_folder_without_a_configuration(tmp_path):
    """The message names the missing file and how to make the folder."""
    folder = tiny_models.save_serving_folder("llama", tmp_path)
    (folder / "config.json").unlink()

    with pytest.raises(ModelError, match=r"no config\.json.*paceline prepare"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int3"}, "dtype must be .*'bfloat16'.*got 'int3'"),
        ({"device": "tpu"}, "device must be .* got 'tpu'"),
        ({"device": "cuda:99"}, "this process sees"),
        ({"max_model_len": 513}, "max_model_len is 513 but the model was made for 512"),
        ({"cache_memory_bytes": 3000}, "may use 3000 bytes but needs 6144: a block of 4 tokens takes 3072"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_settings_that_the_model_or_the_machine_cannot_have(load_runner, settings, message):
    """An operator learns at start what to change, not from failing requests."""
    with pytest.raises(ModelError, match=message):
        load_runner("llama", **settings)


def test_refuses_a_cache_without_a_block_for_each_layer_group(load_runner):
    """A request needs one in every group; with fewer the executor would join and compute nothing."""
    message = "a block of 4 or 8 tokens takes 2048 bytes, each of the 2 layer groups needs one"
    with pytest.raises(ModelError, match=message):
        load_runner("gemma3_text", cache_memory_bytes=3 * 2048 - 1)

    assert load_runner("gemma3_text", cache_memory_bytes=3 * 2048).info.block_count == 2


def test_max_model_len_shortens_the_context(load_runner):
    """A shorter limit lets more requests share the cache."""
    info = load_runner("llama", max_model_len=100).info

    assert info.context_length == 100
    assert info.block_count == 8 * 25


def test_the_cache_is_measured_when_no_size_is_given(load_runner):
    """On a CPU a part of what is free, but never more than all slots together can use."""
    assert load_runner("llama", cache_memory_bytes=0).info.block_count == 8 * 512 // 4


def test_longrope_is_served_up_to_its_original_length(tmp_path):
    """Beyond it one long request would turn the positions of the whole batch."""
    factors = [1.0] * 8
    folder = tiny_models.save_serving_folder(
        "phi3",
        tmp_path,
        original_max_position_embeddings=128,
        sliding_window=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": factors,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 128,
        },
    )

    assert load(folder).info.context_length == 128
    with pytest.raises(ModelError, match="longrope positions are served up to their original length of 128"):
        load(folder, max_model_len=200)


@pytest.mark.parametrize(("architecture", "expected"), [("gpt2", 512), ("opt", 512), ("gpt_neox", 512)])
def test_finds_the_context_length_under_any_name(load_runner, architecture, expected):
    """Families name it differently."""
    assert load_runner(architecture).info.context_length == expected


def test_a_model_without_a_context_length_needs_one():
    """Relative positions have no end; the operator must choose one."""
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2)

    with pytest.raises(ModelError, match="set max_model_len"):
        context_length_of(config)
    assert context_length_of(config, 256) == 256


def test_auto_takes_bfloat16_only_where_it_is_computed(monkeypatch):
    """Emulated bfloat16 is slower than float32."""
    cpu = torch.device("cpu")
    for native in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda native=native: native, raising=False)
        assert choose_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    assert choose_device("cpu") == cpu


def test_end_tokens_come_from_the_generation_settings(tmp_path):
    """Chat models end with several tokens, and only their generation settings name them all."""
    folder = tiny_models.save_serving_folder("llama", tmp_path)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [256, 7]}))
    assert load(folder).info.end_token_ids == (256, 7)

    file.write_text("{}")
    assert load(folder).info.end_token_ids == (256,)


def test_output_is_int64_on_the_host(load_runner):
    """The stream packs tokens from numpy; a device tensor would surprise it."""
    runner = load_runner("llama")
    (request,) = requests(1)
    request.block_tables = [[1, 2]]
    output = runner.run(step_batch([request], [6], [True]))

    assert isinstance(output.token_ids, np.ndarray)
    assert output.token_ids.dtype == np.int64
