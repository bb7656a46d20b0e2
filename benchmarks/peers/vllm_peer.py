"""vLLM's CPU build under the workloads; runs in vLLM's environment, one JSON line for each.

    PYTHONPATH=. .venv/peers/vllm/bin/python -m benchmarks.peers.vllm_peer --model FOLDER --way serve

All cores are given to it, where by default it would keep one free and lose a third, and the libraries that its
documentation wants preloaded: with Intel's OpenMP W4 runs 1.4 times as fast.
"""

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.figures import Answer
from benchmarks.peers.processes import Server, free_port, leave_nothing_behind, peak_mib
from benchmarks.peers.runs import Start, answered_at_once, flags, process_age_s
from benchmarks.peers.streaming import load_on
from benchmarks.workloads import Job

WAYS = {"offline": "LLM.generate in this process", "serve": "the OpenAI server"}
CACHE_GIB = 2
MODEL_NAME = "model"


class OpenAiApi:
    """Completions with the prompt as tokens, streamed."""

    path = "/v1/completions"

    def body(self, job: Job) -> dict[str, Any]:
        """The request, as JSON."""
        return {
            "model": MODEL_NAME,
            "prompt": job.prompt,
            "max_tokens": job.output_count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def has_token(self, data: dict[str, Any]) -> bool:
        """Whether an event brings at least one token."""
        return bool(data["choices"])

    def counts(self, data: dict[str, Any]) -> tuple[int, int] | None:
        """How many tokens the prompt and the answer had, where an event says so."""
        usage = data.get("usage")
        return (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None


def preloaded() -> list[str]:
    """The libraries that vLLM asks for, as far as they are there."""
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    return [str(openmp)] * openmp.exists() + [name for name in [find_library("tcmalloc_minimal")] if name]


def environment(threads: int) -> dict[str, str]:
    """What vLLM reads from its environment: what to preload, its cache, and as many cores as threads."""
    cores = sorted(os.sched_getaffinity(0))
    bound = {} if threads >= len(cores) else {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[:threads]))}
    return bound | {
        "LD_PRELOAD": ":".join(preloaded()),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def serve(given: argparse.Namespace) -> None:
    """Start the server, load it, stop it."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(given.model), "--served-model-name", MODEL_NAME, "--dtype", given.dtype]
    command += ["--enable-prefix-caching"]
    with tempfile.TemporaryDirectory() as folder:
        with Server(command, port, Path(folder) / "log", environment(given.threads)) as server:
            start_s = server.wait_until_ready("/health")
            start = Start("vllm", _version(), "serve", "", given, start_s)
            start.run_all(load_on(server, OpenAiApi()), server.peak_mib)


def offline(given: argparse.Namespace) -> None:
    """Load the model here, where all prompts come at once: arrivals need a server."""
    wanted = environment(given.threads)
    if os.environ.get("LD_PRELOAD", "") != wanted["LD_PRELOAD"]:  # is read when a process begins
        os.execve(sys.executable, sys.orig_argv, os.environ | wanted)
    os.environ.update(wanted)
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(given.model), dtype=given.dtype, enable_prefix_caching=True)
    start_s = process_age_s()

    def ask(jobs: list[Job]) -> list[Answer]:
        prompts = [{"prompt_token_ids": job.prompt} for job in jobs]
        lengths = [
            SamplingParams(temperature=0, max_tokens=job.output_count, ignore_eos=True, detokenize=False)
            for job in jobs
        ]
        asked_s = time.perf_counter()
        outputs = llm.generate(prompts, lengths, use_tqdm=False)
        answers = answered_at_once(jobs, asked_s)
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if counts != [job.output_count for job in jobs]:
            raise BenchmarkError(f"vLLM gave {sum(counts)} tokens where {sum(j.output_count for j in jobs)} were asked")
        return answers

    start = Start("vllm", _version(), "offline", "", given, start_s, tells_times=False)
    start.run_all(ask, lambda: peak_mib(os.getpid()))


def _version() -> str:
    return " with ".join([f"vllm-cpu {importlib.metadata.version('vllm-cpu')}", *(Path(p).name for p in preloaded())])


def main() -> None:
    """Run one way of it."""
    leave_nothing_behind()
    given = flags(__doc__ or "", WAYS).parse_args()
    {"serve": serve, "offline": offline}[given.way](given)


if __name__ == "__main__":
    main()
