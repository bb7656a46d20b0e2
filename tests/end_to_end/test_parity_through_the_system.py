"""Scheduler, streams and executors with real models together give the tokens of transformers' own `generate()`."""

import asyncio
import threading

import pytest

from paceline import AsyncClient
from paceline.v1 import fleet_pb2
from tests.executor_svc.test_parity import generate, prompts
from tests.parity import assert_same_tokens
from tests.system import started, until
from tests.tiny_models import WINDOW, build_model

# One or more of each kind; the executor's own tests hold every architecture there is.
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "mixtral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "phi3",
    "gpt2",
    "opt",
    "llama4_text",
    "deepseek_v3",
)
PROMPT_LENGTHS = (5, 1, 45, 3, 8, 2, 50, 12, 23)  # the longest take several steps of 16 tokens
OUTPUT_COUNT = 20
BLOCK_COUNT = 24  # 96 tokens: many short requests can start, and cannot all grow


class Gated:
    """A runner that runs nothing before its gate is open, so that requests are there together."""

    def __init__(self, runner, gate):
        self.info = runner.info
        self.check_device = runner.check_device
        self.copy_blocks = runner.copy_blocks
        self._runner = runner
        self._gate = gate

    def run(self, batch):
        assert self._gate.wait(30), "the gate stayed shut"
        return self._runner.run(batch)


async def outputs_of(system, prompt_list, **options):
    """Send all prompts, in this order, before anything runs; their outputs in the same order."""
    options = {"max_output_tokens": OUTPUT_COUNT, "ignore_eos": True} | options
    calls = []
    await system.idle()
    system.gate.clear()
    async with AsyncClient(system.address) as client:
        for prompt in prompt_list:
            calls.append(asyncio.create_task(client.generate(prompt, stream=False, **options)))
            await until(lambda: system.scheduler.request_count >= len(calls))
        system.gate.set()
        return await asyncio.gather(*calls)


async def step_counts(system):
    """Steps that each executor has answered."""
    listed = await system.fleet.ListExecutors(fleet_pb2.ListExecutorsRequest())
    return [executor.step for executor in listed.executors]


async def add_all(system, runners):
    """Start an executor for each runner, behind one gate that the first requests open."""
    system.gate = threading.Event()
    for number, runner in enumerate(runners):
        system.add_executor(runner=Gated(runner, system.gate), name=f"e{number}")
    await system.ready(len(runners))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_gives_the_tokens_of_generate(serving_folder, tight_runners, architecture):
    """Two executors, prompts in chunks, caches so small that requests are preempted: nobody can tell."""
    prompt_list = prompts(PROMPT_LENGTHS)
    async with started(0, model=serving_folder(architecture)) as system:
        await add_all(system, tight_runners(architecture, 2, BLOCK_COUNT))
        outputs = await outputs_of(system, prompt_list)
        steps = await step_counts(system)
        await system.idle()

    model = build_model(architecture)
    expected_ids = [generate(model, prompt, OUTPUT_COUNT) for prompt in prompt_list]
    assert len({token for ids in expected_ids for token in ids}) > 12, "the references repeat: they match by accident"
    for prompt, expected, output in zip(prompt_list, expected_ids, outputs, strict=True):
        assert_same_tokens(model, prompt, expected, output.token_ids)
    assert min(steps) > OUTPUT_COUNT, "an executor had nothing to do"
    assert sum(output.usage.recomputation_count for output in outputs) > 0, "nobody was preempted"


async def test_one_executor_alone_gives_the_same_tokens_under_more_pressure(serving_folder, tight_runners):
    """All requests over one small cache: some are preempted again and again, and still lose nothing."""
    prompt_list = prompts(PROMPT_LENGTHS * 2)
    async with started(0, model=serving_folder("llama")) as system:
        await add_all(system, tight_runners("llama", 1, BLOCK_COUNT))
        outputs = await outputs_of(system, prompt_list)
        await system.idle()

    model = build_model("llama")
    for prompt, output in zip(prompt_list, outputs, strict=True):
        assert_same_tokens(model, prompt, generate(model, prompt, OUTPUT_COUNT), output.token_ids)
    assert sum(output.usage.recomputation_count for output in outputs) > 1, "nobody was preempted"


