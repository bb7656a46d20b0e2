"""The promise with a real model in float32: the text after a death is the text that would have been."""

import asyncio

import pytest

from tests.chaos.house import SCHEDULER
from tests.end_to_end.conftest import serving_folder, ties_stay_rare
from tests.executor_svc.test_parity import generate, prompts
from tests.parity import assert_same_tokens
from tests.tiny_models import build_model

__all__ = ["serving_folder", "ties_stay_rare"]

OUTPUT_COUNT = 300  # takes longer than the two deaths, also where steps take a millisecond
SMALL = ("--dtype", "float32", "--threads", "1", "--max-num-batched-tokens", "24", "--block-size", "4")
SMALL += ("--cache-memory", "8MiB", "--max-model-len", "512", "--max-num-seqs", "16")


async def read_all(client, asks):
    """The outputs of several requests that run together."""
    options = {"max_output_tokens": OUTPUT_COUNT, "ignore_eos": True, "stream": False}
    return await asyncio.gather(*(client.generate(prompt, **(options | ask)) for prompt, ask in asks))


@pytest.mark.timeout(240)
async def test_a_real_model_says_the_same_whatever_dies_meanwhile(house, serving_folder):
    """Windows, prompts in chunks, seeds, stop strings and choices: what is computed again is what was computed."""
    await house.start(model=serving_folder("gemma3_text"), executor=SMALL)
    sampling = {"temperature": 0.9, "top_p": 0.95}
    greedy = [(prompt, {}) for prompt in prompts((3, 17, 60, 90))]
    sampled = [(prompt, sampling | {"seed": n, "n": 1 + n % 3}) for n, prompt in enumerate(prompts((5, 40, 70)))]
    undisturbed = await read_all(house.client, greedy + sampled)
    stop = undisturbed[0].text[60:64]
    stopped = [(greedy[0][0], {"stop": stop})]

    reading = asyncio.create_task(read_all(house.client, greedy + sampled + stopped))
    await house.has_work("e0", "e1")
    await asyncio.sleep(house.dice.uniform(0.0, 0.05))
    house.kill("e0")
    await asyncio.sleep(house.dice.uniform(0.0, 0.1))
    house.kill(SCHEDULER)
    await house.restart(SCHEDULER)
    outputs = await reading

    model = build_model("gemma3_text")
    for (prompt, _), output in zip(greedy, outputs, strict=False):
        assert_same_tokens(model, prompt, generate(model, prompt, OUTPUT_COUNT), output.token_ids)
    for (prompt, _), before, after in zip(greedy + sampled, undisturbed, outputs, strict=False):
        for one, other in zip(before.choices, after.choices, strict=True):
            assert_same_tokens(model, prompt, one.token_ids, other.token_ids)
    whole, cut = undisturbed[0].text, outputs[-1].text
    assert cut == whole[: whole.index(stop)]
    assert sum(output.usage.recomputation_count for output in outputs) > 0
