"""Ranks that share one model: what they are told, how they fail, and that they compute what one process computes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from multiprocessing.connection import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch

from executor_svc.batch import NO_BLOCK, StepBatch
from executor_svc.config import ExecutorConfig
from executor_svc.model import ModelError
from executor_svc.ranks import group as group_module
from executor_svc.ranks.follower import Follower
from executor_svc.ranks.messages import Kind, Order, Orders, read_answer
from executor_svc.ranks.processes import Limits, Ranks, RanksError
from executor_svc.ranks.runner import RankedRunner
from tests.executor_svc.step_driver import DrivenRequest, step_batch
from tests.tiny_models import save_serving_folder

ROOT = Path(__file__).parents[2]
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="where there are GPUs ranks compute on them")


def same(one: StepBatch, other: StepBatch) -> bool:
    """Whether two batches are the same, types of arrays included."""
    sampling = [(getattr(one.sampling, f.name), getattr(other.sampling, f.name)) for f in fields(one.sampling)]
    names = ("slots", "token_ids", "query_lengths", "context_lengths")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names] + sampling
    pairs += zip(one.block_tables, other.block_tables, strict=True)
    return all(left.dtype == right.dtype and np.array_equal(left, right) for left, right in pairs)


def batches() -> list[StepBatch]:
    """Three steps of two layer groups, whose requests grow, give blocks back, leave, and change places."""
    first, second = (
        DrivenRequest(range(5 + row, 14 + row), 4, temperature=0.5 * row, seed=2**64 - 1) for row in (0, 1)
    )
    first.block_tables, second.block_tables = [[7, 3], [1]], [[4, 9], [8]]
    steps = [step_batch([first, second], [6, 8], [False, True])]
    first.block_tables, first.computed_count = [[NO_BLOCK, 3, 5, 6], [1, 2]], 6
    steps.append(step_batch([first], [3], [True]))
    steps.append(step_batch([second, first], [1, 1], [True, True]))
    return steps


def test_a_rank_reads_the_steps_that_were_told():
    """Ranks that compute different steps wait for each other for ever, or worse, do not."""
    ours, theirs = Orders(slot_count=4), Orders(slot_count=4)
    for number, batch in enumerate(batches(), start=1):
        order = theirs.read(ours.write(Order(number, Kind.STEP, batch)))

        assert order.number == number
        assert order.batch is not None
        assert same(order.batch, batch)
        torch.from_numpy(order.batch.token_ids)  # refuses what cannot be written to


def test_a_rank_reads_which_blocks_to_copy():
    """A fork must find its blocks in the cache of every rank."""
    order = Orders(4).read(Orders(4).write(Order(9, Kind.COPY, None, np.array([3, 1]), np.array([5, 2]))))

    assert (order.number, order.kind) == (9, Kind.COPY)
    assert order.sources is not None
    assert order.destinations is not None
    assert (order.sources.tolist(), order.destinations.tolist()) == ([3, 1], [5, 2])


def test_long_block_tables_are_told_once():
    """256 requests with 8,000 tokens each have half a megabyte of block tables; a step that decodes changes few."""
    requests = [DrivenRequest(range(8000), 4, computed_count=8000, output_ids=[1]) for _ in range(256)]
    for number, request in enumerate(requests):
        request.block_tables = [list(range(number, number + 501))]
    orders = Orders(256)
    first, again = (
        len(orders.write(Order(number, Kind.STEP, step_batch(requests, [1] * 256, [True] * 256)))) for number in (1, 2)
    )

    assert first > 256 * 501 * 4
    assert again < 256 * 100


REFUSED = [
    ({"tensor_parallel": 4}, {}, "4 ranks cannot share 4 query heads and 2 key heads: .*2 / 4 = 0.5; set .* to 1 or 2"),
    ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "has quantised weights"),
    ({}, {"model_type": "gpt2"}, "no tensor parallel plan for the layers of 'gpt2'; set tensor_parallel to 1"),
]


def refused(folder: Path, **settings) -> str:
    """Why a model cannot be loaded; no rank may be started for that."""

    def start(count: int) -> Ranks:
        raise AssertionError("a rank was started")

    config = ExecutorConfig(**({"model": str(folder), "tensor_parallel": 2} | settings))
    with pytest.raises(ModelError) as caught:
        RankedRunner.load(config, lambda phase, share: None, start)
    return str(caught.value)


@on_the_cpu
@pytest.mark.parametrize(("settings", "changes", "message"), REFUSED, ids=["heads", "quantised", "no plan"])
def test_refuses_a_model_that_ranks_cannot_share(tmp_path, settings, changes, message):
    """Loading a large model takes minutes; what cannot work is said before that, with the way out."""
    folder = save_serving_folder("llama", tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    assert re.search(message, refused(folder, device="cpu", **settings))


@pytest.mark.parametrize(
    ("gpu_count", "settings", "message"),
    [
        (
            2,
            {"tensor_parallel": 4},
            "tensor parallel 4 needs 4 GPUs, but this process sees 2; set tensor_parallel to 2",
        ),
        (2, {"device": "cuda:1"}, "takes the GPUs 0 to 1 of those that this process sees, but device is 'cuda:1'"),
        (2, {"device": "cpu"}, "tensor parallel on the CPU, but this process sees 2 GPUs"),
        (0, {}, "tensor parallel 2 needs 2 GPUs, but this process sees none; install a CUDA build of torch, or say"),
    ],
)
def test_refuses_gpus_that_are_not_there(serving_folder, monkeypatch, gpu_count, settings, message):
    """The operator learns how many there are and how to choose among them."""
    folder = serving_folder("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpu_count)

    assert message in refused(folder, **settings)


def test_each_rank_has_its_gpu_or_its_share_of_the_threads(monkeypatch):
    """Two ranks on one GPU would need twice its memory; on a CPU threads that wait for each other lose more than they
    gain.
    """
    config = ExecutorConfig(model="m", tensor_parallel=2, threads=6)
    assert [group_module.config_of_rank(config, rank).threads for rank in (0, 1)] == [3, 3]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [group_module.config_of_rank(config, rank).device for rank in (0, 1)] == ["cuda:0", "cuda:1"]


# Ranks without a model: they do what their first message says.
FAKE_RANK = """
import json, os, signal, sys, time
from multiprocessing.connection import Connection
from executor_svc.ranks.lifetime import end_with_rank_0
from executor_svc.ranks.messages import write_answer
connection = Connection(int(sys.argv[-1]))
said = end_with_rank_0(connection)
facts = json.loads(said.get())
does = facts["does"][facts["rank"] - 1]
if does == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if does.startswith("answer"):
    errors = {"answer ValueError": ValueError("no"), "answer KeyError": KeyError("no")}
    for number in range(1, 1001 if does == "answer all" else 2):
        connection.send_bytes(write_answer(number, errors.get(does)))