async def test_a_seed_gives_the_same_tokens_alone_in_a_batch_elsewhere_and_after_preemption(
    serving_folder, load_runner, tight_runners
):
    """A seed is a promise: users compare runs by it, whatever else the fleet did meanwhile."""
    prompt_list = prompts(PROMPT_LENGTHS)
    sampling = {"temperature": 0.9, "top_p": 0.95, "seed": 2**63 + 11}
    async with started(0, model=serving_folder("llama")) as system:
        await add_all(system, [load_runner("llama")])
        alone = [output for prompt in prompt_list for output in await outputs_of(system, [prompt], **sampling)]
        together = await outputs_of(system, prompt_list, **sampling)
        greedy = await outputs_of(system, prompt_list)
        other_seed = await outputs_of(system, prompt_list, **(sampling | {"seed": 5}))
    async with started(0, model=serving_folder("llama")) as system:
        await add_all(system, tight_runners("llama", 2, BLOCK_COUNT))
        elsewhere = await outputs_of(system, prompt_list, **sampling)
        steps = await step_counts(system)

    expected = [output.token_ids for output in alone]
    assert [output.token_ids for output in together] == expected
    assert [output.token_ids for output in elsewhere] == expected
    assert min(steps) > OUTPUT_COUNT, "an executor had nothing to do"
    assert sum(output.usage.recomputation_count for output in elsewhere) > 0, "nobody was preempted"
    for others in (greedy, other_seed):
        assert not {output.token_ids for output in others} & set(expected), "the seed makes no difference"


HYBRIDS = ("gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3", "ministral", "llama4_text", "mimo_v2_flash")
HYBRID_LENGTHS = (WINDOW - 10, WINDOW, WINDOW + 100, 3 * WINDOW, 3 * WINDOW + 2, WINDOW + 100)
HYBRID_BLOCKS = 64  # two of the longest, whose prompts and outputs have 146 tokens, do not fit


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
@pytest.mark.parametrize("architecture", HYBRIDS)
async def test_hybrid_models_give_the_tokens_of_generate_across_their_windows(
    serving_folder, tight_runners, architecture, reuse
):
    """Prompts that begin alike, shorter and longer than the window, in chunks, preempted, taken from the cache, and
    forked: each of these gives blocks away or takes them over, and none of them may change a token.
    """
    longest = prompts((max(HYBRID_LENGTHS),))[0]
    prompt_list = [[*longest[: length - 1], 5 + number] for number, length in enumerate(HYBRID_LENGTHS)]
    async with started(0, model=serving_folder(architecture), prefix_reuse=reuse) as system:
        await add_all(system, tight_runners(architecture, 1, HYBRID_BLOCKS))
        together = await outputs_of(system, prompt_list, max_output_tokens=30)
        again = [output for p in prompt_list for output in await outputs_of(system, [p], max_output_tokens=30)]
        forked = await outputs_of(system, prompt_list, max_output_tokens=30, n=2)
        await system.idle()

    model = build_model(architecture)
    expected_ids = [generate(model, prompt, 30) for prompt in prompt_list]
    choices = [[choice.token_ids for choice in output.choices] for output in forked]
    for prompt, expected, *actual in zip(prompt_list, expected_ids, together, again, choices, strict=True):
        assert_same_tokens(model, prompt, expected, actual[0].token_ids)
        assert_same_tokens(model, prompt, expected, actual[1].token_ids)
        assert len(actual[2]) == 2
        for token_ids in actual[2]:
            assert_same_tokens(model, prompt, expected, token_ids)
    recomputed = sum(output.usage.recomputation_count for output in (*together, *forked))
    assert recomputed > 0, "nobody was preempted"
    cached = [output.usage.cached_prompt_token_count for output in again]
    assert (max(cached) > 2 * WINDOW) == reuse
    assert all(count < len(prompt) for count, prompt in zip(cached, prompt_list, strict=True))


async def test_choices_with_a_seed_differ_and_are_the_same_on_every_run(serving_folder, load_runner, tight_runners):
    """`n` continuations are worth having only if they differ, and a seed is a promise for each of them."""
    prompt_list = prompts((45, 7, 1))
    sampling = {"temperature": 1.0, "seed": 77, "n": 4}
    async with started(0, model=serving_folder("gemma2")) as system:
        await add_all(system, [load_runner("gemma2")])
        first = await outputs_of(system, prompt_list, **sampling)
        single = await outputs_of(system, prompt_list, **(sampling | {"n": 1}))
    async with started(0, model=serving_folder("gemma2")) as system:
        await add_all(system, tight_runners("gemma2", 2, 40))
        second = await outputs_of(system, prompt_list, **sampling)
        await system.idle()

    for one, other, alone in zip(first, second, single, strict=True):
        texts = [choice.token_ids for choice in one.choices]
        assert len(set(texts)) == 4
        assert [choice.token_ids for choice in other.choices] == texts
        assert alone.token_ids == texts[0], "the first choice is what one gets without the others"
        assert one.usage.output_token_count == 4 * OUTPUT_COUNT
