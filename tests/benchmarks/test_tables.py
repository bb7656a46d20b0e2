"""The table that people read."""

import io
from typing import Any

from rich.console import Console

from benchmarks.figures import Answer, Figures, run_json
from benchmarks.tables import how_it_runs, results_table


def run(runner: str, turn: int, seconds: float) -> dict[str, Any]:
    figures = Figures.of([Answer(10, 0.0, [(seconds / 2, 50), (seconds, 50)])])
    facts = {"server": "paceline", "mode": "serve", "workload": "W1", "dtype": "float32", "threads": 2}
    return run_json(
        figures, runner=runner, turn=turn, peak_mib={"executor": None, "scheduler": 91.2}, start_s=1, **facts
    )


def printed(runs: list[dict[str, Any]]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(results_table(runs, "title"))
    return console.export_text()


def test_one_server_has_a_row_of_medians_and_no_ratio():
    """Nothing to compare with; what is not known is not shown as 0."""
    shown = printed([run("native", turn, seconds) for turn, seconds in enumerate((1.0, 2.0, 10.0))])

    assert "C++ fp32 ×2" in shown
    assert "50.0" in shown  # 100 tokens in the 2 s of the turn between
    assert "ratio" not in shown
    assert "–" in shown


def test_rounded_weights_are_not_shown_as_the_type_of_the_steps():
    """A figure of int8 beside one of bfloat16 must not look like the same work."""
    assert how_it_runs("native", "bfloat16 with int8 weights", 2) == "C++ int8 in bf16 ×2"


def test_the_ratio_is_of_runs_in_the_same_turn():
    """A machine that is slow for one turn is slow for both sides; medians of sides would mix turns."""
    native = [run("native", turn, seconds) for turn, seconds in enumerate((1.0, 5.0, 2.0))]
    torch = [run("packed", turn, seconds) for turn, seconds in enumerate((3.0, 20.0, 4.0))]

    assert "3.00" in printed(native + torch)  # of 3, 4 and 2
