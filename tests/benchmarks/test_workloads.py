"""The work that everything is measured with."""

import pytest

from benchmarks import BenchmarkError
from benchmarks.wanted import Work
from benchmarks.workloads import poisson, workload


@pytest.mark.parametrize("name", ["W1", "W2", "W4"])
def test_the_same_seed_is_the_same_work_and_another_one_is_not(name):
    """Figures of two servers, or of two days, are of the same requests; turns must not find each other's cache."""
    assert workload(name, 3) == workload(name, 3)
    assert workload(name, 3).jobs[0].prompt != workload(name, 4).jobs[0].prompt


def test_workloads_have_the_promised_shapes():
    """The shapes are published with the figures."""
    w1, w2, w4 = (workload(name, 1).jobs for name in ("W1", "W2", "W4"))

    assert len(w1) == len(w2) == 64
    assert {16 <= len(job.prompt) <= 512 and 16 <= job.output_count <= 128 for job in w1} == {True}
    assert {(len(job.prompt), job.output_count) for job in w2} == {(544, 32)}
    assert len({tuple(job.prompt[:512]) for job in w2}) == 1
    assert len({tuple(job.prompt) for job in w2}) == 64
    assert [(len(job.prompt), job.output_count) for job in w4] == [(128, 128)]


def test_w3_comes_at_its_rate_with_prompts_of_its_own():
    """It is as long as W1, which runs before it: what W1 left in the cache must not help."""
    w1, w3 = workload("W1", 5), poisson(4.0, 5)
    arrivals = [job.arrival_s for job in w3.jobs]

    assert poisson(4.0, 5) == w3
    assert [len(job.prompt) for job in w3.jobs] == [len(job.prompt) for job in w1.jobs]
    assert not {tuple(job.prompt[:16]) for job in w3.jobs} & {tuple(job.prompt[:16]) for job in w1.jobs}
    assert arrivals == sorted(arrivals)
    assert 64 / arrivals[-1] == pytest.approx(4.0, rel=0.5)


def test_tokens_stay_within_a_small_vocabulary():
    """Models for tests know a few hundred tokens, and servers refuse others."""
    made = workload("W1", 1).within(257)

    assert max(token for job in made.jobs for token in job.prompt) < 257
    assert [len(job.prompt) for job in made.jobs] == [len(job.prompt) for job in workload("W1", 1).jobs]


def test_w3_runs_after_w1_also_where_it_is_wanted_alone():
    """Its rate is a share of what W1 went at on this very server."""
    assert Work(("W3",)).in_order() == ("W1", "W3")
    assert Work(("W3",), rate=2.0).in_order() == ("W3",)
    with pytest.raises(BenchmarkError, match="give a rate"):
        Work(("W3",)).of_turn("W3", 0, 257)
