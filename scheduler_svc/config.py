"""What an operator can set on a scheduler."""

import math
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

    lease_s: float = 5.0
    """Silence after which an executor counts as lost."""

    step_timeout_s: float = 30.0
    """Least time after which a step without a result counts as a wedged device; the limit is 20 times the expected
    step time where that is longer."""

    drain_timeout_s: float = 30.0
    """How long running requests may still finish after a stop signal."""


def check_settings(config: SchedulerConfig) -> None:
    """Refuse settings that nothing could be served with. Raises `ValueError`."""
    make_policy(config.policy, input_weight=config.fair_input_weight, output_weight=config.fair_output_weight)
    if not 0.5 <= config.lease_s <= 3600:  # NaN is refused here too
        raise ValueError(f"lease must be 0.5 to 3600 seconds, got {config.lease_s:g}")
    if not 0 < config.step_timeout_s < math.inf:
        raise ValueError(f"step timeout must be above 0 seconds and finite, got {config.step_timeout_s:g}")
    if not 0 <= config.drain_timeout_s < math.inf:
        raise ValueError(f"drain timeout must be 0 seconds or more and finite, got {config.drain_timeout_s:g}")
