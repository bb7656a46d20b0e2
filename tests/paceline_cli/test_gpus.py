"""Which GPUs there are, and which executor gets which; with an `nvidia-smi` that is a script."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline_cli import gpus
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.gpus import gpus_of_executors, unused_gpus_hint, visible_gpus
from paceline_cli.main import app


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a program of that name first on the PATH; nothing says otherwise which GPUs there are."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


def test_gpus_are_what_the_driver_lists(nvidia_smi):
    """By UUID: index 0 of nvidia-smi is the first slot, and index 0 of CUDA the fastest GPU."""
    nvidia_smi(
        '[ "$*" = "--query-gpu=index,uuid --format=csv,noheader" ] || exit 2\n'
        'echo "0, GPU-5d1f0b3c-aa"; echo "1, GPU-77e2c9f0-bb"'
    )

    assert visible_gpus() == ("GPU-5d1f0b3c-aa", "GPU-77e2c9f0-bb")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("0,2", ("0", "2")),
        ("GPU-5d1f0b3c-aa, MIG-77e2c9f0-bb", ("GPU-5d1f0b3c-aa", "MIG-77e2c9f0-bb")),
        ("1,-1,0", ("1",)),  # as CUDA reads it
        ("", ()),
        ("NoDevFiles", ()),
    ],
)
def test_gpus_that_somebody_has_chosen_are_passed_on_as_they_are(nvidia_smi, monkeypatch, named, expected):
    """On a shared machine the others are not ours, whatever the driver lists."""
    nvidia_smi('echo "0, GPU-00000000-00"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)

    assert visible_gpus() == expected


@pytest.mark.parametrize("script", ["echo 'NVIDIA-SMI has failed'; exit 9", "echo 'No devices were found'"])
def test_a_driver_that_lists_nothing_leaves_the_device_files(nvidia_smi, monkeypatch, script):
    """Containers may have GPUs and a driver that does not tell (`NVIDIA_DRIVER_CAPABILITIES=compute`)."""
    nvidia_smi(script)
    monkeypatch.setattr(gpus, "_in_dev", lambda: ("0", "1"))

    assert visible_gpus() == ("0", "1")


def test_each_executor_has_a_gpu_of_its_own_while_there_are_some():
    """Two on one GPU while another idles would be half as fast."""
    assert gpus_of_executors(("a", "b"), 2, 1) == [("a",), ("b",)]
    assert gpus_of_executors(("a", "b"), 3, 1) == [("a",), ("b",), ("a",)]


def test_executors_with_several_gpus_share_none():
    """Ranks of two executors on one GPU would wait for each other in every layer."""
    assert gpus_of_executors(("a", "b", "c", "d", "e"), 2, 2) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("executor_count", "gpus_each", "message", "remedy"),
    [
        (
            3,
            2,
            "3 executors with --tensor-parallel 2 need 3 x 2 = 6 GPUs, and there are 4 (a, b, c, d)",
            "at most 2 exe",
        ),
        (
            2,
            4,
            "2 executors with --tensor-parallel 4 need 2 x 4 = 8 GPUs, and there are 4 (a, b, c, d)",
            "at most 1 exe",
        ),
        (1, 8, "1 executor with --tensor-parallel 8 need 1 x 8 = 8 GPUs, and there are 4 (a, b, c, d)", "to 4 or less"),
    ],
)
def test_too_few_gpus_are_refused_with_the_arithmetic(executor_count, gpus_each, message, remedy):
    """Found out here it costs a second; found out by an executor, the loading of a large model."""
    with pytest.raises(CommandError) as refused:
        gpus_of_executors(("a", "b", "c", "d"), executor_count, gpus_each)

    assert refused.value.message == message
    assert remedy in refused.value.what_to_do
    assert refused.value.exit_code == ExitCode.USAGE


def test_gpus_that_nobody_uses_are_mentioned_where_somebody_could():
    """Whoever has four GPUs and starts one executor may not know that it takes one."""
    assert unused_gpus_hint(4, 1, 1, "--executors") == "1 of 4 GPUs is used; --executors 4 uses 4"
    assert unused_gpus_hint(5, 1, 2, "--executors") == "2 of 5 GPUs are used; --executors 2 uses 4"
    assert unused_gpus_hint(4, 4, 1, "--executors") == unused_gpus_hint(5, 2, 2, "--executors") == ""
    assert unused_gpus_hint(0, 2, 1, "--executors") == ""


def test_serve_refuses_more_than_there_is_before_it_prepares_anything(nvidia_smi):
    """The command line is wrong at once, and not when a model of hundreds of gigabytes has been downloaded."""
    nvidia_smi("for gpu in 0 1 2 3; do echo $gpu, GPU-$gpu; done")
    words = ["serve", "org/not-there", "--executors", "3", "--tensor-parallel", "2"]

    refused = CliRunner().invoke(app, words, prog_name="paceline")

    assert refused.exit_code == ExitCode.USAGE
    said = " ".join(refused.output.split())
    assert "3 x 2 = 6 GPUs, and there are 4 (GPU-0, GPU-1, GPU-2, GPU-3)" in said
    assert "run at most 2 executors" in said
