"""The check of everything that needs a GPU, where there is none: it must be right before it is run on one."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import BenchmarkError
from benchmarks.figures import Answer
from benchmarks.gpu import models, peers, where
from benchmarks.gpu.given import IN_PROCESS, PEER, SERVED, Given
from benchmarks.gpu.jobs import Job, run_jobs
from benchmarks.gpu.report import Results, goals, markdown
from benchmarks.gpu.shapes import REHEARSED, SHAPES, serving_folder
from benchmarks.gpu.steady import Steady, jobs_of
from benchmarks.setting import ROOT

SETTING = {"date": "2026-11-30T12:00:00+00:00", "device": "NVIDIA H200"}


def decoding(way: str, batch: int, step_ms: float, **more: object) -> dict:
    """A row of a model whose step reads 16 GB."""
    return {
        "part": "transformers" if way == PEER else "models", "model": "8B", "way": way, "batch": batch,
        "tokens_per_s": 1000 * batch / step_ms, "step_ms": step_ms, "step_bytes": 16_000_000_000, "idle_share": 0.01,
        "how": "sdpa, graphs",
    } | more  # fmt: skip


ROWS = [
    {"part": "ceilings", "what": "copy", "GB/s": 3900.0},
    {"part": "ceilings", "what": "read (sum)", "GB/s": 4000.0},
    decoding(IN_PROCESS, 1, 4.5),
    decoding(IN_PROCESS, 64, 5.0),
    decoding(IN_PROCESS, 256, 50.0),  # what no goal is about
    decoding(SERVED, 1, 4.6),
    decoding(SERVED, 64, 5.2, idle_share=0.03),
    decoding(PEER, 1, 9.0),
    decoding(PEER, 1, 8.0, how="sdpa, its own choice"),
    {"part": "models", "model": "8B", "way": "memory", "over_budget": 0.01},
    {"part": "tests", "passed": 12, "failed": 0, "skipped": 0},
    {"part": "kernels", "name": "norm", "error": 2e-8, "limit": 1e-6, "is_right": True},
    {"part": "kernels", "name": "product", "error": 0.2, "limit": 1e-2, "is_right": False},
    {"part": "kernel speed", "name": "decode", "GB/s": 3600.0},
    {"part": "kernel speed", "name": "prompt", "TFLOP/s": 400.0, "took_s": 3.0},
    {"part": "kernels", "failure": "it had 60 s and was not done"},
]


def found(rows: list[dict]) -> dict[str, tuple[str, bool | None]]:
    return {goal.what: (goal.found, goal.is_met) for goal in goals(Results(rows))}


def given(folder: Path, shape: str = "") -> Given:
    return Given("cpu", True, "torch", folder, shape)


def test_the_steady_part_begins_with_the_last_first_token_and_ends_with_the_first_last_one():
    """Prompts and stragglers would make decoding look slower or faster than it is."""
    early = Answer(10, 0.0, [(1.0, 1), (2.0, 1), (3.0, 2), (4.0, 1)])
    late = Answer(20, 0.0, [(2.0, 1), (3.0, 1), (4.0, 1), (5.0, 1)])
    steady = Steady.of([early, late])

    assert (steady.began_s, steady.ended_s, steady.token_count) == (2.0, 4.0, 5)
    assert steady.mean_context == pytest.approx((12 + 13 + 14 + 21 + 22) / 5)
    assert steady.tokens_per_s == 2.5
    assert steady.share_of([early, late]) == 0.4
    with pytest.raises(BenchmarkError, match="more output tokens"):
        Steady.of([Answer(1, 0.0, [(1.0, 1)]), Answer(1, 0.0, [(2.0, 1)])])


def test_goals_are_judged_by_the_worst_of_what_they_are_about():
    """One batch size that misses it is a goal missed; a larger one that it does not name is not."""
    judged = found(ROWS)
    least = "8B, batch 1 to 64"

    assert judged[f"{least}: share of the bandwidth bound, in process ≥ 80.0%"] == ("88.9% · 80.0%", True)
    assert judged[f"{least}: share of the bandwidth bound, whole system ≥ 80.0%"] == ("87.0% · 76.9%", False)
    assert judged[f"{least}: executor idle ≤ 2.0%"][1] is False
    assert judged["peak memory over its budget ≤ 2.0%"] == ("1.0%", True)
    assert judged["kernels right against float64"] == ("1 of 2, not product", False)
    assert judged["tests that need a GPU"] == ("12 passed, 0 failed, 0 skipped", True)


def test_a_goal_without_all_of_its_figures_is_not_met():
    """What was left out must not count as good; the best way of the peer is what counts where there are several."""
    judged = found(ROWS)

    assert judged["8B, batch 1 to 64: times transformers' continuous batching, in process ≥ 1.50"] == ("1.78 · –", None)
    assert all(is_met is None for _, is_met in found([]).values())


def test_the_table_has_every_figure_in_its_place_and_says_what_is_missing():
    """It is what is kept; nobody will look into the log a month later."""
    table = markdown(Results(ROWS), SETTING)

    assert (
        "| 8B | 1 | 222 | 4.50 | 88.9% | 1.0% | 217 | 87.0% | 1.0% | 97.8% | 125 (sdpa, its own choice) | 1.78 |"
        in table
    )
    assert "| 8B | 64 | 12,800 | 5.00 | 80.0% | 1.0% | 12,308 | 76.9% | 3.0% | 96.2% | – | – |" in table
    assert "| kernels | it had 60 s and was not done |" in table
    assert "| name | GB/s | of the bandwidth |\n| --- | --- | --- |\n| decode | 3,600 | 90.0% |" in table
    assert "| name | TFLOP/s |\n| --- | --- |\n| prompt | 400 |" in table
    assert "| norm | 2e-08 | 1e-06 | True |" in table
    assert "device NVIDIA H200" in table
    assert "met" not in markdown(Results(ROWS), SETTING | {"rehearsal": True}).partition("## Goals")[2].split()


@pytest.mark.parametrize("name", list(REHEARSED))
def test_a_random_model_is_a_whole_serving_folder_of_its_shape(tmp_path, name):
    """The bandwidth bound stands on the bytes that a step reads; a wrong count would flatter or blame the executor."""
    shape = REHEARSED[name]
    model = AutoModelForCausalLM.from_pretrained(serving_folder(shape, tmp_path, "cpu"), dtype=torch.bfloat16)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    unread = 0 if shape.is_tied else model.get_input_embeddings().weight.numel()
    biases = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("bias"))

    assert shape.step_weight_bytes == 2 * (numbers - unread - biases)
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    assert serving_folder(shape, tmp_path, "cpu") == tmp_path / name  # made once


def test_the_shapes_are_as_large_as_their_names():
    """0.5, 3 and 8 billion, the table of tokens included."""
    sizes = {name: shape.step_weight_bytes / 2e9 for name, shape in SHAPES.items()}

    assert sizes == pytest.approx({"8B": 7.50, "3B": 3.21, "0.5B": 0.49}, rel=0.01)
    assert SHAPES["8B"].token_cache_bytes == 128 << 10


def test_prompts_share_nothing():
    """What is in the cache already would not be computed."""
    prompts = [tuple(job.prompt[:4]) for way in ("one", "other") for job in jobs_of(16, 8, 1, 1000, way)]

    assert len(set(prompts)) == len(prompts)


def test_a_model_decodes_in_process_and_through_the_whole_system(tmp_path):
    """The two ways in which figures are made, each with real processes around it, at every batch size."""
    rows: list[dict] = []
    models.run(given(tmp_path, "8B"), rows.append)

    assert [(row["way"], row.get("batch")) for row in rows if row["way"] != "step"] == [
        ("start", None), (IN_PROCESS, 1), (IN_PROCESS, 3), (SERVED, 1), (SERVED, 3),
    ]  # fmt: skip
    assert rows[0]["mode"] == "packed"
    assert all(row["kernel"] and row["µs a step"] > 0 for row in rows if row["way"] == "step")
    for row in rows[1:5]:
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["step_ms"], rel=1e-3)
        assert row["step_bytes"] > REHEARSED["8B"].step_weight_bytes
        assert 6 < row["context"] < 11
        assert 0 <= row["idle_share"] <= 1


def test_transformers_decodes_the_same_models(tmp_path):
    """Its manager changes from release to release; without this it would fail on the GPU first."""
    rows: list[dict] = []
    peers.run(given(tmp_path, "0.5B"), rows.append)

    assert [(row["how"], row["batch"]) for row in rows] == [
        ("sdpa, graphs", 1), ("sdpa, graphs", 3), ("sdpa, its own choice", 1), ("sdpa, its own choice", 3),
    ]  # fmt: skip
    assert all(row["way"] == PEER and row["tokens_per_s"] > 0 for row in rows)


def test_what_fails_or_has_no_time_is_a_row_and_the_others_go_on(tmp_path):
    """Eight minutes on a GPU are precious: one part that hangs must not take the figures of all others with it."""
    log = tmp_path / "log.txt"
    jobs = [Job("nothing"), Job("tests", limit_s=0.01)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def told(ends_at: float) -> dict[str, str]:
        ran = run_jobs(jobs, given(tmp_path), environment, log, ends_at)
        return {job.name: rows[-1]["failure"] for job, rows in ran}

    assert told(time.monotonic() + 600) == {"nothing": "KeyError: 'nothing'", "tests": "it had 0 s and was not done"}
    assert told(0.0) == dict.fromkeys(["nothing", "tests"], "left out: 0 s were left")


def test_without_a_gpu_it_says_so_and_what_to_do(tmp_path):
    """A table without figures would look like a run."""
    with pytest.raises(BenchmarkError, match=r"sees no GPU.*--rehearse"):
        where.run(replace(given(tmp_path), device="cuda", rehearse=False), lambda _row: None)


def test_what_the_packaging_files_ask_for_and_is_not_there_is_named(monkeypatch):
    """On a machine that reaches no registry, each round of finding out what is missing costs minutes of its GPU."""
    monkeypatch.setattr(where, "_version", {"structlog": None, "grpcio": "1.60.0"}.get)

    assert {"structlog<27,>=25 (here: none)", "grpcio<2,>=1.81 (here: 1.60.0)"} <= set(where.unmet())


def test_a_rehearsal_of_the_script_leaves_its_table_and_figures(tmp_path):
    """The same command as on a GPU, with a flag."""
    words = ["--rehearse", "--only", "ceilings", "--output", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "benchmarks/gpu_check.sh", *words], env=environment, capture_output=True, text=True)
    made = json.loads((tmp_path / "results.json").read_text())

    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["what"] for row in made["rows"]] == ["copy", "read (sum)", "bf16 product"]
    assert {"date", "torch", "transformers", "python", "rehearsal"} <= set(made["setting"])
    assert (tmp_path / "table.md").read_text() in done.stdout
