"""Packed steps give the tokens of transformers' own `generate()`: the definition of correct."""

import random

import pytest
import torch
from transformers import PreTrainedModel

from executor_svc.batch import Runner
from tests.executor_svc.step_driver import DrivenRequest, drive
from tests.parity import assert_same_tokens
from tests.tiny_models import ARCHITECTURES, VOCABULARY_SIZE, build_model

PROMPT_LENGTHS = (1, 8, 23, 45)  # the last ones are longer than the models' windows
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

    assert_parity(build_model("gemma2"), load_runner("gemma2"), requests, chunk=64)


def test_one_long_request_beside_short_ones_changes_no_token(load_runner, monkeypatch):
    """Decode rows are grouped by length, so one long request does not make the others read padding."""
    monkeypatch.setattr("executor_svc.attention.layout.WASTED_TOKEN_LIMIT", 30)
    requests = [DrivenRequest(p, 12) for p in prompts((200, 3, 70, 5, 6))]

    assert_parity(build_model("llama"), load_runner("llama"), requests, chunk=50)
