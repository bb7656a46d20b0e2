"""Packed steps give the tokens of transformers' own `generate()`: the definition of correct."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from executor_svc.batch import Runner
from tests.executor_svc.conftest import load_folder, needs_compiler
from tests.executor_svc.step_driver import Blocks, DrivenRequest, advance, drive
from tests.parity import assert_same_tokens
from tests.tiny_models import ARCHITECTURES, VOCABULARY_SIZE, WINDOW, build_model, save_serving_folder

PROMPT_LENGTHS = (1, 8, 23, 45)  # the last ones are longer than the models' windows
NATIVE = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"),
    *("olmo2", "olmo3", "qwen3_moe", "mixtral", "olmoe"),
)
AROUND_THE_WINDOW = (WINDOW - 10, WINDOW, WINDOW + 100, 3 * WINDOW)
OUTPUT_COUNT = 20


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(VOCABULARY_SIZE) for _ in range(length)] for length in lengths]


def generate(model: PreTrainedModel, prompt: list[int], count: int = OUTPUT_COUNT) -> list[int]:
    """The oracle: one request alone, greedy, without an end token."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


def assert_parity(model: PreTrainedModel, runner: Runner, requests: list[DrivenRequest], **driving: int) -> None:
    drive(runner, requests, **driving)

    assert_generated(model, requests)


