"""What an operator can set on a scheduler."""

import math
import os
import re
from dataclasses import dataclass

from scheduler_svc.core.policies import make_policy


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of one scheduler process; the command line has a flag for each."""

    model: str
    """Serving folder of the model, as `paceline prepare` makes it, or `fake`."""

    listen: tuple[str, ...] = ("127.0.0.1:50051",)
    """Addresses to serve on: `host:port` (port 0 picks one) or `unix:/path`."""

    served_model_name: str = ""
    """Name under which users ask for the model. Empty: the folder's own name."""

    http_port: int = 0
    """Port of the status page, of `/metrics` and of what finds the executors' for Prometheus. 0: none, -1: any."""

    http_host: str = "0.0.0.0"
    """Address of this machine that it is on; the default is all of them."""

    otlp_endpoint: str = ""
    """Where traces go: an OTLP/gRPC receiver such as Jaeger's, `http://HOST:4317`. Empty: what the environment says in
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT, else nowhere."""

    trace_requests: float = 10.0
    """Requests a second that are traced although their callers do not trace them. Those that fail are traced too, at
    most ten a second."""

    trace_steps: int = 100
    """One in so many steps is traced, and those that take unusually long. 0: none."""

    trace_content: bool = False
    """Put prompts and outputs into the traces that are sent. Nobody who asks the scheduler is ever shown them."""

    keep_timelines: int = 512
    """Requests that have ended of which `paceline trace` and the status page still know where their time went."""

    policy: str = "fifo"
    """Whose turn it is: `fifo`, `prefill_first`, `priority` (the request's, the larger first), `deadline` (the earliest
    first; what cannot make it is refused early) or `fair` (equal service to tenants)."""

    fair_input_weight: float = 1.0
    """Policy `fair`: service that one prompt token counts as."""

    fair_output_weight: float = 2.0
    """Policy `fair`: service that one generated token counts as."""

    prefix_reuse: bool = True
    """Keep what was computed for one request for others that begin with the same tokens, as long as there is space."""

    max_waiting_requests: int = 2048
    """Accepted requests that may wait for an executor; one more is answered with `RESOURCE_EXHAUSTED`."""

    max_waiting_tokens: int = 4_194_304
    """Prompt tokens of all waiting requests together; beyond it too the answer is `RESOURCE_EXHAUSTED`."""

    max_prompt_bytes: int = 1024 * 1024
    """Largest text or conversation that is tokenized at all; raise it for models with contexts of millions."""

    journal: str = ""
    """File that accepted requests and delivered tokens are written to, so that they outlive this process. Empty or
    `off`: none, and a restart loses them."""

    journal_bytes: int = 1 << 30
    """Largest size of that file. Near it, results that are kept for clients are let go first."""

    keep_results_s: float = 60.0
    """How long the answer to a request with an id of the caller's can still be read after its end."""

    resume_wait_s: float = 10.0
    """How long a restarted scheduler waits for the executors that had its requests before others compute them again."""

    lease_s: float = 5.0
    """Silence after which an executor counts as lost."""

    step_timeout_s: float = 30.0
    """Least time after which a step without a result counts as a wedged device; the limit is 20 times the expected
    step time where that is longer."""

    drain_timeout_s: float = 30.0
    """How long running requests may still finish after a stop signal. With a journal those that have not go on after
    the next start: 0 leaves at once."""


_RECEIVERS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # the first that is set counts


def trace_receiver(config: SchedulerConfig) -> str:
    """Where traces go: as the settings say, else the environment; empty for nowhere.

    Raises `ValueError` for what cannot be a receiver, naming the variable that it comes from.
    """
    named = [("", config.otlp_endpoint), *((f"{name} is ", os.environ.get(name, "")) for name in _RECEIVERS)]
    source, endpoint = next(((source, endpoint) for source, endpoint in named if endpoint), ("", ""))
    if endpoint and not re.fullmatch(r"https?://[^/\s]+/?", endpoint):
        what = f"{source}'{endpoint}', which" if source else f"'{endpoint}'"
        raise ValueError(f"{what} is no receiver of traces; name one as http://HOST:4317, or https://HOST:4317")
    return endpoint


def check_settings(config: SchedulerConfig) -> None:
    """Refuse settings that nothing could be served with. Raises `ValueError`."""
    make_policy(config.policy, input_weight=config.fair_input_weight, output_weight=config.fair_output_weight)
    if not 0 <= config.trace_requests < math.inf:
        raise ValueError(f"trace requests must be 0 or more a second, got {config.trace_requests:g}")
    trace_receiver(config)
    if not 0.5 <= config.lease_s <= 3600:  # NaN is refused here too
        raise ValueError(f"lease must be 0.5 to 3600 seconds, got {config.lease_s:g}")
    if not 0 < config.step_timeout_s < math.inf:
        raise ValueError(f"step timeout must be above 0 seconds and finite, got {config.step_timeout_s:g}")
    for name in ("drain_timeout_s", "keep_results_s", "resume_wait_s"):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            words = name.removesuffix("_s").replace("_", " ")
            raise ValueError(f"{words} must be 0 seconds or more and finite, got {value:g}")
