"""The default model through the whole system: what `make run` serves says what transformers' `generate()` says."""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from executor_svc.config import ExecutorConfig
from executor_svc.prepare import prepare
from executor_svc.torch_runner import TorchRunner
from paceline import AsyncClient, FinishReason
from tests.parity import assert_same_tokens
from tests.system import started

pytestmark = pytest.mark.timeout(1800)  # the first time it is downloaded; later runs find it in the user's cache

QUESTION = "What is the capital of France?"
PROMPTS = (
    "The capital of France is",
    "1, 2, 3, 4,",
    "Q: Warum ist der Himmel blau?\nA: Weil — kurz gesagt — das Licht 🌤️ gestreut wird. Genauer:\n",
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. " * 5,
)
OUTPUT_COUNT = 24


@pytest.fixture(scope="module")
def folder():
    """The serving folder, made once and kept in the user's cache."""
    return prepare("smollm2").path


@pytest.fixture(scope="module")
def runner(folder):
    """The model in an executor whose steps are shorter than the long prompts."""
    config = ExecutorConfig(
        model=str(folder),
        device="cpu",
        dtype="float32",
        threads=1,
        cache_memory_bytes=128 << 20,
        max_num_seqs=8,
        max_num_batched_tokens=32,
    )
    return TorchRunner.load(config, lambda phase, share: None)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def generate(folder, tokenizer):
    """Transformers' own answer to token ids, greedy, up to the model's end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def generate(token_ids):
        ids = torch.tensor([token_ids])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_COUNT,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        return output[0, len(token_ids) :].tolist()

    generate.model = model
    return generate


async def test_gives_the_tokens_and_the_text_of_generate(folder, runner, tokenizer, generate):
    """Prompts of mixed length in one batch, in chunks, from text to text: every stage is the real one."""
    async with started(0, model=folder) as system:
        system.add_executor(runner=runner)
        await system.ready()
        async with AsyncClient(system.address) as client:
            calls = [client.generate(p, stream=False, max_output_tokens=OUTPUT_COUNT, temperature=0) for p in PROMPTS]
            outputs = await asyncio.gather(*calls)
        await system.idle()

    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert max(len(ids) for ids in prompt_ids) > 2 * 32, "no prompt takes several steps"
    for token_ids, output in zip(prompt_ids, outputs, strict=True):
        assert output.usage.prompt_token_count == len(token_ids)
        assert_same_tokens(generate.model, token_ids, generate(token_ids), output.token_ids)
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)


async def test_answers_a_question_in_its_chat_format(folder, runner, tokenizer, generate):
    """The chat template, the end token and the text around them are what makes the answer an answer."""
    async with started(0, model=folder) as system:
        system.add_executor(runner=runner)
        await system.ready()
        async with AsyncClient(system.address) as client:
            output = await client.chat(QUESTION, stream=False, max_output_tokens=OUTPUT_COUNT, temperature=0)

    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert output.usage.prompt_token_count == len(token_ids)
    assert_same_tokens(generate.model, token_ids, generate(token_ids), output.token_ids)
    assert "Paris" in output.text
    assert output.finish_reason is FinishReason.STOP
    assert "<|" not in output.text