def assert_generated(model: PreTrainedModel, requests: list[DrivenRequest]) -> None:
    """Every request has the tokens of `generate()`."""
    expected_ids = [generate(model, list(request.prompt_ids), request.output_count) for request in requests]
    assert len({token for ids in expected_ids for token in ids}) > 12, "the references repeat: they match by accident"
    for request, expected in zip(requests, expected_ids, strict=True):
        assert_same_tokens(model, request.prompt_ids, expected, request.output_ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_the_tokens_of_generate(load_runner, architecture):
    """Chunked prompts, decodes and late arrivals in the same steps over scattered blocks change no token."""
    runner = load_runner(architecture)
    requests = [DrivenRequest(p, OUTPUT_COUNT, first_step=2 * i) for i, p in enumerate(reversed(prompts()))]

    assert_parity(build_model(architecture), runner, requests)


@needs_compiler
@pytest.mark.parametrize("architecture", NATIVE)
def test_gives_the_same_tokens_in_torch_where_it_runs_in_cpp(load_runner, architecture):
    """Two ways to compute the same steps: a machine without a compiler serves the same text."""
    in_cpp, in_torch = load_runner(architecture), load_runner(architecture, native=False)
    requests = [DrivenRequest(p, OUTPUT_COUNT, first_step=2 * i) for i, p in enumerate(reversed(prompts()))]

    assert (in_cpp.info.mode, in_torch.info.mode) == ("native", "packed")
    assert_parity(build_model(architecture), in_torch, requests)


@needs_compiler
def test_gives_the_tokens_of_generate_where_positions_rotate_a_part_of_a_head(tmp_path):
    """As in Phi-4-mini, whose longrope has a factor for each number that is rotated."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 256,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [8.0, 9.0, 10.0, 11.0],
    }
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 256}
    runner = load_folder(save_serving_folder("phi3", tmp_path, **changes))
    requests = [DrivenRequest(p, OUTPUT_COUNT) for p in prompts()]

    assert runner.info.mode == "native"
    assert_parity(build_model("phi3", **changes), runner, requests, chunk=16)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("chunk", [1, 64])
def test_the_size_of_chunks_changes_no_token(load_runner, architecture, chunk):
    """The scheduler cuts prompts as its budget demands; users must not see where."""
    requests = [DrivenRequest(p, 8) for p in prompts()]

    assert_parity(build_model(architecture), load_runner(architecture), requests, chunk=chunk)


def test_a_prompt_may_be_computed_in_parts_of_few_queries(load_runner, monkeypatch):
    """Very long contexts are cut to bound memory; the cut is invisible."""
    monkeypatch.setattr("executor_svc.attention.layout.SCORE_LIMIT", 100)
    requests = [DrivenRequest(p, 4) for p in prompts()]

    assert_parity(build_model("gemma2"), load_runner("gemma2", native=False), requests, chunk=64)


def test_one_long_request_beside_short_ones_changes_no_token(load_runner, monkeypatch):
    """Decode rows are grouped by length, so one long request does not make the others read padding."""
    monkeypatch.setattr("executor_svc.attention.layout.WASTED_TOKEN_LIMIT", 30)
    requests = [DrivenRequest(p, 12) for p in prompts((200, 3, 70, 5, 6))]

    assert_parity(build_model("llama"), load_runner("llama", native=False), requests, chunk=50)


WINDOWED = (
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt_oss",
    "cohere2",
    "olmo3",
    "ministral",
    "mimo_v2_flash",
    "mistral",
    "phi3",
    "starcoder2",
    "qwen2_moe",
    "llama4_text",
)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_blocks_that_slid_out_of_a_window_are_not_missed(load_runner, architecture):
    """Before, across and long after the window, in any chunks, whatever stands in the tables where blocks were."""
    runner, model = load_runner(architecture), build_model(architecture)
    driven = {chunk: [DrivenRequest(p, 30) for p in prompts(AROUND_THE_WINDOW)] for chunk in (1, 7, 64)}
    for seed, (chunk, requests) in enumerate(driven.items()):
        drive(runner, requests, chunk=chunk, seed=seed)

    assert_generated(model, driven[7])
    for requests in driven.values():
        for request, other in zip(requests, driven[7], strict=True):
            assert_same_tokens(model, request.prompt_ids, other.output_ids, request.output_ids)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_a_request_holds_what_its_window_needs_and_no_more(load_runner, architecture):
    """What slides out is given back: that is what a window is for, and what admission counts on."""
    runner, chunk = load_runner(architecture), 7
    (request,) = requests = [DrivenRequest(p, 30) for p in prompts((WINDOW + 100,))]
    drive(runner, requests, chunk=chunk)

    groups = runner.info.layer_groups
    assert any(group.window or group.chunk for group in groups)
    for group, most_held in zip(groups, request.most_held, strict=True):
        limit = group.window or group.chunk or len(request.token_ids)
        assert most_held <= -(-(limit + chunk) // group.block_size) + 1


@pytest.mark.parametrize(
    ("architecture", "counts"),
    [("gemma3_text", (5, 2)), ("gemma3_text", (7, 1)), ("gemma3_text", (1, 3)), ("qwen2_moe", (4, 1))],
    ids=str,
)
def test_any_ratio_of_layers_shares_one_pool(architecture, counts, tmp_path):
    """Models rarely have as many layers of one kind as of the other, nor a multiple."""
    sliding, full = counts
    layer_types = ["sliding_attention"] * sliding + ["full_attention"] * full
    random.Random(1).shuffle(layer_types)
    changes = {"num_hidden_layers": sliding + full, "layer_types": layer_types}
    runner = load_folder(save_serving_folder(architecture, tmp_path, **changes))
    groups = {group.window: group for group in runner.info.layer_groups}

    assert (groups[WINDOW].layer_count, groups[0].layer_count) == counts
    requests = [DrivenRequest(p, OUTPUT_COUNT, first_step=3 * i) for i, p in enumerate(prompts(AROUND_THE_WINDOW))]
    assert_parity(build_model(architecture, **changes), runner, requests, seed=1)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3n_text", "mimo_v2_flash", "llama4_text", "mistral"])
def test_keys_gathered_from_windows_give_the_same_tokens(load_runner, architecture):
    """A model that reworks its keys is handed all that its rows see, from the first of them on; windows move that."""
    runner = load_runner(architecture, native=False)
    runner._model.traits = dataclasses.replace(runner._model.traits, gathered=True)
    requests = [DrivenRequest(p, OUTPUT_COUNT, first_step=i) for i, p in enumerate(prompts(AROUND_THE_WINDOW))]

    assert_parity(build_model(architecture), runner, requests)


@pytest.mark.parametrize("architecture", ["gemma3n_text", "gemma4_text"])
def test_layers_without_keys_read_those_of_another(load_runner, architecture):
    """They are no part of the cache, and what they see decides how long the other layer's keys are kept."""
    runner = load_runner(architecture)
    traits = runner._model.traits

    assert traits.sources == {0: 0, 1: 1, 2: 2, 3: 1, 4: 2}
    assert [(group.window, group.layer_count) for group in runner.info.layer_groups] == [(0, 1), (WINDOW, 2)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mimo_v2_flash"])
def test_a_request_goes_on_from_copied_blocks(load_runner, architecture):
    """A choice starts with a copy of the prompt's last block in every layer group, while its siblings write theirs."""
    runner = load_runner(architecture)
    parents = [DrivenRequest(p, 20) for p in prompts((WINDOW + 9, WINDOW - 3))]
    children = [DrivenRequest(p.prompt_ids, 20, computed_count=len(p.prompt_ids) - 1) for p in parents]
    blocks = Blocks(runner, seed=0)
    for parent, child in zip(parents, children, strict=True):
        advance(runner, blocks, [parent], len(parent.prompt_ids) - 1)
        sources, destinations = blocks.fork(parent, child)
        runner.copy_blocks(np.array(sources), np.array(destinations))
    while not children[0].is_done:
        advance(runner, blocks, [*parents, *children], 1)

    assert [child.output_ids for child in children] == [parent.output_ids for parent in parents]
    assert_generated(build_model(architecture), children)
