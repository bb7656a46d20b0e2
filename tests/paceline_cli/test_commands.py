"""The command line: what it says, what it refuses, with which exit code it leaves."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from typing import Any

import grpc
import pytest
import typer
from typer.testing import CliRunner

from executor_svc.config import ExecutorConfig
from paceline import InvalidRequest, Overloaded, ServerError, TimedOut, Unavailable
from paceline.v1.fleet_pb2 import ExecutorCapacity, LayerGroup
from paceline_cli.config_flags import flags_for
from paceline_cli.errors import ExitCode, command_error
from paceline_cli.main import app
from paceline_cli.readiness import cache_token_count
from paceline_cli.sizes import format_size, parse_size
from scheduler_svc.config import SchedulerConfig, trace_receiver
from tests.paceline_cli.conftest import REPOSITORY

VERBS = ("serve", "scheduler", "executor", "prepare", "generate", "chat", "health", "fleet", "replay", "bench")


def paceline(*words: str, **more: Any) -> Any:
    """Run the command in this process."""
    return CliRunner().invoke(app, list(words), prog_name="paceline", **more)


def words(result: Any) -> str:
    """What it printed, without the frames and the line breaks of a terminal."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb):
    """Help is where people learn a command; an example says more than a list of flags."""
    result = paceline(verb, "--help")

    assert result.exit_code == ExitCode.OK
    assert f"$ paceline {verb}" in result.output or f"| paceline {verb}" in result.output


def test_the_help_lists_the_exit_codes():
    """Scripts decide by them."""
    result = paceline("--help")

    assert result.exit_code == ExitCode.OK
    assert "Exit codes" in result.output


def test_the_release_needs_no_verb():
    """The first line of every report of a mistake."""
    result = paceline("--version")

    assert result.exit_code == ExitCode.OK
    assert re.fullmatch(r"paceline \S+\n", result.output)


def test_a_log_level_that_is_none_is_refused_before_anything_starts():
    """Otherwise the children die of it, which looks like a failure of the server."""
    result = paceline("serve", "fake", "--log-level", "loud")

    assert result.exit_code == ExitCode.USAGE
    assert "'loud'" in result.output
    assert "Starting" not in result.output


def test_the_command_starts_without_the_heavy_libraries():
    """`paceline --help` and the scheduler's container must not import torch, and need not wait for gRPC."""
    script = "import sys, paceline_cli.main; print(*(name.partition('.')[0] for name in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    ).stdout.split()

    assert not {"torch", "transformers", "tokenizers", "grpc", "numpy"} & set(loaded)


@pytest.mark.parametrize(
    ("text", "byte_count"),
    [
        ("2GiB", 2 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("8g", 8 * 2**30),
        ("1048576", 2**20),
    ],
)
def test_sizes_are_read_as_people_write_them(text, byte_count):
    """Nobody should have to count zeros."""
    assert parse_size(text) == byte_count


@pytest.mark.parametrize("text", ["", "much", "2 gibbons", "-1GiB"])
def test_a_size_that_is_none_is_wrong_usage(text):
    """The message shows what a size looks like."""
    with pytest.raises(typer.BadParameter, match="2GiB"):
        parse_size(text)

    assert paceline("executor", "fake", "--cache-memory", text).exit_code == ExitCode.USAGE


def test_sizes_are_shown_as_people_read_them():
    """Bytes in tens of digits say nothing."""
    assert [format_size(size) for size in (0, 512, 1536, 2 * 2**30)] == ["0 B", "512 B", "1.5 KiB", "2 GiB"]


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("scheduler", SchedulerConfig(model="fake", listen=("unix:/tmp/a.sock", "127.0.0.1:0"), lease_s=7.5)),
        ("executor", ExecutorConfig("fake", weights="int8", cache_memory_bytes=2**20, executor_id="e-3", threads=2)),
    ],
)
def test_a_configuration_survives_the_command_line(verb, config, monkeypatch):
    """`paceline serve` hands its settings to children this way: a flag that got lost would be a setting ignored."""
    served = []
    module = type(sys)(f"{verb}_svc.main")
    module.serve = lambda config, *_: served.append(config) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"{verb}_svc.main", module)

    result = paceline(verb, "fake", *flags_for(config))

    assert result.exit_code == ExitCode.OK, result.output
    assert served == [config]


