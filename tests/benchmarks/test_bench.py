"""`paceline bench`, from the command line to the JSON."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import BenchmarkError, offline
from benchmarks.wanted import Side, Work
from benchmarks.workloads import Job, Workload
from executor_svc.config import ExecutorConfig
from executor_svc.fake import FakeRunner, next_token
from paceline_cli.errors import ExitCode
from paceline_cli.main import app
from tests.benchmarks.test_figures import KEYS


def bench(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words], prog_name="paceline")


def fake(**settings: Any) -> FakeRunner:
    return FakeRunner(ExecutorConfig("fake", fake_step_us=0, fake_token_us=0, **settings))


def test_the_whole_system_is_started_measured_and_ended(tmp_path):
    """What `paceline bench serve` is for: one command, and the figures that users see."""
    written = tmp_path / "figures.json"
    result = bench("serve", "fake", "--workload", "W4,W3", "--rate", "500", "--turns", "1", "--json", str(written))
    runs = json.loads(written.read_text())["runs"]

    assert result.exit_code == ExitCode.OK, result.output
    assert [run["workload"] for run in runs] == ["W3", "W4"]
    assert all(set(run) == KEYS and run["runner"] == "fake" and run["mode"] == "serve" for run in runs)
    assert all(run["start_s"] > 0 and run["peak_mib"]["executor"] and run["peak_mib"]["scheduler"] for run in runs)
    assert all(name in result.stdout for name in ("W3", "W4", "tokens/s"))


def test_offline_starts_anew_in_every_turn(tmp_path):
    """Memory and start-up are a process's own: a second turn in the same one would show neither."""
    written = tmp_path / "figures.json"
    result = bench("offline", "fake", "-w", "W4", "--turns", "2", "--json", str(written))
    made = json.loads(written.read_text())

    assert result.exit_code == ExitCode.OK, result.output
    assert [(run["turn"], run["output_tokens"]) for run in made["runs"]] == [(0, 128), (1, 128)]
    assert all(set(run) == KEYS and run["mode"] == "offline" and run["start_s"] > 0 for run in made["runs"])
    assert made["setting"]["hardware"]["cores"] >= 1
    assert made["setting"]["versions"]["python"]


def test_offline_gives_every_token_that_a_server_would():
    """It plans ahead like the real engine: that must not lose, repeat or change a token."""
    jobs = [Job([65 + number] * (20 + 7 * number), 3 + number) for number in range(10)]
    heard: list[int] = []
    with offline.Engine(fake(max_num_seqs=4)) as engine:  # some wait for others to end
        answers = engine.run(Workload("test", "", jobs), heard.append)

    assert [answer.output_count for answer in answers] == [job.output_count for job in jobs]
    assert sum(heard) == sum(job.output_count for job in jobs)
    assert next_token(jobs[0].prompt)  # the fake model knows no end, so nothing ended early


def test_a_failed_child_says_why():
    """It fails in another process; the reason must reach the user."""
    with pytest.raises(BenchmarkError, match="threads must be 0"):
        list(offline.measure(Side("fake", threads=-1), Work(("W4",)), 0, lambda _doing: None))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serve", "fake", "-w", "W9"], "choose of W1, W2, W3, W4"),
        (["offline", "fake", "-w", "W3"], "paceline bench serve"),
        (["serve", "fake", "--against", "vllm"], "--against torch"),
        (["serve", "fake", "--against", "torch"], "name a model"),
        (["serve", "smollm2", "--against", "torch", "--no-native"], "leave one out"),
        (["serve", "smollm2", "--against", "torch", "--weights", "int8"], "leave --against or --weights out"),
        (["serve", "--server", "localhost:1", "--against", "torch"], "leave one of them out"),
        (["core", "--growth", "--memory"], "one after the other"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_with_a_remedy(words, says):
    """Before anything is started: a wrong flag must not cost minutes."""
    result = bench(*words)

    assert result.exit_code == ExitCode.USAGE
    assert says in " ".join(result.output.split())


def test_a_server_that_is_not_there_is_named():
    """With --server nothing is started, so there must be something."""
    result = bench("serve", "--server", "localhost:1", "-w", "W4")

    assert result.exit_code == ExitCode.UNREACHABLE
    assert "--server" in result.output


def test_core_and_wire_print_their_tables():
    """The scheduler's own costs, without a server."""
    core, wire = bench("core", "--running", "4", "--waiting", "2"), bench("wire", "--running", "4")

    assert core.exit_code == wire.exit_code == ExitCode.OK
    assert "plan + apply" in core.stdout
    assert "block size" in wire.stdout
