"""Figures from arrivals whose times are known."""

import json

import pytest

from benchmarks.figures import Answer, Figures, run_json

KEYS = {
    "server", "mode", "workload", "dtype", "runner", "threads", "turn", "requests", "prompt_tokens", "output_tokens",
    "seconds", "tokens_per_s", "first_token_ms", "between_tokens_ms", "peak_mib", "start_s",
}  # fmt: skip


def answer(asked_s: float, *arrivals: tuple[float, int]) -> Answer:
    made = Answer(10, asked_s)
    for when, count in arrivals:
        made.note(when, count)
    return made


def test_figures_follow_from_the_arrivals():
    """Everything that is published is worked out here; a mistake would flatter, or hide, every optimisation."""
    figures = Figures.of([answer(100.0, (100.1, 1), (100.2, 1), (100.5, 2)), answer(101.0, (101.3, 1), (102.0, 3))])

    assert (figures.request_count, figures.prompt_count, figures.output_count) == (2, 20, 8)
    assert figures.seconds == pytest.approx(2.0)
    assert figures.tokens_per_s == pytest.approx(4.0)
    assert figures.first_token_ms == {"p50": pytest.approx(200), "p99": pytest.approx(298)}
    assert figures.between_tokens_ms["p50"] == pytest.approx(300)  # of 100, 300 and 700


def test_a_message_without_tokens_is_no_arrival():
    """The last message of a stream often only says that it has ended."""
    assert answer(0.0, (1.0, 1), (2.0, 0)).gaps_s() == []


def test_one_token_has_nothing_between_tokens():
    """No figure is better than a wrong one."""
    assert Figures.of([answer(0.0, (1.0, 1))]).between_tokens_ms == {"p50": None, "p99": None}


def test_a_run_is_the_json_that_other_tools_read():
    """Peers are measured by scripts that write the same, and tables are made of all of them."""
    facts = {"server": "paceline", "mode": "serve", "workload": "W1", "dtype": "float32", "runner": "packed"}
    figures = Figures.of([answer(0.0, (1.0, 1))])
    run = run_json(figures, **facts, threads=2, turn=0, peak_mib={"executor": 1.0, "scheduler": None}, start_s=0.5)

    assert set(json.loads(json.dumps(run))) == KEYS
