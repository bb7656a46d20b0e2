"""What an operator can set on an executor."""

from __future__ import annotations

from dataclasses import dataclass, replace

WEIGHTS = ("", "int8")
ATTENTION = ("auto", "torch", "triton", "flashinfer")


@dataclass(frozen=True, slots=True)
class ExecutorConfig:
    """Settings of one executor process; the command line has a flag for each."""

    model: str
    """Serving folder of the model, as `paceline prepare` makes it, or `fake`."""

    scheduler: str = "127.0.0.1:50051"
    """Address of the scheduler to join: `host:port` or `unix:/path`."""

    listen: str = "127.0.0.1:0"
    """Address to serve on: `host:port` (port 0 picks one) or `unix:/path`."""

    advertise: str = ""
    """Address at which the scheduler reaches this executor. Empty: the address it listens on."""

    executor_id: str = ""
    """Name in the fleet. Empty: host name and process id."""

    metrics_port: int = 0
    """Port on which Prometheus finds `/metrics`; the scheduler tells it. 0: none, -1: any."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU where there is one."""

    dtype: str = "auto"
    """Type of weights and cache: `float32`, `bfloat16`, `float16`. `auto`: bfloat16 where the device computes in it,
    else float32."""

    weights: str = ""
    """Type of the matrices: `int8`, to which they are rounded at the start, takes half the memory of bfloat16 and is
    less exact; only where steps run in C++. Empty: `dtype`."""

    threads: int = 0
    """CPU threads for the model. 0: all cores that the process may use, but one where a CPU runs the model in torch."""

    native: bool = True
    """Whether steps run in code of our own where the model and the machine allow it: in C++, built at the first start,
    on a CPU, in fused kernels on a GPU. Else in the model's own."""

    attention: str = "auto"
    """What computes attention where no C++ does: `torch` (any device), `triton` (a GPU), `flashinfer` (a GPU, where
    that library is installed). `auto`: `triton` on a GPU, else `torch`."""

    graphs: bool = True
    """Whether a GPU records steps that only decode, for so many requests each, and replays them: launching every kernel
    of a small step takes longer than computing it."""

    tensor_parallel: int = 1
    """GPUs that share one model too large for one of them, the first ones that the process sees. Each gets a process of
    its own; they fail as one."""

    keep_checks: bool = True
    """Whether a start that tested the model and measured its largest step keeps the results, and later ones of the same
    model, settings, releases and machine use them."""

    block_size: int = 16
    """Tokens of one cache block, a power of two."""

    cache_memory_bytes: int = 0
    """Memory for keys and values. 0: on a GPU what `memory_utilization` leaves when the weights are loaded and the
    largest step has run, on a CPU a quarter of what is available then, at most 4 GiB. Of each of several GPUs."""

    memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, cache and the largest step may use together."""

    max_model_len: int = 0
    """Tokens of prompt and output together that one request may have. 0: what the model was made for."""

    max_num_seqs: int = 0
    """Requests that may run at once. 0: 64 on a CPU, 256 on a GPU."""

    max_num_batched_tokens: int = 0
    """Tokens that one step may compute, at least `max_num_seqs`. Larger steps read prompts faster and make
    everybody else's next token wait longer. 0: 512 on a CPU, 2048 on a GPU, and never fewer than there are requests."""

    drain_timeout_s: float = 30.0
    """How long running requests may still finish here after a stop signal, before they resume elsewhere."""

    resume_window_s: float = 60.0
    """How long requests and cache are kept for a scheduler that was cut off or restarts."""

    fake_step_us: float = 1000.0
    """`--model fake`: time of a step that computes nothing."""

    fake_token_us: float = 5.0
    """`--model fake`: time that each token adds to its step."""

    fake_block_count: int = 4096
    """`--model fake`: blocks in the cache."""

    fake_load_us: float = 0.0
    """`--model fake`: time that loading takes."""

    fake_deadly_token: int = -1
    """`--model fake`: the process ends, without a word, in a step that computes this token. -1: none does that."""

    def sized_for(self, device_type: str) -> ExecutorConfig:
        """The same with the limits that are left to the type of device, `cpu` or `cuda`, filled in."""
        seqs, tokens = (256, 2048) if device_type == "cuda" else (64, 512)
        seqs = self.max_num_seqs or seqs
        return replace(self, max_num_seqs=seqs, max_num_batched_tokens=self.max_num_batched_tokens or max(tokens, seqs))


class SettingsError(ValueError):
    """Settings out of range, or that contradict each other; the message says what to change."""


def check_settings(config: ExecutorConfig) -> None:
    """Refuse settings that no model could be served with. Raises `SettingsError`."""
    size = config.block_size
    if size < 1 or size & (size - 1):
        raise SettingsError(f"block size must be a power of two, got {size}")
    if not 0 <= config.max_num_seqs <= 65535:
        raise SettingsError(f"max num seqs must be 1 to 65535, or 0 to suit the device, got {config.max_num_seqs}")
    if config.max_num_batched_tokens and config.max_num_batched_tokens < config.max_num_seqs:
        raise SettingsError(
            f"max num batched tokens is {config.max_num_batched_tokens} but max num seqs is {config.max_num_seqs}, "
            f"and every running request needs a token in each step; raise the one or lower the other"
        )
    if config.weights not in WEIGHTS:
        raise SettingsError(f"weights must be 'int8', or left out for the type of the model, got '{config.weights}'")
    if config.attention not in ATTENTION:
        raise SettingsError(f"attention must be {', '.join(map(repr, ATTENTION))}, got '{config.attention}'")
    if config.tensor_parallel < 1:
        raise SettingsError(f"tensor parallel must be 1 (one GPU) or more, got {config.tensor_parallel}")
    if config.tensor_parallel > 1 and config.weights:
        raise SettingsError(
            f"{config.weights} weights are for steps in C++, on one CPU, but tensor parallel is "
            f"{config.tensor_parallel}; leave one of the two out"
        )
    if config.threads < 0:
        raise SettingsError(f"threads must be 0 (all cores) or more, got {config.threads}")
    if not 0 < config.memory_utilization <= 1:
        raise SettingsError(f"memory utilization must be above 0 and at most 1, got {config.memory_utilization}")
