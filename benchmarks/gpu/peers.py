"""transformers' own continuous batching on the same models, at the same batch sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.figures import Answer
from benchmarks.gpu.given import PEER, Given, Tell
from benchmarks.gpu.shapes import Shape, serving_folder, shape_of
from benchmarks.gpu.steady import Steady, jobs_of
from benchmarks.peers.transformers_peer import NO_TOKEN, PADDING, PAGE, Continuous
from benchmarks.workloads import Job

_LARGEST_SHORT = 64  # requests; more of them take so long that they generate less
_WAYS = {"graphs": True, "its own choice": None}  # with masks, transformers itself would not use graphs


def run(given: Given, tell: Tell) -> None:
    """Let transformers decode with the fastest attention that it finds here, with CUDA graphs and as it chooses."""
    shape = shape_of(given.shape, given.rehearse)
    model = _load(serving_folder(shape, given.folder, given.device), given)
    for name, graphs in _WAYS.items():
        try:
            _decode(model, given, shape, name, graphs, tell)
        except Exception as error:  # noqa: BLE001  one way may need more memory than there is; the other goes on
            tell({"model": given.shape, "failure": f"{name}: {type(error).__name__}: {error}"})


def _decode(model: Any, given: Given, shape: Shape, name: str, graphs: bool | None, tell: Tell) -> None:
    with _continuous(model, given, graphs) as ask:
        ask([Job([1, 2, 3], 4)])
        for count in given.batches:
            jobs = jobs_of(count, given.prompt_count, _output_count(given, count), shape.vocabulary_size, name)
            answers: list[Answer] = ask(jobs)
            steady = Steady.of(answers)
            tell(
                {
                    "model": given.shape,
                    "way": PEER,
                    "batch": count,
                    "how": f"{model.config._attn_implementation.rpartition('|')[2]}, {name}",
                    "tokens_per_s": round(steady.tokens_per_s, 2),
                    "step_ms": round(1000 * count / steady.tokens_per_s, 4),
                    "context": round(steady.mean_context, 1),
                }
            )


def _output_count(given: Given, count: int) -> int:
    """Fewer tokens than Paceline generates, and so shorter contexts, which is to transformers' advantage."""
    return given.output_count if given.rehearse else given.output_count // (2 if count <= _LARGEST_SHORT else 4)


def _load(folder: Any, given: Given) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float32 if given.rehearse else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", device_map={"": given.device}
    ).eval()


@contextmanager
def _continuous(model: Any, given: Given, graphs: bool | None) -> Iterator[Continuous]:
    """Its manager, started and warmed up; it takes flash attention instead of sdpa where that is installed."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page = "page_size" if "page_size" in names else "block_size"  # its name until 5.17
    block_count = max(given.batches) * (2 + (given.prompt_count + given.output_count) // PAGE)
    settings = {page: PAGE, "num_blocks": block_count, "max_batch_tokens": given.step_token_count}
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=PADDING),
        continuous_batching_config=ContinuousBatchingConfig(**settings, use_cuda_graph=graphs),
    ) as manager:
        yield Continuous(manager)
