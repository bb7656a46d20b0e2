"""Which processes `paceline serve` runs."""

from __future__ import annotations

from pathlib import Path

from paceline_cli.children import Machine, autoscaler_child, executor_children, scheduler_child
from paceline_cli.serve import readable

MEMORY = 8 << 30
SETTINGS = {
    "threads": 0,
    "device": "auto",
    "tensor_parallel": 1,
    "memory_utilization": 0.9,
    "cache_memory_bytes": 0,
    "lease_s": 2.0,
    "max_num_seqs": 8,
}


def flag_of(command: tuple[str, ...], name: str) -> str:
    """The value that a command line gives a flag."""
    return command[command.index(name) + 1]


def children(count: int, machine: Machine, **more) -> list[tuple[str, ...]]:
    """Command lines of `count` executors."""
    commands = executor_children("fake", Path("/run/x"), count, SETTINGS | more, machine)
    return [child.command for child in commands]


def test_executors_join_the_scheduler_where_it_listens():
    """They are wired by command line alone, so a restarted one finds its place again."""
    scheduler = scheduler_child("fake", Path("/run/x"), "127.0.0.1:50051", SETTINGS).command
    first, second = children(2, Machine(8, (), MEMORY))

    listening = [scheduler[i + 1] for i, word in enumerate(scheduler) if word == "--listen"]
    assert listening == ["unix:/run/x/scheduler.sock", "127.0.0.1:50051"]
    assert flag_of(first, "--scheduler") == flag_of(second, "--scheduler") == listening[0]
    assert flag_of(first, "--listen") != flag_of(second, "--listen")
    assert flag_of(first, "--executor-id") == "executor-0"
    assert flag_of(scheduler, "--lease") == "2.0"
    assert flag_of(first, "--max-num-seqs") == "8"


def test_the_autoscaler_finds_the_scheduler_and_the_launcher():
    """It owns no process and knows no machine: everything it does goes through the two."""
    command = autoscaler_child(Path("/run/x/scaling.yaml"), Path("/run/x")).command

    assert command[command.index("autoscaler") :][:3] == ("autoscaler", "run", "/run/x/scaling.yaml")
    assert flag_of(command, "--scheduler") == "unix:/run/x/scheduler.sock"
    assert flag_of(command, "--launcher") == "unix:/run/x/launcher.sock"
    assert command[-1] == "--exit-with-parent"


def test_an_executor_may_finish_what_runs_before_it_is_killed():
    """Its own drain time-out comes first."""
    (child,) = executor_children("fake", Path("/run/x"), 1, SETTINGS | {"drain_timeout_s": 7.0}, Machine(8, (), MEMORY))

    assert child.end_within_s > 7.0


def test_several_executors_share_the_memory_that_one_would_take():
    """Each on its own would take a quarter of what is free: four of them all of it."""
    commands = children(4, Machine(8, (), MEMORY))

    assert [flag_of(command, "--cache-memory") for command in commands] == [str((2 << 30) // 4)] * 4
    assert flag_of(children(4, Machine(8, (), MEMORY), cache_memory_bytes=1 << 20)[0], "--cache-memory") == str(1 << 20)


def test_several_executors_share_the_cores():
    """Each taking all of them makes every one of them slow."""
    assert [flag_of(command, "--threads") for command in children(4, Machine(8, (), MEMORY))] == ["2"] * 4
    assert [flag_of(command, "--threads") for command in children(4, Machine(2, (), MEMORY))] == ["1"] * 4
    assert [flag_of(command, "--threads") for command in children(2, Machine(8, (), MEMORY), threads=3)] == ["3"] * 2


def gpus_of(count: int, machine: Machine, **more) -> list[str | None]:
    """What each of `count` executors sees."""
    placed = executor_children("fake", Path("/run/x"), count, SETTINGS | more, machine)
    return [child.environment.get("CUDA_VISIBLE_DEVICES") for child in placed]


def test_an_executor_alone_decides_for_itself():
    """It knows its device better than the supervisor does; it only leaves the other GPUs to others."""
    (command,) = children(1, Machine(8, ("0", "1"), MEMORY))

    assert flag_of(command, "--threads") == "0"
    assert flag_of(command, "--device") == "auto"
    assert flag_of(command, "--gpu-memory-utilization") == "0.9"
    assert gpus_of(1, Machine(8, ("0", "1"), MEMORY)) == ["0"]
    assert gpus_of(1, Machine(8, (), MEMORY)) == [None]


def test_several_executors_spread_over_the_gpus():
    """Each sees its own alone, as `cuda:0`. Two on one GPU would each take nine tenths of its memory."""
    machine = Machine(8, ("GPU-a", "MIG-b"), MEMORY)
    commands = children(3, machine)

    assert gpus_of(3, machine) == ["GPU-a", "MIG-b", "GPU-a"]
    assert [flag_of(command, "--device") for command in commands] == ["cuda"] * 3
    assert [flag_of(command, "--gpu-memory-utilization") for command in commands] == ["0.45", "0.9", "0.45"]


def test_ranks_of_an_executor_have_gpus_beside_each_other():
    """Neighbours in the driver's list are mostly those with the shortest way between them."""
    machine = Machine(8, ("0", "1", "2", "3"), MEMORY)

    assert gpus_of(2, machine, tensor_parallel=2) == ["0,1", "2,3"]
    assert flag_of(children(2, machine, tensor_parallel=2)[1], "--tensor-parallel") == "2"


def test_a_gpu_that_the_user_names_is_for_all_executors():
    """They are not placed then, and divide its memory."""
    commands = children(2, Machine(8, (), MEMORY), device="cuda:1")

    assert gpus_of(2, Machine(8, (), MEMORY), device="cuda:1") == [None, None]
    assert [flag_of(command, "--device") for command in commands] == ["cuda:1", "cuda:1"]
    assert [flag_of(command, "--gpu-memory-utilization") for command in commands] == ["0.45", "0.45"]


def test_only_executors_that_may_take_any_gpu_are_placed(monkeypatch):
    """A CPU needs no GPU, and no model none; asking the driver takes seconds on some machines."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    assert Machine.here("model", "auto").gpus == Machine.here("model", "cuda").gpus == ("0", "1")
    assert Machine.here("model", "cpu").gpus == Machine.here("model", "cuda:1").gpus == ()
    assert Machine.here("fake", "auto").gpus == ()


def test_log_lines_of_children_are_readable():
    """They write JSON, because they do not write to a terminal."""
    assert readable('{"event": "joined [x]", "level": "info", "service": "executor", "lease_ms": 5000}') == (
        "[default]joined \\[x][/] [dim]lease_ms=5000[/]"
    )
    assert readable("plain [text]") == "plain \\[text]"
    assert readable("[1, 2]") == "[1, 2]"
