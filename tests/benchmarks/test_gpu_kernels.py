"""The check of attention's kernels, rehearsed: what runs once on a borrowed GPU must run."""

import pytest

from benchmarks.gpu import kernels, layer_checks
from benchmarks.gpu.given import Given


def test_every_kind_of_attention_is_right_against_float64():
    """The same rows as on a GPU, from its own reference."""
    rows = list(kernels.check("cpu", rehearse=True))

    assert len(rows) == 6
    assert [row["name"] for row in rows if not row["is_right"]] == []


def test_a_wrong_kernel_shows(monkeypatch):
    """A check that nothing can fail is none."""
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *step, **options: attend(*step, **options) * 1.1)
    monkeypatch.setattr(kernels, "_REHEARSED", kernels._REHEARSED[:1])
    rows = list(kernels.check("cpu", rehearse=True))

    assert [row["error"] for row in rows] == [pytest.approx(0.1, abs=0.03)] * 2
    assert not any(row["is_right"] for row in rows)


def test_times_decodes_prompts_and_writes():
    """Figures of an interpreter mean nothing, but each is there."""
    rows = list(kernels.speed("cpu", rehearse=True))

    assert [row["name"].split()[0] for row in rows] == ["decode"] * 4 + ["prompt"] * 2 + ["store"]
    assert all(row["µs"] > 0 for row in rows)


def test_kernels_of_layers_and_sampling_are_right_and_timed(tmp_path):
    """Beside attention they are all that a step launches of our own."""
    checked: list[dict] = []
    timed: list[dict] = []
    given = Given("cpu", True, "triton", tmp_path)
    layer_checks.check(given, checked.append)
    layer_checks.speed(given, timed.append)

    assert [row["name"] for row in checked if not row["is_right"]] == []
    assert len(checked) == 2 * 7 + 6 + 1
    assert len(timed) == 1
    assert all(value > 0 for name, value in timed[0].items() if name.endswith("µs"))
