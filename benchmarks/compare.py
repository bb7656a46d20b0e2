"""Paceline and other servers under the same work, in one run, so that the ratios are fair.

    .venv/bin/python -m benchmarks.compare --turns 3 --dtype bfloat16 --json comparison.json

One after the other, in turns: each alone on the machine, started anew and gone before the next one starts. Who fails is
reported, and the rest goes on. `--show FILE` prints the tables of an earlier run again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.comparison import problems, ratios, table
from benchmarks.peers.processes import end_session, last_lines, leave_nothing_behind
from benchmarks.setting import ROOT, in_words, setting
from benchmarks.workloads import NAMES

SERVERS = ("paceline", "vllm", "llama.cpp", "transformers")
DTYPES = ("bfloat16", "float32")
SLOW_LIMIT = 8  # requests of a way that takes minutes for all of them
TIME_LIMIT_S = 3600.0  # of one start of one server with all its workloads

Run = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One server in one way, and how a turn of it is run."""

    name: str
    command: list[str]  # prints runs as lines of JSON, or writes them to the file that RUNS stands for
    workloads: list[str]


RUNS = "{runs}"  # in a command: a file for runs


@dataclass(frozen=True)
class Turn:
    """What all are given in a turn."""

    given: argparse.Namespace
    model: Path
    dtype: str
    number: int

    def contenders(self) -> list[Contender]:
        """Who is asked for, in the order of the table."""
        makers = {"paceline": _paceline, "vllm": _vllm, "llama.cpp": _llama_cpp, "transformers": _transformers}
        found = [contender for name in self.given.servers for contender in makers[name](self)]
        return [contender for contender in found if contender.workloads]

    def peer(self, python: Path | str, name: str, way: str, workloads: list[str]) -> list[str]:
        """The command of one of the scripts in `peers`."""
        given = self.given
        command = [str(python), "-m", f"benchmarks.peers.{name}_peer", "--model", str(self.model), "--way", way]
        command += ["--dtype", self.dtype, "--threads", str(given.threads)]
        command += ["--seed", str(given.seed), "--turn", str(self.number)]
        command += ["--limit", str(given.limit)] if given.limit else []
        return [*command, "--workloads", *workloads]


def _paceline(turn: Turn) -> list[Contender]:
    given = turn.given
    about = [str(turn.model), "--dtype", turn.dtype, "--threads", str(given.threads)]
    about += ["--turns", "1", "--seed", str(given.seed + turn.number), "--json", RUNS]
    found = []
    for mode, works in _modes(given.workloads):
        command = [sys.executable, "-m", "paceline_cli", "bench", mode, *about, "--workload", ",".join(works)]
        found.append(Contender(f"Paceline, {mode}", command, works))
    return found


def _vllm(turn: Turn) -> list[Contender]:
    python = turn.given.peers / "vllm" / "bin" / "python"
    modes = _modes(turn.given.workloads)
    return [Contender(f"vLLM, {mode}", turn.peer(python, "vllm", mode, works), works) for mode, works in modes]


def _llama_cpp(turn: Turn) -> list[Contender]:
    works, peers = turn.given.workloads, ["--peers", str(turn.given.peers)]
    return [
        Contender(f"llama.cpp, {way}", [*turn.peer(sys.executable, "llamacpp", way, works), *peers], works)
        for way in ("64-slots", "16-slots")
    ]


def _transformers(turn: Turn) -> list[Contender]:
    works, found = at_once(turn.given.workloads), []
    for way in ("one-by-one", "static-sdpa", "static-eager", "continuous"):
        command = turn.peer(sys.executable, "transformers", way, works)
        if way == "one-by-one" and not turn.given.limit:
            command += ["--limit", str(SLOW_LIMIT)]
        found.append(Contender(f"transformers, {way}", command, works))
    return found


def _modes(workloads: list[str]) -> list[tuple[str, list[str]]]:
    """Without a server nothing can come over time."""
    return [("offline", at_once(workloads)), ("serve", workloads)]


def at_once(workloads: list[str]) -> list[str]:
    """Those whose requests come at once."""
    return [name for name in workloads if name != "W3"]


