"""What a start keeps for the next one: only what holds for it, and only what passed."""

import json
from dataclasses import replace

import pytest

from executor_svc import kept_checks, model, torch_runner
from executor_svc.kept_checks import CheckFile, Checks
from executor_svc.model import ModelError
from executor_svc.native import library
from tests.executor_svc.conftest import load_folder, needs_compiler
from tests.tiny_models import save_serving_folder

CHECKS = Checks(mode="packed", largest_step_bytes=4096, made_at="2026-11-30T10:00:00+00:00")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Where results are kept; nothing is there yet."""
    monkeypatch.setattr(kept_checks, "default_cache_home", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "checks"


@pytest.fixture
def done(monkeypatch):
    """What a start did, test or measurement, since this list was last cleared."""
    done = []

    def note(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (done.append(name.strip("_")), original(*given))[1])

    note(model, "check_steps")
    note(torch_runner, "run_largest_step")
    return done


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_compiler)])
def test_a_second_start_tests_and_measures_nothing(home, done, serving_folder, native):
    """It must be ready soon: an executor that is missed is started again."""
    settings = {"keep_checks": True, "native": native}
    first = load_folder(serving_folder("llama"), **settings).info
    assert done == ["check_steps", "run_largest_step"]
    done.clear()

    assert load_folder(serving_folder("llama"), **settings).info == first
    assert done == []


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"max_num_seqs": 4}, {"max_model_len": 100}, {"native": True}]
)
@needs_compiler
def test_whatever_may_change_the_results_asks_for_new_ones(home, done, serving_folder, change):
    """A result of something else is none."""
    settings = {"keep_checks": True, "native": False}
    load_folder(serving_folder("llama"), **settings)
    done.clear()
    load_folder(serving_folder("llama"), **(settings | change))

    assert done == ["check_steps", "run_largest_step"]


@needs_compiler
def test_rounded_weights_are_tested_by_themselves(home, done, serving_folder):
    """They are another model; that the one in the files has passed says nothing about it."""
    load_folder(serving_folder("llama"), keep_checks=True)
    done.clear()
    load_folder(serving_folder("llama"), keep_checks=True, weights="int8")

    assert done == ["check_steps", "run_largest_step"]


@pytest.mark.parametrize("name", ["torch", "transformers", "executor_svc"])
def test_another_release_tests_again(home, done, serving_folder, monkeypatch, name):
    """An upgrade is the moment at which a model may begin to compute something else."""
    load_folder(serving_folder("llama"), keep_checks=True, native=False)
    done.clear()
    monkeypatch.setattr(torch_runner, "versions", lambda: kept_checks.versions() | {name: "another"})
    load_folder(serving_folder("llama"), keep_checks=True, native=False)

    assert "check_steps" in done


def test_another_model_tests_again(home, done, serving_folder):
    """Its fingerprint says so, whatever the folder is called."""
    load_folder(serving_folder("llama"), keep_checks=True, native=False)
    done.clear()
    load_folder(serving_folder("qwen2"), keep_checks=True, native=False)

    assert "check_steps" in done


def test_changed_weights_test_again_under_the_same_name(home, done, tmp_path):
    """Somebody copies a file into a folder that was prepared; what it says of itself is then another model's."""
    folder = save_serving_folder("llama", tmp_path / "model")
    load_folder(folder, keep_checks=True, native=False)
    done.clear()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights)
    load_folder(folder, keep_checks=True, native=False)

    assert "check_steps" in done


def test_results_can_be_ignored(home, done, serving_folder):
    """For whoever doubts them: nothing is read, and nothing is written."""
    load_folder(serving_folder("llama"), keep_checks=True, native=False)
    (kept,) = home.iterdir()
    before = kept.stat().st_mtime_ns
    done.clear()
    load_folder(serving_folder("llama"), keep_checks=False, native=False)

    assert done == ["check_steps", "run_largest_step"]
    assert kept.stat().st_mtime_ns == before


def test_a_model_that_is_refused_is_tested_each_time(home, tmp_path, monkeypatch):
    """The reason may be gone at the next start."""
    folder = save_serving_folder("llama", tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr("executor_svc.self_test._distances", lambda *_: [1.0])
        with pytest.raises(ModelError, match="away from"):
            load_folder(folder, keep_checks=True)
    assert not home.exists()

    assert load_folder(folder, keep_checks=True).info.name == "llama"


@needs_compiler
def test_steps_in_cpp_that_failed_are_tried_again(home, serving_folder, monkeypatch, capsys):
    """Torch would else be what the model runs in for good, at a third of the speed."""
    right = library.NativeModel.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            library.NativeModel, "__init__", lambda self, **v: right(self, **(v | {"scaling": 3 * v["scaling"]}))
        )
        assert load_folder(serving_folder("llama"), keep_checks=True).info.mode == "packed"
    assert "failed the self-test" in capsys.readouterr().out
    assert not home.exists()

    assert load_folder(serving_folder("llama"), keep_checks=True).info.mode == "native"


def test_what_is_written_is_read(home):
    """The file is one line of truth for every later start."""
    file = CheckFile({"model": "a"})
    assert file.read() is None
    file.write(CHECKS)

    assert file.read() == CHECKS
    assert CheckFile({"model": "b"}).read() is None
    assert [entry.name for entry in home.iterdir()] == [file.path.name]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"subject": {"model": "a"}}',
        json.dumps({"subject": {"model": "a"}, "checks": {"mode": "packed"}}),
        json.dumps({"subject": {"model": "b"}, "checks": {}}),
        json.dumps(
            {
                "subject": {"model": "a"},
                "checks": {"mode": "other", "largest_step_bytes": 1, "made_at": ""},
            }
        ),
        json.dumps(
            {
                "subject": {"model": "a"},
                "checks": {"mode": "packed", "largest_step_bytes": -1, "made_at": ""},
            }
        ),
        "\xff\x00",
    ],
)
def test_a_file_that_cannot_be_understood_counts_as_none(home, content):
    """A disk that was full, or somebody's editor, must not keep a model from being served."""
    file = CheckFile({"model": "a"})
    file.write(CHECKS)
    file.path.write_text(content, encoding="latin-1")

    assert file.read() is None
    file.write(replace(CHECKS, mode="native"))
    assert file.read().mode == "native"


def test_a_place_that_cannot_be_written_is_no_end(monkeypatch, tmp_path):
    """Containers often have a root that is only read."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept_checks, "default_cache_home", lambda: tmp_path / "file")
    CheckFile({}).write(CHECKS)

    assert CheckFile({}).read() is None
