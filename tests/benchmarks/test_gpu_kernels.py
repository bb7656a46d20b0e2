"""The check of attention's kernels, rehearsed: what runs once on a borrowed GPU must run."""

import pytest

from benchmarks.gpu import kernels


def test_every_kind_of_attention_is_right_against_float64():
    """The same rows as on a GPU, from its own reference."""
    rows = kernels.check("cpu", rehearse=True)

    assert len(rows) == 6
    assert [row["name"] for row in rows if not row["is_right"]] == []


def test_a_wrong_kernel_shows(monkeypatch):
    """A check that nothing can fail is none."""
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *step, **options: attend(*step, **options) * 1.1)
    monkeypatch.setattr(kernels, "_REHEARSED", kernels._REHEARSED[:1])
    rows = kernels.check("cpu", rehearse=True)

    assert [row["error"] for row in rows] == [pytest.approx(0.1, abs=0.03)] * 2
    assert not any(row["is_right"] for row in rows)


def test_times_decodes_prompts_and_writes():
    """Figures of an interpreter mean nothing, but each is there."""
    rows = kernels.speed("cpu", rehearse=True, bandwidth=1.0)

    assert [row["name"].split()[0] for row in rows] == ["decode"] * 4 + ["prompt"] * 2 + ["store"]
    assert all(row["µs"] > 0 for row in rows)