def test_flags_can_be_set_in_the_environment(monkeypatch):
    """Containers are configured this way."""
    served = []
    module = type(sys)("executor_svc.main")
    module.serve = lambda config, *_: served.append(config) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "executor_svc.main", module)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)

    paceline("executor", env={"PACELINE_MODEL": "fake", "PACELINE_MAX_NUM_SEQS": "9", "PACELINE_CACHE_MEMORY": "1GiB"})

    assert served == [ExecutorConfig(model="fake", max_num_seqs=9, cache_memory_bytes=2**30)]


@pytest.mark.parametrize(
    ("variable", "value", "flag"),
    [
        ("PACELINE_MAX_NUM_SEQS", "zero", "--max-num-seqs"),
        ("PACELINE_LOG_LEVEL", "loud", "--log-level"),
        ("PACELINE_CACHE_MEMORY", "much", "--cache-memory"),
    ],
)
def test_a_wrong_value_in_the_environment_is_refused_by_the_name_of_its_variable(variable, value, flag):
    """Who has not typed the flag looks for it in vain."""
    of_variable = paceline("serve", "fake", env={variable: value})
    of_flag = paceline("serve", "fake", flag, value)

    assert of_variable.exit_code == of_flag.exit_code == ExitCode.USAGE
    assert f"{variable} in the environment, which is {flag}" in words(of_variable)
    assert variable not in of_flag.output


def test_a_refusal_by_a_service_is_wrong_usage(monkeypatch):
    """A supervisor must not try settings again that contradict each other."""

    def refuse(*_):
        raise ValueError("--block-size must be a power of two, got 24; take 16 or 32")

    module = type(sys)("executor_svc.main")
    module.serve = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "executor_svc.main", module)

    result = paceline("executor", "fake")

    assert result.exit_code == ExitCode.USAGE
    assert "power of two, got 24" in result.output
    assert "take 16 or 32" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"])
@pytest.mark.parametrize("verb", ["scheduler", "serve"])
def test_a_wrong_receiver_of_traces_in_the_environment_is_refused_by_its_name(verb, name):
    """That traces went nowhere shows when they are needed; who set the variable may have meant another program."""
    result = paceline(verb, "fake", env={name: "collector:4317"})

    assert result.exit_code == ExitCode.USAGE
    assert f"{name} is 'collector:4317', which is no receiver of traces" in " ".join(result.output.split())
    assert "http://HOST:4317" in result.output


def test_a_receiver_of_traces_that_is_named_goes_before_the_environment(monkeypatch):
    """What does not count is not checked: it may be right for others."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")
    named = SchedulerConfig(model="fake", otlp_endpoint="http://here:4317")

    assert trace_receiver(named) == "http://here:4317"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://there:4317/")
    assert trace_receiver(SchedulerConfig(model="fake")) == "https://there:4317/"
    assert paceline("scheduler", "fake", "--otlp-endpoint", "here").exit_code == ExitCode.USAGE


def test_a_folder_that_is_none_says_how_to_make_one():
    """The most likely first mistake."""
    result = paceline("executor", "nowhere")

    assert result.exit_code == ExitCode.USAGE
    assert "paceline prepare" in result.output


def test_a_port_in_use_is_named_before_anything_starts():
    """Finding out after a model was loaded would be late."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = paceline("serve", "fake", "--port", str(port))

    assert result.exit_code == ExitCode.FAILED
    assert f"port {port} is in use" in result.output
    assert "--port" in result.output


