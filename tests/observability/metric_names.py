"""What `/metrics` of the services has, as dashboards and rules may use it: name -> values of each label.

The tests hold every expression to this list, and whoever scrapes a real run can hold the list to the run.
"""

import re
from pathlib import Path

from autoscaler_svc.decide import HeldBy
from scheduler_svc.refusals import REASONS

ROOT = Path(__file__).parent.parent.parent

Labels = dict[str, set[str]]
ANY: set[str] = set()  # a label whose values are not known beforehand


def _alike(names: str, labels: Labels | None = None) -> dict[str, Labels]:
    return {name: labels or {} for name in names.split()}


_SCHEDULER: dict[str, Labels] = {
    **_alike("""
        paceline_requests_at_door paceline_requests_waiting paceline_requests_running paceline_requests_unfinished
        paceline_waiting_tokens
        paceline_running_tokens paceline_oldest_waiting_seconds paceline_backlog_tokens paceline_backlog_seconds
        paceline_blocks paceline_blocks_held paceline_blocks_cached paceline_blocks_free paceline_journal_bytes
        paceline_requests_arrived_total paceline_prompt_tokens_arrived_total paceline_tokens_generated_total
        paceline_tokens_computed_total paceline_tokens_recomputed_total paceline_tokens_reused_total
        paceline_prompt_tokens_placed_total paceline_preemptions_total paceline_spans_dropped_total
        paceline_plan_seconds_total paceline_plans_total paceline_apply_seconds_total
        """),
    "paceline_build_info": {"release": ANY, "model": ANY},
    "paceline_executors": {"state": {"connecting", "ready", "draining"}},
    "paceline_durability": {"state": {"off", "on", "lost"}},
    "paceline_requests_refused_total": {"reason": set(REASONS)},
    "paceline_requests_ended_total": {
        "outcome": {"stop", "length", "cancelled", "deadline", "error", "cut_off"},
    },
    "paceline_moves_total": {"cause": {"lost", "drained", "out_of_memory"}},
    "paceline_recoveries_total": {"kind": {"resumed", "replanned", "given_up"}},
    **_alike(
        """
        paceline_executor_requests_running paceline_executor_blocks paceline_executor_blocks_held
        paceline_executor_blocks_cached paceline_executor_step_seconds paceline_executor_token_seconds
        paceline_executor_startup_seconds paceline_executor_starved_seconds_total paceline_executor_busy_seconds_total
        paceline_executor_steps_total
        """,
        {"executor_id": ANY},
    ),
    "paceline_executor_phase_seconds_total": {
        "executor_id": ANY,
        "phase": {"wait", "idle", "prepare", "forward", "sample"},
    },
    "paceline_executor_wire_bytes_total": {"executor_id": ANY, "direction": {"sent", "received"}},
}
_SCHEDULER_HISTOGRAMS: dict[str, Labels] = _alike("""
    paceline_door_seconds paceline_queue_seconds paceline_first_token_seconds paceline_request_seconds
    paceline_prefill_seconds
    paceline_per_token_seconds paceline_between_tokens_seconds paceline_request_prompt_tokens
    paceline_request_output_tokens
    """)
_EXECUTOR: dict[str, Labels] = {
    "paceline_step_tokens_total": {"kind": {"prefill", "sampled"}},
    **_alike("""
        paceline_steps_total paceline_step_failures_total paceline_cache_bytes paceline_cache_blocks
        """),
    "paceline_device_memory_bytes": {"kind": {"allocated", "reserved"}},
    "paceline_executor_info": {"model": ANY, "dtype": ANY, "release": ANY},
}
_EXECUTOR_HISTOGRAMS: dict[str, Labels] = {
    "paceline_step_seconds": {"phase": {"wait", "idle", "prepare", "forward", "sample"}}
}


def _of_histograms(histograms: dict[str, Labels]) -> dict[str, Labels]:
    return {
        f"{name}{part}": {**labels, **({"le": ANY} if part == "_bucket" else {})}
        for name, labels in histograms.items()
        for part in ("_bucket", "_sum", "_count")
    }


def _autoscaler() -> dict[str, Labels]:
    """What the autoscaler's collector says in its own source."""
    text = (ROOT / "autoscaler_svc/metrics.py").read_text()
    found = re.findall(
        r'(Gauge|Counter)MetricFamily\(\s*"(\w+)",.*?(?:labels=\[(.*?)\]|\n        \)|\)\n)', text, re.DOTALL
    )
    names = {
        f"{name}_total" if kind == "Counter" else name: dict.fromkeys(re.findall(r'"(\w+)"', labels), ANY)
        for kind, name, labels in found
    }
    names["paceline_autoscaler_held_by"]["by"] = {by.value for by in HeldBy}
    return names


_EVERYWHERE: Labels = {"job": {"paceline-scheduler", "paceline-executor", "paceline-autoscaler"}, "instance": ANY}
_FROM_DISCOVERY: Labels = {**_EVERYWHERE, "executor_id": ANY}  # `executor_id` comes from the scheduler's /sd

_NO_TARGET: Labels = {}

METRICS: dict[str, Labels] = {
    name: {**labels, **target}
    for family, target in (
        (_SCHEDULER, _EVERYWHERE),
        (_of_histograms(_SCHEDULER_HISTOGRAMS), _EVERYWHERE),
        (_EXECUTOR, _FROM_DISCOVERY),
        (_of_histograms(_EXECUTOR_HISTOGRAMS), _FROM_DISCOVERY),
        (_autoscaler(), _EVERYWHERE),
        # Prometheus's own, and the process's.
        ({"up": {}, "process_resident_memory_bytes": {}}, _FROM_DISCOVERY),
        ({"ALERTS": {"alertname": ANY, "alertstate": {"pending", "firing"}}}, _NO_TARGET),
    )
    for name, labels in family.items()
}
