"""How many executors the flags of `paceline serve` ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.scaling import ExecutorRange, executor_range


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((None, None, None), (1, 1)),
        ((3, None, None), (3, 3)),
        ((None, 0, 4), (0, 4)),
        ((None, None, 4), (1, 4)),
        ((None, 2, 2), (2, 2)),
    ],
)
def test_the_flags_give_the_fewest_and_the_most(flags, expected):
    """Only where the two differ there is something to decide, and an autoscaler."""
    wanted = executor_range(*flags, None)

    assert (wanted.min_count, wanted.max_count) == expected
    assert wanted.is_fixed == (expected[0] == expected[1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((2, 1, 3, None), "--executors is a fixed number and contradicts --min-executors"),
        ((2, None, 3, None), "contradicts --max-executors"),
        ((None, 3, 2, None), "at least 3 executors and at most 2"),
        ((None, 3, None, None), "--min-executors 3 says nothing about the most"),
        ((None, 0, None, Path("x")), "--min-executors contradicts --scaling"),
        ((None, None, 2, Path("x")), "--max-executors contradicts --scaling"),
        ((2, None, None, Path("x")), "--executors contradicts --scaling"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, said):
    """Whichever of the two won, somebody would wonder about the other."""
    with pytest.raises(CommandError) as refusal:
        executor_range(*flags)

    assert said in refusal.value.message
    assert refusal.value.what_to_do
    assert refusal.value.exit_code == ExitCode.USAGE


def test_without_a_file_of_the_users_one_is_written(tmp_path: Path):
    """The autoscaler reads its bounds from a file in any case."""
    path = ExecutorRange(0, 4).scaling_file_in(tmp_path)

    assert yaml.safe_load(path.read_text()) == {"executors": {"min": 0, "max": 4}}


def test_the_users_file_says_by_how_many_the_machine_is_divided(tmp_path: Path):
    """It is handed on as it is; an autoscaler is there even where it leaves no choice."""
    path = tmp_path / "mine.yaml"
    path.write_text("executors: {min: 2, max: 2}\n")
    wanted = executor_range(None, None, None, path)

    assert (wanted.min_count, wanted.max_count) == (2, 2)
    assert not wanted.is_fixed
    assert wanted.scaling_file_in(tmp_path) == path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ":1: must be a mapping that has at least executors"),
        ("executors: {min: 1}", ":1: executors: 'max' is missing"),
        ("executors: {max: 0}", "executors.max: Input should be greater than or equal to 1, got 0"),
        ("executors: {max: 100}", "executors.max is 100, one machine has at most 64"),
        ("executors: {min: 3, max: 2}", "min is 3 and max 2"),
        ("executors: {max: 3, mix: 1}", "executors.mix: there is no such setting; do you mean 'min' or 'max'?"),
        ("executors: {max: 3}\nactuator: {kind: keda}\nkeda: {}", "`paceline serve` starts its executors itself"),
        ("executors: {max: 3}\nnode_types: [{name: big}]", "node_types names 'big'"),
        ("executors: {", "no YAML"),
    ],
)
def test_a_file_without_a_usable_limit_is_refused(tmp_path: Path, content, said):
    """The shares of the executors are set when the first one starts."""
    path = tmp_path / "mine.yaml"
    path.write_text(content)

    with pytest.raises(CommandError) as refusal:
        executor_range(None, None, None, path)

    assert said in refusal.value.message
    assert refusal.value.exit_code == ExitCode.USAGE


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    """A typing error in a path is found before a model is prepared."""
    with pytest.raises(CommandError, match="cannot read"):
        executor_range(None, None, None, tmp_path / "nobody.yaml")