def run_alone(contender: Contender, time_limit_s: float = TIME_LIMIT_S) -> tuple[list[Run], str]:
    """Run a contender, and wait until nothing of it is left: its runs, and why there are no more; "" if that is all."""
    with tempfile.TemporaryDirectory() as folder:
        log, runs_file = Path(folder) / "log", Path(folder) / "runs.json"
        command = [word.replace(RUNS, str(runs_file)) for word in contender.command]
        try:
            output, code = _run(command, log, time_limit_s)
        except OSError as error:
            return [], f"could not be started: {error}; benchmarks/peers/setup.sh makes what the others need"
        runs = [json.loads(line) for line in output.splitlines() if line.startswith('{"server"')]
        if runs_file.exists():
            runs += json.loads(runs_file.read_text())["runs"]
        wrong = [f"{run.get('workload')}: {problem}" for run in runs for problem in problems(run)]
        if code:
            return runs, f"ended with {code}:\n{last_lines(log)}"
        return runs, "; ".join(wrong)


def _run(command: list[str], log: Path, time_limit_s: float) -> tuple[str, int]:
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        clock = threading.Timer(time_limit_s, process.send_signal, [signal.SIGTERM])
        clock.start()
        try:
            output, _ = process.communicate()
        finally:
            clock.cancel()
            end_session(process.pid)
            process.wait()
    return output, process.returncode


def _environment() -> dict[str, str]:
    """Everyone runs with its own defaults: what is set here about threads may suit one and slow another."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}


def compare(given: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Run everybody in turns; what there is so far is written after each."""
    everything: dict[str, Any] = {"setting": setting(), "runs": [], "failures": []}
    rounds = [(turn, dtype) for turn in range(given.turns) for dtype in given.dtype]
    for turn, dtype in rounds:
        contenders = list(Turn(given, model, dtype, turn).contenders())
        for contender in contenders if turn % 2 == 0 else contenders[::-1]:  # a machine that slows down slows others
            _tell(f"turn {turn + 1} of {given.turns}, {dtype}: {contender.name} ...")
            began = time.perf_counter()
            runs, failure = run_alone(contender)
            everything["runs"] += [run | {"turn": turn} for run in runs]
            for run in runs:
                _tell(f"    {run['workload']}  {run['tokens_per_s']:,.1f} tokens/s")
            if failure:
                everything["failures"].append({"name": contender.name, "dtype": dtype, "turn": turn, "why": failure})
                _tell(f"    {failure}")
            _tell(f"    {time.perf_counter() - began:.0f} s")
            if given.json:
                given.json.write_text(json.dumps(everything, indent=1) + "\n")
    return everything


def show(everything: dict[str, Any]) -> None:
    """Print the tables and the ratios, a set for each data type."""
    for dtype in DTYPES:
        runs = [run for run in everything["runs"] if run["dtype"] == dtype]
        if runs:
            print(
                f"\n{dtype}, medians of {len({run['turn'] for run in runs})} turns\n\n{table(runs)}\n\n{ratios(runs)}"
            )
    where = in_words(everything["setting"])
    versions = {run.get("version", "") for run in everything["runs"]}
    print("\n" + " · ".join([where, *sorted(version for version in versions if version not in where)]))
    for failure in everything.get("failures", []):
        print(f"\n{failure['name']}, {failure['dtype']}, turn {failure['turn'] + 1}: {failure['why']}")


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _folder(model: str) -> Path:
    """The prepared folder of what the user named."""
    if (Path(model) / "config.json").exists():
        return Path(model).resolve()
    from executor_svc.prepare import prepare

    return Path(prepare(model).path)


def main() -> None:
    """Compare, or show an earlier comparison."""
    leave_nothing_behind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each; default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="the turn's number is added")
    parser.add_argument("--model", default="smollm2", help="a prepared folder, or what `paceline prepare` takes")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv" / "peers", help="what peers/setup.sh made")
    parser.add_argument("--limit", type=int, help="only so many requests of each workload to the others: for a trial")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run, the machine and the versions there")
    parser.add_argument("--show", type=Path, metavar="FILE", help="run nothing, show what is written there")
    given = parser.parse_args()
    given.peers = given.peers.resolve()
    show(json.loads(given.show.read_text()) if given.show else compare(given, _folder(given.model)))


if __name__ == "__main__":
    main()
