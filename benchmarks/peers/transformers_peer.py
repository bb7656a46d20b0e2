"""transformers under the workloads, in this process; runs in Paceline's environment, one JSON line for each workload.

python -m benchmarks.peers.transformers_peer --model FOLDER --way continuous
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.figures import Answer
from benchmarks.peers.processes import peak_mib
from benchmarks.peers.runs import Ask, Start, answered_at_once, flags, process_age_s
from benchmarks.workloads import Job

WAYS = {
    "one-by-one": "generate, a request at a time",
    "static-sdpa": "generate, padded batches of 16 in order, attention by sdpa",
    "static-eager": "the same, eager attention",
    "continuous": "continuous batching, as generate_batch does it, with each request's own length",
}
TITLES = {
    "one-by-one": "generate, one by one",
    "static-sdpa": "generate, batches of 16, sdpa",
    "static-eager": "generate, batches of 16, eager",
    "continuous": "continuous batching",
}
BATCH = 16
NO_TOKEN = -1  # as end of sequence: none
PADDING = 2
CACHE_GIB = 2
PAGE = 256  # tokens, its default


class Clock:
    """Takes the place of a streamer that prints: notes when tokens come."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _: Any) -> None:
        """The prompt first, then token by token."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """There is nothing to flush."""


def one_by_one(model: Any, jobs: list[Job]) -> list[Answer]:
    """A request at a time."""
    import torch

    answers = []
    for job in jobs:
        clock, asked_s = Clock(), time.perf_counter()
        ids = torch.tensor([job.prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.output_count, do_sample=False, streamer=clock
        )
        check(whole.shape[1] - len(job.prompt), job.output_count)
        answers.append(timed(job, asked_s, clock.times_s[1:]))
    return answers


def in_batches(model: Any, jobs: list[Job]) -> list[Answer]:
    """16 at a time, padded on the left; each batch runs as long as its longest, and only what was asked for counts."""
    import torch

    asked_s = time.perf_counter()
    for start in range(0, len(jobs), BATCH):
        batch = jobs[start : start + BATCH]
        width = max(len(job.prompt) for job in batch)
        ids = torch.full((len(batch), width), PADDING)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(batch):
            ids[row, width - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, width - len(job.prompt) :] = 1
        longest = max(job.output_count for job in batch)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False)
        check(whole.shape[1] - width, longest)
    return answered_at_once(jobs, asked_s)


class Continuous:
    """Continuous batching that has been started: what it needs for that is not part of an answer."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._asked_count = 0

    def __call__(self, jobs: list[Job]) -> list[Answer]:
        """All at once into its manager, which notes the time of each token."""
        asked_s, asked = time.perf_counter(), {}
        for job in jobs:
            self._asked_count += 1
            asked[str(self._asked_count)] = job
            self._manager.add_request(
                job.prompt,
                request_id=str(self._asked_count),
                max_new_tokens=job.output_count,
                eos_token_id=NO_TOKEN,
                record_timestamps=True,
            )
        return [self._next_answer(asked, asked_s) for _ in jobs]

    def _next_answer(self, asked: dict[str, Job], asked_s: float) -> Answer:
        while self._manager.is_running():
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise BenchmarkError(f"request {result.request_id} failed: {result.error}")
                job = asked[result.request_id]
                check(len(result.generated_tokens), job.output_count)
                return timed(job, asked_s, result.timestamps)
        raise BenchmarkError("continuous batching stopped before all requests had their tokens")


@contextmanager
def continuous(model: Any) -> Iterator[Ask]:
    """What generate_batch uses, with a cache of 2 GiB: by itself it would take nine tenths of the memory."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    block_count = (CACHE_GIB << 30) // (token_bytes * PAGE)
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=PADDING),
        continuous_batching_config=ContinuousBatchingConfig(page_size=PAGE, num_blocks=block_count),
    ) as manager:
        yield Continuous(manager)


def timed(job: Job, asked_s: float, times_s: list[float]) -> Answer:
    """An answer whose tokens came one by one."""
    return Answer(len(job.prompt), asked_s, [(time_s, 1) for time_s in times_s])


def check(count: int, wanted: int) -> None:
    """Refuse to count an answer that is not what was asked for."""
    if count != wanted:
        raise BenchmarkError(f"transformers gave {count} tokens where {wanted} were asked")


def load(given: argparse.Namespace) -> Any:
    """The model, which generates on and on."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(given.threads)
    logging.disable_progress_bar()
    attention = "eager" if given.way == "static-eager" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=getattr(torch, given.dtype), attn_implementation=attention
    )
    model.eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.generation_config.pad_token_id = PADDING
    return model


@contextmanager
def opened(way: str, model: Any) -> Iterator[Ask]:
    """One way of using it, ready to be asked."""
    if way == "continuous":
        with continuous(model) as ask:
            yield ask
    else:
        yield partial(one_by_one if way == "one-by-one" else in_batches, model)


def main() -> None:
    """Run one way of it."""
    given = flags(__doc__ or "", WAYS).parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(given.threads))
    import transformers

    with opened(given.way, load(given)) as ask:
        version, tells_times = f"transformers {transformers.__version__}", not given.way.startswith("static")
        start = Start("transformers", version, "offline", TITLES[given.way], given, process_age_s(), tells_times)
        start.run_all(ask, lambda: peak_mib(os.getpid()))


if __name__ == "__main__":
    main()
