"""Two ranks on the CPU, of which this process is the first: it ends with 0 where they do what one process does.

python -m tests.executor_svc.two_ranks FOLDER
"""

import os
import sys

import numpy as np
import pytest
import torch

from executor_svc.batch import Failed, StepBatch
from executor_svc.config import ExecutorConfig
from executor_svc.ranks.processes import Limits, Ranks, RanksError
from executor_svc.ranks.runner import RankedRunner
from executor_svc.torch_runner import StepError, TorchRunner
from tests.executor_svc.step_driver import DrivenRequest, drive, step_batch
from tests.executor_svc.test_parity import OUTPUT_COUNT, generate, prompts
from tests.parity import assert_same_tokens
from tests.tiny_models import build_model


class NotedEnd(Ranks):
    """Ranks with a model, whose end does not end this process; others may keep both cores from them for long."""

    def __init__(self, count: int) -> None:
        self.exit_codes: list[int] = []
        super().__init__(count, limits=Limits(lag_s=150), end=self.exit_codes.append)


def main(folder: str) -> None:
    """Each has half of the heads and half of the cache. A row with NaN fails alone, and everywhere; what only one rank
    meets ends them.
    """
    started: list[NotedEnd] = []
    config = ExecutorConfig(
        model=folder,
        device="cpu",
        dtype="float32",
        block_size=4,
        cache_memory_bytes=4 << 20,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        tensor_parallel=2,
    )

    def start(count: int) -> Ranks:
        started.append(NotedEnd(count))
        return started[-1]

    runner = RankedRunner.load(config, lambda phase, share: None, start)
    assert (runner.info.mode, runner.info.device_count) == ("packed", 2)
    assert runner.info.cache_bytes == (runner.info.block_count + 1) * 4 * 768
    gives_the_tokens_of_generate(runner)
    fails_one_row_alone(runner)
    copies_blocks_everywhere(runner)
    with pytest.MonkeyPatch.context() as patch:
        ends_by_what_one_rank_meets(runner, started[0], patch)


def gives_the_tokens_of_generate(runner: RankedRunner) -> None:
    requests = [DrivenRequest(p, OUTPUT_COUNT, first_step=2 * i) for i, p in enumerate(prompts())]
    drive(runner, requests)
    model = build_model("llama")
    for request in requests:
        expected = generate(model, list(request.prompt_ids))
        assert_same_tokens(model, list(request.prompt_ids), expected, request.output_ids)


def fails_one_row_alone(runner: RankedRunner) -> None:
    good, bad = (DrivenRequest(range(3 + row, 9 + 6 * row), 4) for row in (0, 1))
    good.block_tables, bad.block_tables = [[1, 2, 3]], [[0, 4, 5, 6]]
    expected = runner.run(step_batch([good, bad], [6, 11], [True, True])).token_ids[0]
    good.computed_count, bad.computed_count = 5, 10  # the last token once more, as a decode
    runner._runner._pool.values(0)[:4] = torch.nan  # in the heads of rank 0: the sum has it everywhere

    with pytest.raises(StepError, match=r"slots \[1\] have NaN"):
        runner.run(step_batch([good, bad], [1, 1], [True, True]))
    assert runner.run(step_batch([good], [1], [True])).token_ids.tolist() == [expected]
    runner.check_device()


def copies_blocks_everywhere(runner: RankedRunner) -> None:
    request = DrivenRequest(range(40, 48), 4)
    request.block_tables = [[10, 11, 12]]
    expected = runner.run(step_batch([request], [8], [True])).token_ids.tolist()
    runner.copy_blocks(np.array([10, 11]), np.array([20, 21]))
    request.block_tables, request.computed_count = [[20, 21, 22]], 7

    assert runner.run(step_batch([request], [1], [True])).token_ids.tolist() == expected


def ends_by_what_one_rank_meets(runner: RankedRunner, ranks: NotedEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    request = DrivenRequest(range(40, 48), 4)
    request.block_tables = [[10, 11, 12]]
    launch = TorchRunner.launch

    def fail_afterwards(self: TorchRunner, batch: StepBatch):
        launch(self, batch)
        return Failed(MemoryError("only here"))

    monkeypatch.setattr(TorchRunner, "launch", fail_afterwards)
    with pytest.raises(RanksError, match="rank 0: MemoryError: only here; rank 1: done"):
        runner.run(step_batch([request], [8], [True]))
    assert ranks.exit_codes == [1]


if __name__ == "__main__":
    main(sys.argv[1])
    print("two ranks did what one process does", flush=True)
    os._exit(0)  # as an executor with ranks ends: who is gone meanwhile may not be asked any more