time.sleep(600)
"""


PATIENT = Limits(step_s=60, lag_s=60)


class FakeRanks(Ranks):
    """Ranks without a model; what would end the process is noted."""

    def __init__(self, *does: str, limits: Limits = PATIENT):
        self.exit_codes: list[int] = []
        self.has_ended = threading.Event()
        super().__init__(1 + len(does), (sys.executable, "-c", FAKE_RANK), limits, self._note)
        self.introduce({"does": does})

    def _note(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)
        self.has_ended.set()


@pytest.fixture
def fake_ranks():
    """Start ranks without a model; they are gone when the test is."""
    started: list[FakeRanks] = []

    def start(*does: str, **settings) -> FakeRanks:
        started.append(FakeRanks(*does, **settings))
        return started[-1]

    yield start
    for ranks in started:
        ranks.close()


def is_there(process_id: int) -> bool:
    """Whether a process lives; one that nobody has asked after yet does not."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def until(condition, timeout_s: float = 60.0) -> None:
    """Wait for something that is about to happen."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_dies_ends_all_of_them(fake_ranks):
    """The others would wait in the middle of a step for what it never sends."""
    ranks = fake_ranks("wait", "die", "wait")

    assert ranks.has_ended.wait(60)
    assert ranks.exit_codes == [1]
    until(lambda: not any(map(is_there, ranks.process_ids)))
    with pytest.raises(RanksError, match="start this executor again"):
        ranks.tell(b"a step")


def test_a_rank_that_stands_still_ends_all_of_them(fake_ranks):
    """A device may be stuck while its process lives; nobody must wait for ever."""
    ranks = fake_ranks("wait", "wait", limits=Limits(step_s=0.5, lag_s=60))
    with ranks.waiting():
        assert ranks.has_ended.wait(60)

    assert ranks.exit_codes == [1]


def test_a_rank_that_is_through_alone_ends_all_of_them(fake_ranks):
    """One that failed by itself takes no part in the step any more, and the others never get to its end."""
    ranks = fake_ranks("answer ValueError", "wait", limits=Limits(step_s=60, lag_s=0.5))
    with ranks.waiting():
        assert ranks.has_ended.wait(60)

    assert ranks.exit_codes == [1]


def test_others_may_be_ahead_for_as_long_as_they_like(fake_ranks):
    """Rank 0 has more to do than they have; it only must not stand still."""
    ranks = fake_ranks("answer all", limits=Limits(step_s=60, lag_s=1))
    number = 0
    until_when = time.monotonic() + 1.5
    while time.monotonic() < until_when and number < 1000:
        number += 1
        with ranks.waiting():
            time.sleep(0.01)
        ranks.agree(number, None)

    assert ranks.exit_codes == []


def test_time_passes_only_while_something_is_waited_for(fake_ranks):
    """An idle executor stays, however long it has nothing to do."""
    ranks = fake_ranks("answer", limits=Limits(step_s=0.01, lag_s=0.01))

    assert not ranks.has_ended.wait(0.5)


@pytest.mark.parametrize(
    ("does", "own", "is_alike"),
    [
        (("answer", "answer"), None, True),
        (("answer ValueError", "answer ValueError"), ValueError("no, on GPU 0"), True),
        (("answer", "answer ValueError"), None, False),
        (("answer ValueError", "answer KeyError"), ValueError("no"), False),
        (("answer", "answer"), ValueError("no"), False),
    ],
)
def test_ranks_go_on_after_what_went_alike(fake_ranks, does, own, is_alike):
    """A step that failed everywhere is run again in halves; one that some have computed is not to be trusted."""
    ranks = fake_ranks(*does)
    if is_alike:
        ranks.agree(1, own)
        assert ranks.exit_codes == []
    else:
        with pytest.raises(RanksError, match="did not do the same"):
            ranks.agree(1, own)
        assert ranks.exit_codes == [1]


PARENT = f"""
from executor_svc.ranks.processes import Ranks
import sys, time
ranks = Ranks(3, (sys.executable, "-c", {FAKE_RANK!r}))
ranks.introduce({{"does": ["wait", "wait"]}})
print(*ranks.process_ids, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stopped process outlives its parent")
def test_no_rank_is_left_when_the_executor_is_killed():
    """A GPU that a forgotten process holds is lost to the next executor; a stopped process reads no end of a line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        process_ids = list(map(int, parent.stdout.readline().split()))
        assert len(process_ids) == 2
        # Its signal handlers are there once it ignores this one.
        until(lambda: all(ignores(process_id, signal.SIGTERM) for process_id in process_ids))
        os.kill(process_ids[0], signal.SIGSTOP)
        parent.kill()

    until(lambda: not any(map(is_there, process_ids)))


def ignores(process_id: int, number: int) -> bool:
    """Whether a process ignores a signal."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)


class SlowSteps:
    """A runner whose steps end when they may; it notes what it does."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.may_end = threading.Event()

    def launch(self, batch: StepBatch) -> "SlowSteps":
        self.did.append("begins")
        return self

    def result(self) -> None:
        assert self.may_end.wait(60)
        self.did.append("ends")

    def copy_blocks(self, sources, destinations) -> None:
        self.did.append("copies")
        raise ValueError("nothing there")


def test_a_rank_begins_steps_ahead_and_answers_each_at_its_end():
    """Its device goes on by itself as that of rank 0 does, or rank 0 would wait for it in every step."""
    ours, theirs = Pipe()
    runner = SlowSteps()
    follower = Follower(runner, theirs, torch.device("cpu"))
    first, second, _ = batches()
    follower.obey(Order(1, Kind.STEP, first))
    follower.obey(Order(2, Kind.STEP, second))

    assert runner.did == ["begins", "begins"]
    assert not ours.poll()
    copying = Order(3, Kind.COPY, sources=np.array([1]), destinations=np.array([2]))
    obeying = threading.Thread(target=follower.obey, args=(copying,))
    obeying.start()
    runner.may_end.set()
    obeying.join()

    assert runner.did == ["begins", "begins", "ends", "ends", "copies"]
    answers = [read_answer(ours.recv_bytes()) for _ in range(3)]
    assert answers == [(1, ""), (2, ""), (3, "ValueError: nothing there")]


@on_the_cpu
def test_two_ranks_compute_what_one_process_computes(serving_folder):
    """In a process of its own: in the middle of a sum, the end of one rank may be the end of the other."""
    command = [sys.executable, "-m", "tests.executor_svc.two_ranks", str(serving_folder("llama"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)

    assert done.returncode == 0, done.stderr
    assert "two ranks did what one process does" in done.stdout
