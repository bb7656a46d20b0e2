"""The flags of the services' configurations.

A configuration dataclass says which settings there are and what they default to; the table here says how each looks on
the command line. A command that takes them is decorated with `takes_settings` and receives one mapping.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, get_type_hints

from paceline_cli.flags import flag
from paceline_cli.sizes import parse_size

Settings = dict[str, Any]  # field name of a configuration -> value

_MODEL = "Model and memory"
_ORDER = "Order"
_LIMITS = "Limits"
_NETWORK = "Network"
_SIGHT = "Looking"
LOOKING = {"rich_help_panel": _SIGHT}
_TIMES = "Time-outs"
_RECOVERY = "Recovery"
_FAKE = "Without a model (MODEL is 'fake')"


@dataclass(frozen=True, slots=True)
class _Flag:
    """How one setting looks on the command line."""

    name: str
    text: str
    panel: str
    more: dict[str, Any]

    def option(self) -> Any:
        """The typer option."""
        return flag(self.name, self.text, rich_help_panel=self.panel, **self.more)


def _flag(name: str, panel: str, text: str, **more: Any) -> _Flag:
    return _Flag(name, text, panel, more)


def _count(name: str, panel: str, text: str, least: int = 1) -> _Flag:
    return _Flag(name, text, panel, {"metavar": "N", "min": least})


def _size(name: str, panel: str, text: str) -> _Flag:
    return _Flag(name, text, panel, {"metavar": "SIZE", "parser": parse_size})


def _port(name: str, text: str) -> _Flag:
    return _Flag(name, text, _SIGHT, {"metavar": "PORT", "min": -1, "max": 65535})


def _seconds(name: str, text: str, panel: str = _TIMES) -> _Flag:
    return _Flag(name, text, panel, {"metavar": "SECONDS", "min": 0})


# By field name, in the order of the help.
_FLAGS = {
    "served_model_name": _flag("--served-model-name", _MODEL, "Name that users ask for.", metavar="NAME"),
    "device": _flag("--device", _MODEL, "cpu, cuda, cuda:1 …; auto takes a GPU if there is one.", metavar="DEVICE"),
    "dtype": _flag("--dtype", _MODEL, "float32, bfloat16 or float16; auto suits the device.", metavar="TYPE"),
    "weights": _flag(
        "--weights", _MODEL, "int8 reads half as much as bfloat16, rounded; in C++ on a CPU.", metavar="TYPE"
    ),
    "threads": _count("--threads", _MODEL, "CPU threads of one executor; 0 lets it choose.", 0),
    "keep_checks": _flag(
        "--keep-checks/--no-keep-checks",
        _MODEL,
        "Use the self-test and measurements of an earlier start, or keep them.",
    ),
    "native": _flag("--native/--no-native", _MODEL, "Steps in C++ (CPU) or fused kernels (GPU) where they can be had."),
    "attention": _flag(
        "--attention", _MODEL, "torch, triton or flashinfer; auto takes triton on a GPU.", metavar="BACKEND"
    ),
    "graphs": _flag("--graphs/--no-graphs", _MODEL, "On a GPU: record decoding and small steps once and replay them."),
    "tensor_parallel": _count("--tensor-parallel", _MODEL, "GPUs that share one model."),
    "max_model_len": _count("--max-model-len", _MODEL, "Tokens of prompt and output together; 0: the model's.", 0),
    "block_size": _count("--block-size", _MODEL, "Tokens of one cache block, a power of two."),
    "cache_memory_bytes": _size("--cache-memory", _MODEL, "Memory for keys and values, as 2GiB; 0: measured."),
    "memory_utilization": _flag(
        "--gpu-memory-utilization", _MODEL, "Share of a GPU's memory to use in all.", metavar="SHARE", min=0.05, max=1
    ),
    "prefix_reuse": _flag(
        "--prefix-reuse/--no-prefix-reuse", _MODEL, "Keep what was computed for requests that begin alike."
    ),
    "policy": _flag(
        "--policy", _ORDER, "Whose turn it is: fifo, prefill_first, priority, deadline or fair.", metavar="POLICY"
    ),
    "fair_input_weight": _flag(
        "--fair-input-weight", _ORDER, "Policy fair: service that a prompt token counts as.", metavar="WEIGHT"
    ),
    "fair_output_weight": _flag(
        "--fair-output-weight", _ORDER, "Policy fair: service that a generated token counts as.", metavar="WEIGHT"
    ),
    "max_num_seqs": _count(
        "--max-num-seqs", _LIMITS, "Requests that run at once on one executor; 0 suits the device.", 0
    ),
    "max_num_batched_tokens": _count(
        "--max-num-batched-tokens", _LIMITS, "Tokens of one step; more reads prompts faster; 0 suits the device.", 0
    ),
    "max_waiting_requests": _count("--max-waiting-requests", _LIMITS, "Requests that may wait in the queue."),
    "max_waiting_tokens": _count("--max-waiting-tokens", _LIMITS, "Prompt tokens that may wait in the queue."),
    "max_prompt_bytes": _size("--max-prompt-bytes", _LIMITS, "Largest text or conversation, as 1MiB."),
    "scheduler": _flag("--scheduler", _NETWORK, "Scheduler to join: host:port or unix:/path.", metavar="ADDRESS"),
    "listen": _flag("--listen", _NETWORK, "Address to serve on: host:port or unix:/path.", metavar="ADDRESS"),
    "advertise": _flag("--advertise", _NETWORK, "Address at which the scheduler reaches it.", metavar="ADDRESS"),
    "executor_id": _flag("--executor-id", _NETWORK, "Name in the fleet; keep it over restarts.", metavar="NAME"),
    "http_port": _port("--http-port", "Port of the status page and of /metrics; 0: none, -1: any."),
    "http_host": _flag("--http-host", _SIGHT, "Address of this machine that it is on.", metavar="HOST"),
    "metrics_port": _port("--metrics-port", "Port of the executor's /metrics; 0: none, -1: any."),
    "otlp_endpoint": _flag("--otlp-endpoint", _SIGHT, "Where traces go, as http://HOST:4317.", metavar="URL"),
    "trace_requests": _flag(
        "--trace-requests", _SIGHT, "Requests a second that are traced unasked.", metavar="RATE", min=0
    ),
    "trace_steps": _count("--trace-steps", _SIGHT, "One in so many steps is traced; 0: none.", 0),
    "trace_content": _flag("--trace-content/--no-trace-content", _SIGHT, "Send prompts and outputs with traces."),
    "keep_timelines": _count("--keep-timelines", _SIGHT, "Ended requests that `paceline trace` knows.", 0),
    "lease_s": _seconds("--lease", "Silence after which an executor counts as lost."),
    "step_timeout_s": _seconds("--step-timeout", "Least time after which a step counts as wedged."),
    "drain_timeout_s": _seconds("--drain-timeout", "How long running requests may still finish after a stop."),
    "journal": _flag(
        "--journal", _RECOVERY, "File that keeps accepted requests over a restart; off: none.", metavar="PATH"
    ),
    "journal_bytes": _size("--journal-size", _RECOVERY, "Largest size of that file, as 1GiB."),
    "keep_results_s": _seconds("--keep-results", "How long an answer can be read again after its end.", _RECOVERY),
    "resume_wait_s": _seconds("--resume-wait", "How long a restarted scheduler waits for its executors.", _RECOVERY),
    "resume_window_s": _seconds("--resume-window", "How long an executor waits for its scheduler.", _RECOVERY),
    "fake_step_us": _count("--fake-step-us", _FAKE, "Microseconds of a step that computes nothing.", 0),
    "fake_token_us": _count("--fake-token-us", _FAKE, "Microseconds that each token adds to its step.", 0),
    "fake_block_count": _count("--fake-block-count", _FAKE, "Blocks in the cache."),
    "fake_load_us": _count("--fake-load-us", _FAKE, "Microseconds that loading takes.", 0),
    "fake_deadly_token": _count("--fake-deadly-token", _FAKE, "Token that kills the process; -1: none.", -1),
}


def takes_settings(*configs: type, without: Collection[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command a flag for each setting of `configs` but those in `without`; it gets them as `settings`."""
    wanted = _settings_of(configs, {"model", *without})
    flags = [_parameter(name, *wanted[name]) for name in sorted(wanted, key=list(_FLAGS).index)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True)
        own_parameters = [parameter for name, parameter in own.parameters.items() if name != "settings"]

        def with_settings(**values: Any) -> Any:
            settings = {name: values.pop(name) for name in wanted}
            if "listen" in settings and not isinstance(settings["listen"], str):
                settings["listen"] = tuple(settings["listen"])
            return command(**values, settings=settings)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own_parameters, *flags)]
        with_settings.__doc__ = command.__doc__
        with_settings.__name__ = command.__name__
        with_settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_settings.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_settings

    return decorate


def flags_for(config: Any) -> list[str]:
    """The command line that makes this configuration again, but for the model."""
    words = []
    for setting in fields(config):
        if setting.name == "model":
            continue
        value = getattr(config, setting.name)
        name = _FLAGS[setting.name].name
        if isinstance(value, bool):
            words.append(name.split("/")[not value])
        else:
            words += [word for one in (value if isinstance(value, tuple) else (value,)) for word in (name, str(one))]
    return words


def _settings_of(configs: Collection[type], without: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Type and default of each setting, by name; the first configuration that has it decides."""
    wanted: dict[str, tuple[Any, Any]] = {}
    for config in configs:
        types = get_type_hints(config)
        for setting in fields(config):
            if setting.name not in without:
                wanted.setdefault(setting.name, (types[setting.name], _default_of(setting)))
    return wanted


def _default_of(setting: Field[Any]) -> Any:
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return setting.default


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    """The parameter of a typer command for one setting."""
    if isinstance(default, tuple):
        kind, default = list[str], list(default)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, _FLAGS[name].option()]
    )
