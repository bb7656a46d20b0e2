"""Where the time of a step goes."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import offline
from benchmarks.step_profile import CASES, Case, Stage, fitting_cases, phase_source, phases_table, profile
from benchmarks.workloads import Job, Workload
from executor_svc.batch import Runner
from executor_svc.config import ExecutorConfig
from executor_svc.fake import FakeRunner
from executor_svc.main import load_runner
from paceline_cli.errors import ExitCode
from paceline_cli.main import app
from tests.tiny_models import save_serving_folder


def fake(**settings: int) -> FakeRunner:
    return FakeRunner(ExecutorConfig("fake", fake_step_us=0, fake_token_us=0, **settings))


class Noting:
    """A runner that notes the shape of each step it computes, and has a model that tells its phases."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._model = self
        self.info = runner.info
        self.steps: list[tuple[list[int], list[int]]] = []

    def run(self, batch):
        self.steps.append((batch.query_lengths.tolist(), batch.context_lengths.tolist()))
        return self._runner.run(batch)

    def phases(self) -> dict[str, float]:
        told = {"attention": 0.001 * len(self.steps)}
        self.steps.clear()
        return told


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Runner:
    folder = save_serving_folder("llama", tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=1024)
    config = ExecutorConfig(str(folder), dtype="float32", threads=1, native=False, cache_memory_bytes=64 << 20)
    return load_runner(config, lambda _phase, _share: None)


def test_a_stage_computes_what_its_case_says_and_nothing_before_it():
    """A profile is of a step of that size: prompts on the way there must not be computed, nor shared."""
    runner = Noting(fake())
    stage = Stage(runner, Case(3, 128, 64), step_count=2)
    seconds = [stage.step(), stage.step()]

    assert runner.steps == [([1, 1, 1, 64], [128] * 3 + [64]), ([1, 1, 1, 64], [129] * 3 + [64])]
    assert all(one["step"] >= one["prepare"] + one["sample"] > 0 for one in seconds)


def test_every_kind_of_step_is_in_the_table_and_the_json(tmp_path):
    """Before and after an optimisation, the same rows stand side by side."""
    written = tmp_path / "profile.json"
    result = CliRunner().invoke(app, ["bench", "profile", "fake", "--steps", "1", "--json", str(written)])
    made = json.loads(written.read_text())

    assert result.exit_code == ExitCode.OK, result.output
    assert [row["name"] for row in made["profile"]] == [case.name for case in CASES]
    assert all(case.name in result.stdout for case in CASES)
    assert all(set(row["ms"]) >= {"plan", "apply", "wire", "step"} for row in made["profile"])


def test_what_does_not_fit_into_a_model_is_left_out():
    """A model with a short context is profiled as far as it goes."""
    cases = fitting_cases(fake(max_model_len=256), step_count=1)

    assert {case.context for case in cases} == {0, 128}
    assert Case(chunk=512) not in cases


def test_a_model_that_tells_its_phases_is_asked(monkeypatch):
    """Steps in C++ know better than any profiler where their time went."""
    monkeypatch.setattr("benchmarks.step_profile.CASES", (Case(2, 128),))
    runner = Noting(fake())
    (row,) = profile(runner, 4, lambda _doing: None)

    assert row["phases_ms"] == {"attention": 1.0}  # a step's share of four steps; none of those before them
    assert phases_table([row]) is not None
    assert phase_source(fake())() == {}


def test_a_step_in_torch_is_taken_apart_by_kind(tiny, monkeypatch):
    """Products of matrices, attention, copies, and the rest, which is mostly Python, add up to the forward pass."""
    monkeypatch.setattr("benchmarks.step_profile.CASES", (Case(4, 128, 64),))
    (row,) = profile(tiny, 2, lambda _doing: None)

    assert row["phases_ms"]["matrix products"] > 0
    assert min(row["phases_ms"].values()) >= 0
    assert sum(row["phases_ms"].values()) == pytest.approx(row["ms"]["forward"], rel=0.01)


def test_a_model_gives_every_token_offline(tiny):
    """The same path as with the fake model, with steps that compute."""
    jobs = [Job([number] * (5 + number), 4 + number) for number in range(3)]
    with offline.Engine(tiny) as engine:
        answers = engine.run(Workload("test", "", jobs))

    assert [answer.output_count for answer in answers] == [job.output_count for job in jobs]
