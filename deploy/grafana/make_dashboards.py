"""Writes the dashboards: `python deploy/grafana/make_dashboards.py` after a change here; both are committed.

A panel's title is the question that it answers, its description says what to do about a bad answer.
"""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
PROMETHEUS = {"type": "prometheus", "uid": "paceline-prometheus"}  # as provisioning/datasources says
WIDTH = 24  # of Grafana's grid
LINE = 120

Json = dict[str, Any]

RATE = "[$__rate_interval]"


def rate(counter: str) -> str:
    """Per second, over all label values."""
    return f"sum(rate({counter}{RATE}))"


def rate_by(label: str, counter: str) -> str:
    """Per second, for each value of a label."""
    return f"sum by ({label}) (rate({counter}{RATE}))"


def quantiles(histogram: str) -> dict[str, str]:
    """Half of the requests, and the slow ones."""
    return {
        f"p{percent}": f"histogram_quantile({percent / 100:g}, sum by (le) (rate({histogram}_bucket{RATE})))"
        for percent in (50, 95, 99)
    }


def mean(histogram: str) -> str:
    """What one took on average."""
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def _panel(kind: str, title: str, text: str, queries: dict[str, str], size: tuple[int, int], **target: Any) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": PROMETHEUS,
        "gridPos": {"h": size[1], "w": size[0]},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend, **target}
            for number, (legend, expr) in enumerate(queries.items())
        ],
    }