def test_a_port_of_the_status_page_in_use_is_named_before_anything_starts():
    """The scheduler would die of it, and be started again in vain."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = paceline("serve", "fake", "--port", "0", "--http-port", str(port))
    twice = paceline("serve", "fake", "--port", str(port), "--http-port", str(port))

    assert taken.exit_code == ExitCode.FAILED
    assert f"port {port} is in use on 127.0.0.1" in taken.output
    assert "--http-port -1 picks a free one" in taken.output
    assert twice.exit_code == ExitCode.USAGE
    assert f"--port and --http-port are both {port}" in twice.output


@pytest.mark.parametrize(
    ("more", "page_host"), [((), "0.0.0.0"), (("--http-host", "127.0.0.1"), "127.0.0.1")], ids=["unset", "set"]
)
def test_the_status_page_is_where_the_service_is_unless_it_is_kept_private(monkeypatch, more, page_host):
    """It has no password: who opens the service to everybody may not want to show who asks what."""
    served = []
    monkeypatch.setattr("paceline_cli.serve._run", lambda *args: served.append(args))
    result = paceline("serve", "fake", "--host", "0.0.0.0", "--port", "0", "--http-port", "-1", *more)

    assert result.exit_code == ExitCode.OK, result.output
    ((_, _, public, *_, settings),) = served
    assert (public[0], settings["http_host"]) == ("0.0.0.0", page_host)
    assert settings["http_port"] > 0


def test_a_taken_port_of_a_service_is_one_error_and_no_line_of_grpc():
    """What gRPC prints names a file of its own and comes before the line that helps."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        command = [sys.executable, "-m", "paceline_cli", "scheduler", "fake", "--listen", address]
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    assert result.returncode == ExitCode.FAILED
    assert result.stderr.startswith(f"error: cannot listen on '{address}'"), result.stderr


def test_a_health_check_says_why_there_is_no_connection():
    """`Deadline Exceeded` is no reason: that nobody listens there is."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        result = paceline("health", f"127.0.0.1:{bound.getsockname()[1]}", "--timeout", "0.5")

    assert result.exit_code == ExitCode.UNREACHABLE
    assert "none came within 0.5 s (Connection refused" in words(result)


def test_no_server_is_exit_code_3():
    """A healthcheck and a script tell `not there` from `failed`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    assert paceline("health", address, "--timeout", "0.2").exit_code == ExitCode.UNREACHABLE


def test_a_prompt_and_a_file_of_prompts_exclude_each_other(tmp_path):
    """One of them would silently be ignored."""
    file = tmp_path / "prompts.txt"
    file.write_text("Once\n")

    assert paceline("generate").exit_code == ExitCode.USAGE
    assert paceline("generate", "Once", "--input", str(file)).exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("error", "exit_code", "remedy"),
    [
        (Unavailable("no", grpc.StatusCode.UNAVAILABLE), ExitCode.UNREACHABLE, "paceline serve"),
        (InvalidRequest("no", grpc.StatusCode.INVALID_ARGUMENT), ExitCode.REFUSED, "change the request"),
        (Overloaded("no", grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=2.0), ExitCode.REFUSED, "in 2 s"),
        (TimedOut("no", grpc.StatusCode.DEADLINE_EXCEEDED), ExitCode.FAILED, "--timeout"),
        (ServerError("no", grpc.StatusCode.INTERNAL, "r-1"), ExitCode.FAILED, "report it"),
        (KeyError("x"), ExitCode.FAILED, "--debug"),
    ],
)
def test_errors_become_an_exit_code_and_a_remedy(error, exit_code, remedy):
    """A script decides by the code, a person by the remedy."""
    reason = command_error(error)

    assert reason.exit_code == exit_code
    assert remedy in reason.what_to_do


def test_a_server_that_leaves_is_not_one_that_is_missing():
    """Who is told to start a server beside the one that just drains starts a second one."""
    leaving = "the scheduler is shutting down; retry with backoff"
    reason = command_error(Unavailable(leaving, grpc.StatusCode.UNAVAILABLE, "r-1"))

    assert (reason.message, reason.exit_code) == ("the scheduler is shutting down (request r-1)", ExitCode.UNREACHABLE)
    assert "try again in a moment" in reason.what_to_do
    assert "paceline serve" not in reason.what_to_do


@pytest.mark.parametrize(
    ("block_sizes", "token_count"), [((16,), 4800), ((16, 32), 3200), ((), 0)], ids=["one", "two groups", "unknown"]
)
def test_the_cache_is_told_in_tokens(block_sizes, token_count):
    """People think in tokens; each layer group has blocks of its own for the same tokens."""
    capacity = ExecutorCapacity(block_count=300, layer_groups=[LayerGroup(block_size=size) for size in block_sizes])

    assert cache_token_count(capacity) == token_count
