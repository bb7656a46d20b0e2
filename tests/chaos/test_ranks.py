"""A model that two ranks share, as real processes: they fail as one, and no user loses a token by it."""

import asyncio

import psutil
import pytest

from tests.chaos.test_real_model import SMALL
from tests.end_to_end.conftest import serving_folder, ties_stay_rare
from tests.executor_svc.test_parity import generate, prompts
from tests.parity import assert_same_tokens
from tests.tiny_models import build_model

__all__ = ["serving_folder", "ties_stay_rare"]

OUTPUT_COUNT = 200  # takes two ranks far longer than it takes to kill one


@pytest.mark.timeout(240)
async def test_a_rank_that_dies_takes_its_executor_along_and_nobody_loses_a_token(house, serving_folder, monkeypatch):
    """What the dead rank had of the cache nobody else has: its requests go on elsewhere, with the same text."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # ranks on the CPU, whatever this machine has
    model_folder = serving_folder("gemma3_text")
    await house.start(("e0",), model=model_folder, executor=(*SMALL, "--device", "cpu", "--tensor-parallel", "2"))
    (doomed,) = psutil.Process(house.processes["e0"].process_id).children()
    asked = prompts((3, 17, 60, 90))

    options = {"max_output_tokens": OUTPUT_COUNT, "ignore_eos": True, "stream": False}
    reading = asyncio.gather(*(house.client.generate(prompt, **options) for prompt in asked))
    await house.has_work("e0")
    doomed.kill()
    await house.start_executor("e1", *SMALL, model=model_folder)
    outputs = await reading

    assert await house.processes["e0"].exit_code() == 1
    assert "rank 1 ended with signal 9" in house.processes["e0"].printed
    assert sum(output.usage.recomputation_count for output in outputs) > 0
    model = build_model("gemma3_text")
    for prompt, output in zip(asked, outputs, strict=True):
        assert_same_tokens(model, prompt, generate(model, prompt, OUTPUT_COUNT), output.token_ids)