def stat(
    title: str,
    text: str,
    expr: str,
    unit: str = "short",
    *,
    bad_above: float | None = None,
    bad_below: float | None = None,
    names: str = "",
    bad_name: str = "",
    width: int = 4,
) -> Json:
    """One number, red where it is bad. `names`: the value of that label is shown in place of the number."""
    panel = _panel("stat", title, text, {f"{{{{{names}}}}}" if names else "": expr}, (width, 4), instant=True)
    steps: list[Json] = [{"color": "green", "value": None}]
    if bad_above is not None:
        steps.append({"color": "red", "value": bad_above})
    if bad_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": bad_below}]
    panel["fieldConfig"] = {"defaults": {"unit": unit, "thresholds": {"mode": "absolute", "steps": steps}}}
    if bad_name:
        red = {"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}}
        panel["fieldConfig"]["overrides"] = [{"matcher": {"id": "byName", "options": bad_name}, "properties": [red]}]
    panel["options"] = {"textMode": "name" if names else "value", "graphMode": "none"}
    return panel


def lines(
    title: str,
    text: str,
    queries: dict[str, str],
    unit: str = "short",
    *,
    width: int = 8,
    stacked: bool = False,
    exemplars: bool = False,
    line_at: float | None = None,
) -> Json:
    """Curves over time. `exemplars` are dots that lead to the trace of one request; `line_at` is where bad begins."""
    panel = _panel("timeseries", title, text, queries, (width, 8), **({"exemplar": True} if exemplars else {}))
    custom: Json = {"fillOpacity": 40, "stacking": {"mode": "normal"}} if stacked else {"fillOpacity": 5}
    defaults: Json = {"unit": unit, "min": 0, "custom": custom}
    if line_at is not None:
        custom["thresholdsStyle"] = {"mode": "dashed"}
        steps = [{"color": "transparent", "value": None}, {"color": "red", "value": line_at}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    panel["fieldConfig"] = {"defaults": defaults}
    panel["options"] = {"legend": {"placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return panel


def heatmap(title: str, text: str, histogram: str, unit: str = "s", width: int = 8) -> Json:
    """How many took how long, over time."""
    expr = f"sum by (le) (increase({histogram}_bucket{RATE}))"
    panel = _panel("heatmap", title, text, {"{{le}}": expr}, (width, 8), format="heatmap", exemplar=True)
    panel["options"] = {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Oranges", "exponent": 0.5},
        "yAxis": {"unit": unit},
        "tooltip": {"mode": "single", "yHistogram": True},
    }
    return panel


def table(title: str, text: str, expr: str, width: int = 8) -> Json:
    """What is there now, a line for each series."""
    panel = _panel("table", title, text, {"": expr}, (width, 8), format="table", instant=True)
    hidden = {"Time": True, "Value": True, "__name__": True, "alertstate": True}
    panel["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return panel


def dashboard(uid: str, title: str, text: str, panels: list[Json]) -> Json:
    """The panels from left to right, then below."""
    x = y = row_height = 0
    for number, panel in enumerate(panels, start=1):
        place = panel["gridPos"]
        if x + place["w"] > WIDTH:
            x, y, row_height = 0, y + row_height, 0
        panel["gridPos"] = {**place, "x": x, "y": y}
        panel["id"] = number
        x, row_height = x + place["w"], max(row_height, place["h"])
    others = {"type": "dashboards", "title": "Paceline", "tags": ["paceline"], "includeVars": False, "keepTime": True}
    return {
        "uid": uid,
        "title": title,
        "description": text,
        "tags": ["paceline"],
        "schemaVersion": 42,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "links": [others],
        "panels": panels,
    }


def overview() -> Json:
    """Are we fine?"""
    ended = "paceline_requests_ended_total"
    return dashboard(
        "paceline-overview",
        "Paceline: are we fine?",
        "Green above and flat below: yes. Else the title of the panel says where to look.",
        [
            stat(
                "Alerts that fire",
                "Above 0: the table below names them; docs/operations.md has a paragraph for each.",
                'count(ALERTS{alertname=~"Paceline.+",alertstate="firing"}) or vector(0)',
                bad_above=1,
            ),
            stat(
                "Does the scheduler answer?",
                "0: nobody is served. See its log and why its process ended.",
                'min(up{job="paceline-scheduler"})',
                bad_below=1,
            ),
            stat(
                "Executors that take requests",
                "0 while requests wait: look at Fleet; with an autoscaler one should be starting.",
                'sum(paceline_executors{state="ready"})',
                bad_below=1,
            ),
            stat(
                "Is what was accepted safe from a restart?",
                "lost: make room where the journal is. off: the scheduler runs without --journal.",
                "paceline_durability == 1",
                names="state",
                bad_name="lost",
            ),
            stat(
                "First token, p95",
                "Red: Latency says whether the queue or the prompt takes the time.",
                "histogram_quantile(0.95, sum by (le) (rate(paceline_first_token_seconds_bucket[5m])))",
                "s",
                bad_above=2.5,
            ),
            stat(
                "Requests that fail",
                "Share of those that ended in the last 5 min. The scheduler's log names each with its reason.",
                f'sum(rate({ended}{{outcome=~"error|cut_off"}}[5m])) / sum(rate({ended}[5m]))',
                "percentunit",
                bad_above=0.01,
            ),
            lines(
                "Do as many requests end as come?",
                "More come than end for long: the queue grows; add executors.",
                {
                    "come": rate("paceline_requests_arrived_total"),
                    "end: {{outcome}}": rate_by("outcome", ended),
                    "refused: {{reason}}": rate_by("reason", "paceline_requests_refused_total"),
                },
                "reqps",
            ),
            lines(
                "Does anybody wait?",
                "A queue that stays is too little capacity; one that comes and goes is a burst.",
                {"wait": "sum(paceline_requests_waiting)", "run": "sum(paceline_requests_running)"},
            ),
            lines(
                "For how long?",
                "The age of the oldest waiting request, and the time that executors need for all that is ahead.",
                {"oldest": "max(paceline_oldest_waiting_seconds)", "backlog": "max(paceline_backlog_seconds)"},
                "s",
                line_at=10,
            ),
            lines(
                "How many tokens do we make?",
                "Fewer at the same load: look at Fleet for step times, at Cache for tokens that are computed twice.",
                {
                    "generated": rate("paceline_tokens_generated_total"),
                    "computed": rate("paceline_tokens_computed_total"),
                    "of prompts that came": rate("paceline_prompt_tokens_arrived_total"),
                },
                "short",
            ),
            lines(
                "Does the cache have room?",
                "Held near the top for long: requests are preempted or wait; see Cache.",
                {"held": "sum(paceline_blocks_held)", "all": "sum(paceline_blocks)"},
            ),
            table(
                "Which alerts fire?",
                "docs/operations.md has a paragraph for each.",
                'ALERTS{alertname=~"Paceline.+",alertstate="firing"}',
            ),
        ],
    )


def latency() -> Json:
    """Where does the time go?"""
    return dashboard(
        "paceline-latency",
        "Paceline: latency",
        "Dots are requests: a click leads to the trace of one.",
        [
            lines(
                "How long until the first token?",
                "What users feel first. The queue and the prompt beside it are its parts: work on the larger.",
                quantiles("paceline_first_token_seconds"),
                "s",
                exemplars=True,
                line_at=2.5,
            ),
            lines(
                "How long in the queue?",
                "High: too few executors, or --max-num-seqs or the cache admit too few requests.",
                quantiles("paceline_queue_seconds"),
                "s",
                exemplars=True,
            ),
            lines(
                "How long does the prompt take?",
                "High: long prompts share steps with many others; --policy prefill_first or a larger "
                "--max-num-batched-tokens reads them faster.",
                quantiles("paceline_prefill_seconds"),
                "s",
                exemplars=True,
            ),
            lines(
                "How long between two tokens?",
                "Gaps as users see them. High p99 and low p50: long prompts hold up the others; lower "
                "--max-num-batched-tokens.",
                quantiles("paceline_between_tokens_seconds"),
                "s",
            ),
            lines(
                "How fast does a request get its tokens?",
                "Mean of one request after its first token. High for all: lower --max-num-seqs or add executors.",
                quantiles("paceline_per_token_seconds"),
                "s",
                line_at=0.1,
            ),
            lines(
                "How long does a whole request take?",
                "Grows with the length of answers: compare with output tokens below before you blame the service.",
                quantiles("paceline_request_seconds"),
                "s",
                exemplars=True,
            ),
            heatmap(
                "Who waits for a first token, and who does not?",
                "Two bands are two kinds of requests: reused and new prompts, short and long ones.",
                "paceline_first_token_seconds",
            ),
            heatmap(
                "Is the queue slow for all or for some?",
                "A band far above the rest are requests that others overtake.",
                "paceline_queue_seconds",
            ),
            heatmap(
                "Do tokens come evenly?",
                "A second band above the first are steps with long prompts, or preemptions.",
                "paceline_between_tokens_seconds",
            ),
            lines(
                "Queue or prompt: where does the first token's time go?",
                "Means, one on the other. The larger part is the one to work on.",
                {"queue": mean("paceline_queue_seconds"), "prompt": mean("paceline_prefill_seconds")},
                "s",
                stacked=True,
            ),
            lines(
                "How long are prompts?",
                "Longer prompts explain slower first tokens.",
                quantiles("paceline_request_prompt_tokens"),
            ),
            lines(
                "How long are answers?",
                "Longer answers explain slower requests.",
                quantiles("paceline_request_output_tokens"),
            ),
        ],
    )


def cache() -> Json:
    """Is there room?"""
    recomputed, computed = "paceline_tokens_recomputed_total", "paceline_tokens_computed_total"
    reused, placed = "paceline_tokens_reused_total", "paceline_prompt_tokens_placed_total"
    return dashboard(
        "paceline-cache",
        "Paceline: cache",
        "Keys and values: who holds them, who is spared computing, who has to compute again.",
        [
            lines(
                "What are the blocks used for?",
                "Held: by running requests. Cached: free, kept for requests that begin alike. "
                "Held near the top for long: more --cache-memory or fewer --max-num-seqs.",
                {
                    "held": "sum(paceline_blocks_held)",
                    "cached": "sum(paceline_blocks_cached)",
                    "free": "sum(paceline_blocks_free)",
                },
                stacked=True,
                width=12,
            ),
            lines(
                "How full is each executor?",
                "One full and others empty: its requests share a beginning; that is meant, until it preempts.",
                {"{{executor_id}}": "paceline_executor_blocks_held / paceline_executor_blocks"},
                "percentunit",
                width=12,
            ),
            lines(
                "How much of the prompts need not be computed?",
                "Low although prompts begin alike: the cache is too small to keep them, cache_salt separates them, or "
                "--no-prefix-reuse is set.",
                {"hit rate": f"{rate(reused)} / {rate(placed)}"},
                "percentunit",
            ),
            lines(
                "Is anybody preempted?",
                "Often above 0: more --cache-memory or fewer --max-num-seqs.",
                {"preemptions": rate("paceline_preemptions_total")},
                "ops",
            ),
            lines(
                "How much is computed twice?",
                "Above the line throughput is lost. With preemptions: cache. Without: executors are lost, see below.",
                {"recomputed": f"{rate(recomputed)} / {rate(computed)}"},
                "percentunit",
                line_at=0.05,
            ),
            lines(
                "Who had to go on elsewhere, and why?",
                "lost: see the executor's log and machine. out_of_memory: lower --gpu-memory-utilization there. "
                "drained: meant.",
                {"{{cause}}": rate_by("cause", "paceline_moves_total")},
                "ops",
            ),
            lines(
                "How many tokens wait and run?",
                "Running tokens times the bytes of one are what the cache has to hold.",
                {"wait": "sum(paceline_waiting_tokens)", "run": "sum(paceline_running_tokens)"},
            ),
            lines(
                "How large is the cache of each executor?",
                "Less than you expect: see its log line `executor ready`, and --cache-memory.",
                {"{{executor_id}}": "paceline_cache_bytes"},
                "bytes",
            ),
        ],
    )


def fleet() -> Json:
    """Who computes, and what does it cost?"""
    phases = 'paceline_executor_phase_seconds_total{phase!="wait"}'
    tokens = "paceline_tokens_generated_total"
    cost = "paceline_autoscaler_cost_total"
    starved, busy = (f"rate(paceline_executor_{kind}_seconds_total{RATE})" for kind in ("starved", "busy"))
    return dashboard(
        "paceline-fleet",
        "Paceline: fleet, autoscaling and cost",
        "Panels of the autoscaler are empty where none runs.",
        [
            stat(
                "Cost per hour",
                "Of the executors that are there, by the prices of the scaling file, in their money. 0: it has none.",
                "sum(paceline_autoscaler_cost_per_hour)",
                "short",
                width=6,
            ),
            stat(
                "Cost per million tokens",
                "Over the time that is shown. Rises when executors are there and nobody comes: lower executors.min.",
                f"1e6 * sum(increase({cost}[$__range])) / sum(increase({tokens}[$__range]))",
                "short",
                width=6,
            ),
            stat(
                "Executors that never became ready",
                "In the last hour. Their own log says why; then times.startup_limit.",
                "sum(increase(paceline_autoscaler_never_ready_total[1h]))",
                bad_above=1,
                width=6,
            ),
            stat(
                "What holds the autoscaler from its wish?",
                "max while requests wait: raise executors.max. no data: no policy had anything to go by.",
                "paceline_autoscaler_held_by == 1",
                names="by",
                bad_name="max",
                width=6,
            ),
            lines(
                "Are there as many executors as are wanted?",
                "Wanted above ready for longer than a start: see actions and the executors' logs.",
                {
                    "wanted": "sum(paceline_autoscaler_executors_wanted)",
                    "{{state}}": "sum by (state) (paceline_executors)",
                    "autoscaler: {{state}}": 'sum by (state) (paceline_autoscaler_executors{state!="ready"})',
                },
            ),
            lines(
                "Which policy wants how many?",
                "The largest wish wins; `paceline autoscaler explain` says why each is what it is.",
                {"{{policy}}": "max by (policy) (paceline_autoscaler_executors_wished)"},
            ),
            lines(
                "What was decided, and what held it back?",
                "Up and down in turn: a longer cooldowns.down.",
                {
                    "{{direction}}, held by {{held_by}}": "sum by (direction, held_by) "
                    "(increase(paceline_autoscaler_decisions_total[$__rate_interval]))"
                },
            ),
            lines(
                "Does the actuator do what it is asked for?",
                "Outcomes other than done: quota, rights or no room; the autoscaler's log has the words.",
                {
                    "{{action}}: {{outcome}}": "sum by (action, outcome) "
                    "(increase(paceline_autoscaler_actions_total[$__rate_interval]))"
                },
            ),
            lines(
                "How long does a start take?",
                "It is how far ahead the forecast has to see. Longer than your bursts: keep one warm, executors.min 1.",
                {
                    "autoscaler's median": "max(paceline_autoscaler_startup_seconds)",
                    "{{executor_id}}": "paceline_executor_startup_seconds",
                },
                "s",
            ),
            lines(
                "What do tokens cost, hour by hour?",
                "Per million. Falls with load: a busy executor costs what an idle one does.",
                {"per million": f"1e6 * sum(increase({cost}[1h])) / sum(increase({tokens}[1h]))"},
                "short",
            ),
            lines(
                "What do executors spend their time with?",
                "forward should be nearly all under load. idle with requests there: the scheduler is late. prepare or "
                "sample: the executor's CPU is short. (Plans that wait do so while the step before runs: not shown.)",
                {"{{phase}}": f"sum by (phase) (rate({phases}{RATE})) / scalar(sum(rate({phases}{RATE})))"},
                "percentunit",
                stacked=True,
            ),
            lines(
                "Does an executor wait for the scheduler?",
                "Share of its time with work; a gap: it had none. "
                "Above the line: the scheduler's process is short of CPU, or the line between them is slow.",
                {"{{executor_id}}": f"{starved} / ({starved} + {busy})"},
                "percentunit",
                line_at=0.02,
            ),
            lines(
                "How long is a step?",
                "As executors measure it. One slower than the others: its machine.",
                {
                    "{{executor_id}} p95": "histogram_quantile(0.95, sum by (executor_id, le) "
                    '(rate(paceline_step_seconds_bucket{phase="forward"}[$__rate_interval])))'
                },
                "s",
            ),
            lines(
                "What does the scheduler believe a step costs?",
                "It plans and refuses deadlines by this: a step without tokens, and what a thousand tokens add.",
                {
                    "{{executor_id}} step": "paceline_executor_step_seconds",
                    "{{executor_id}} 1000 tokens": "1000 * paceline_executor_token_seconds",
                },
                "s",
            ),
            lines(
                "How many tokens does a step compute?",
                "Few under load: small batches; more --max-num-seqs or fewer executors use each step better.",
                {
                    "{{kind}}": f"{rate_by('kind', 'paceline_step_tokens_total')} "
                    f"/ scalar({rate('paceline_steps_total')})"
                },
            ),
            lines(
                "How many requests does each executor run?",
                "Uneven for long: requests that begin alike stay together; that is meant.",
                {"{{executor_id}}": "paceline_executor_requests_running"},
            ),
            lines(
                "How many bytes does a step take on the wire?",
                "More than some thousand: many requests begin or end in each step.",
                {
                    "{{direction}}": f"{rate_by('direction', 'paceline_executor_wire_bytes_total')} "
                    f"/ scalar({rate('paceline_executor_steps_total')})"
                },
                "bytes",
            ),
            lines(
                "What does a plan cost the scheduler?",
                "Plan and apply, per step. Near a step's time: the scheduler is what is slow.",
                {
                    "plan": f"{rate('paceline_plan_seconds_total')} / {rate('paceline_plans_total')}",
                    "apply": f"{rate('paceline_apply_seconds_total')} / {rate('paceline_plans_total')}",
                },
                "s",
            ),
            lines(
                "Are lines to executors lost?",
                "resumed: it came back with its cache. replanned: others computed its requests again. "
                "Again and again: its log, its machine, --lease.",
                {
                    "{{kind}}": f"sum by (kind) (increase(paceline_recoveries_total{RATE}))",
                    "failed steps of {{executor_id}}": "sum by (executor_id) "
                    f"(increase(paceline_step_failures_total{RATE}))",
                },
            ),
            lines(
                "How much memory do processes take?",
                "Growing for hours at the same load: tell us.",
                {
                    "{{job}} {{executor_id}}": 'process_resident_memory_bytes{job=~"paceline-.+"}',
                    "GPU of {{executor_id}}, {{kind}}": "paceline_device_memory_bytes",
                },
                "bytes",
            ),
            lines(
                "Do we lose spans?",
                "Above 0: the trace collector is down or too slow. Requests are not held up by it.",
                {"dropped": rate("paceline_spans_dropped_total")},
                "ops",
            ),
        ],
    )


def compact(value: Any, indent: str = "") -> str:
    """JSON with what fits on a line on one."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) < LINE or not isinstance(value, dict | list) or not value:
        return line
    deeper = indent + "  "
    if isinstance(value, list):
        inside = [compact(item, deeper) for item in value]
    else:
        inside = [f"{json.dumps(key)}: {compact(item, deeper)}" for key, item in value.items()]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n" + ",\n".join(deeper + item for item in inside) + f"\n{indent}{closing}"


def dashboards() -> dict[str, str]:
    """Text of each file, by its name."""
    made = {"overview.json": overview, "latency.json": latency, "cache.json": cache, "fleet.json": fleet}
    return {name: compact(make()) + "\n" for name, make in made.items()}


def main() -> int:
    """The command."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
