"""Models on a real GPU: recorded steps, streams and copies, which nothing on a CPU stands in for whole.

`benchmarks/gpu_check.sh` runs these; each architecture compiles kernels of its own, which takes most of the time.
"""

import asyncio
import random
from pathlib import Path

import pytest
import torch

from executor_svc.config import ExecutorConfig
from executor_svc.gpu.queue import CudaQueue
from executor_svc.torch_runner import TorchRunner
from paceline import AsyncClient
from tests.executor_svc.conftest import load_folder
from tests.executor_svc.step_driver import DrivenRequest, drive
from tests.executor_svc.test_parity import assert_generated
from tests.system import started
from tests.tiny_models import VOCABULARY_SIZE, build_model, save_serving_folder

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]

PROMPT_LENGTHS = (1, 8, 23, 45, 40, 3)
OUTPUT_COUNT = 20


def requests(**sampling: float) -> list[DrivenRequest]:
    draw = random.Random(7)
    prompts = [[draw.randrange(VOCABULARY_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    return [DrivenRequest(prompt, OUTPUT_COUNT, first_step=i, **sampling) for i, prompt in enumerate(prompts)]


def load(folder: Path, **settings: object) -> TorchRunner:
    return load_folder(folder, **({"device": DEVICE, "attention": "triton"} | settings))


# Fused steps; with norms of heads; with windows and caps; in the model's own modules, with sinks.
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_gives_the_tokens_of_generate_in_recorded_steps(tmp_path, architecture):
    """The definition of correct, over blocks that hold NaN before they are given away."""
    runner = load(save_serving_folder(architecture, tmp_path / "model"))
    asked = requests()
    drive(runner, asked)

    assert runner.info.mode == ("packed" if architecture == "gpt_oss" else "fused")
    assert runner.recorded_count  # where nothing could be recorded it is launched instead, and gives the same tokens
    assert_generated(build_model(architecture), asked)


def test_gives_the_tokens_of_generate_in_steps_that_are_begun_ahead(tmp_path):
    """Through the whole system, where tokens stay on the device from step to step and copies run beside them."""
    folder = save_serving_folder("llama", tmp_path / "model")
    runner = load(folder)
    asked = requests()

    async def ask_all() -> None:
        async with started(0, model=folder) as system, AsyncClient(system.address) as client:
            system.add_executor(ExecutorConfig(str(folder)), runner)
            await system.ready()
            options = {"max_output_tokens": OUTPUT_COUNT, "ignore_eos": True, "temperature": 0.0, "stream": False}
            outputs = await asyncio.gather(*(client.generate(list(one.prompt_ids), **options) for one in asked))
            for one, output in zip(asked, outputs, strict=True):
                one.output_ids = list(output.token_ids)

    asyncio.run(ask_all())

    assert_generated(build_model("llama"), asked)


def test_recorded_steps_choose_what_launched_ones_and_a_cpu_choose(tmp_path):
    """A seed gives the same text on every executor, whatever it runs on."""
    folder = save_serving_folder("llama", tmp_path / "model")
    settings = [{}, {"graphs": False}, {"attention": "torch"}, {"device": "cpu", "attention": "torch", "native": False}]
    outputs, recorded = [], []
    for changes in settings:
        asked = requests(temperature=0.9, top_k=40, top_p=0.95, seed=5)
        runner = load(folder, **changes)
        drive(runner, asked)
        outputs.append([one.output_ids for one in asked])
        recorded.append(bool(runner.recorded_count))

    assert recorded == [True, False, False, False]
    assert outputs[1:] == outputs[:1] * 3


def test_weights_in_bfloat16_give_finite_logits_in_recorded_steps(tmp_path):
    """The type in which models are served; the self-test at the start compares with the model's own code."""
    runner = load(save_serving_folder("llama", tmp_path / "model"), dtype="bfloat16")
    asked = requests()
    drive(runner, asked)

    assert all(one.is_done for one in asked)


def test_what_cannot_be_recorded_leaves_the_device_as_it_was():
    """Such a model is launched kernel by kernel, by an allocator that gives memory back and records again."""
    queue = CudaQueue(torch.device(DEVICE))
    ones = torch.ones(4, device=DEVICE)

    def waits_unseen() -> torch.Tensor:
        torch.cuda.synchronize()
        return ones + 1

    torch.cuda.synchronize()
    with queue.steps():
        for refused in (lambda: ones * ones.sum().item(), lambda: ones + ones.to("cpu").to(DEVICE), waits_unseen):
            with pytest.raises(RuntimeError):
                queue.record(refused)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        recording = queue.record(lambda: ones + 1)
        ones.fill_(2)
        recording.replay()

    torch.cuda.synchronize()
    assert recording.output.tolist() == [3] * 4
    assert torch.cuda.get_sync_debug_mode() == 0
