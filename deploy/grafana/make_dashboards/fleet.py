"""Who computes, and what does it cost?"""

from deploy.grafana.make_dashboards.panels import Dashboard, Lines, Stat
from deploy.grafana.make_dashboards.queries import RATE, increase_by, rate, rate_by

_PHASES = 'paceline_executor_phase_seconds_total{phase!="wait"}'
_TOKENS = "paceline_tokens_generated_total"
_COST = "paceline_autoscaler_cost_total"
_STARVED, _BUSY = (f"rate(paceline_executor_{kind}_seconds_total{RATE})" for kind in ("starved", "busy"))

_AT_A_GLANCE = (
    Stat(
        "Cost per hour",
        "Of the executors that are there, by the prices of the scaling file, in their money. 0: it has none.",
        "sum(paceline_autoscaler_cost_per_hour)",
        "short",
        width=6,
    ),
    Stat(
        "Cost per million tokens",
        "Over the time that is shown. Rises when executors are there and nobody comes: lower executors.min.",
        f"1e6 * sum(increase({_COST}[$__range])) / sum(increase({_TOKENS}[$__range]))",
        "short",
        width=6,
    ),
    Stat(
        "Executors that never became ready",
        "In the last hour. Their own log says why; then times.startup_limit.",
        "sum(increase(paceline_autoscaler_never_ready_total[1h]))",
        bad_above=1,
        width=6,
    ),
    Stat(
        "What holds the autoscaler from its wish?",
        "max while requests wait: raise executors.max. no data: no policy had anything to go by.",
        "paceline_autoscaler_held_by == 1",
        names="by",
        bad_name="max",
        width=6,
    ),
)

_SCALING = (
    Lines(
        "Are there as many executors as are wanted?",
        "Wanted above ready for longer than a start: see actions and the executors' logs.",
        {
            "wanted": "sum(paceline_autoscaler_executors_wanted)",
            "{{state}}": "sum by (state) (paceline_executors)",
            "autoscaler: {{state}}": 'sum by (state) (paceline_autoscaler_executors{state!="ready"})',
        },
    ),
    Lines(
        "Which policy wants how many?",
        "The largest wish wins; `paceline autoscaler explain` says why each is what it is.",
        {"{{policy}}": "max by (policy) (paceline_autoscaler_executors_wished)"},
    ),
    Lines(
        "What was decided, and what held it back?",
        "Up and down in turn: a longer cooldowns.down.",
        {
            "{{direction}}, held by {{held_by}}": increase_by(
                "direction, held_by", "paceline_autoscaler_decisions_total"
            )
        },
    ),
    Lines(
        "Does the actuator do what it is asked for?",
        "Outcomes other than done: quota, rights or no room; the autoscaler's log has the words.",
        {"{{action}}: {{outcome}}": increase_by("action, outcome", "paceline_autoscaler_actions_total")},
    ),
    Lines(
        "How long does a start take?",
        "It is how far ahead the forecast has to see. Longer than your bursts: keep one warm, executors.min 1.",
        {
            "autoscaler's median": "max(paceline_autoscaler_startup_seconds)",
            "{{executor_id}}": "paceline_executor_startup_seconds",
        },
        "s",
    ),
    Lines(
        "What do tokens cost, hour by hour?",
        "Per million. Falls with load: a busy executor costs what an idle one does.",
        {"per million": f"1e6 * sum(increase({_COST}[1h])) / sum(increase({_TOKENS}[1h]))"},
        "short",
    ),
)

_STEPS = (
    Lines(
        "What do executors spend their time with?",
        "forward should be nearly all under load. idle with requests there: the scheduler is late. prepare or "
        "sample: the executor's CPU is short. (Plans that wait do so while the step before runs: not shown.)",
        {"{{phase}}": f"{rate_by('phase', _PHASES)} / scalar({rate(_PHASES)})"},
        "percentunit",
        stacked=True,
    ),
    Lines(
        "Does an executor wait for the scheduler?",
        "Share of its time with work; a gap: it had none. "
        "Above the line: the scheduler's process is short of CPU, or the line between them is slow.",
        {"{{executor_id}}": f"{_STARVED} / ({_STARVED} + {_BUSY})"},
        "percentunit",
        line_at=0.02,
    ),
    Lines(
        "How long is a step?",
        "As executors measure it. One slower than the others: its machine.",
        {
            "{{executor_id}} p95": "histogram_quantile(0.95, sum by (executor_id, le) "
            '(rate(paceline_step_seconds_bucket{phase="forward"}[$__rate_interval])))'
        },
        "s",
    ),
    Lines(
        "What does the scheduler believe a step costs?",
        "It plans and refuses deadlines by this: a step without tokens, and what a thousand tokens add.",
        {
            "{{executor_id}} step": "paceline_executor_step_seconds",
            "{{executor_id}} 1000 tokens": "1000 * paceline_executor_token_seconds",
        },
        "s",
    ),
    Lines(
        "How many tokens does a step compute?",
        "Few under load: small batches; more --max-num-seqs or fewer executors use each step better.",
        {"{{kind}}": f"{rate_by('kind', 'paceline_step_tokens_total')} / scalar({rate('paceline_steps_total')})"},
    ),
    Lines(
        "How many requests does each executor run?",
        "Uneven for long: requests that begin alike stay together; that is meant.",
        {"{{executor_id}}": "paceline_executor_requests_running"},
    ),
)

_BETWEEN_PROCESSES = (
    Lines(
        "How many bytes does a step take on the wire?",
        "More than some thousand: many requests begin or end in each step.",
        {
            "{{direction}}": f"{rate_by('direction', 'paceline_executor_wire_bytes_total')} "
            f"/ scalar({rate('paceline_executor_steps_total')})"
        },
        "bytes",
    ),
    Lines(
        "What does a plan cost the scheduler?",
        "Plan and apply, per step. Near a step's time: the scheduler is what is slow.",
        {
            "plan": f"{rate('paceline_plan_seconds_total')} / {rate('paceline_plans_total')}",
            "apply": f"{rate('paceline_apply_seconds_total')} / {rate('paceline_plans_total')}",
        },
        "s",
    ),
    Lines(
        "Are lines to executors lost?",
        "resumed: it came back with its cache. replanned: others computed its requests again. "
        "Again and again: its log, its machine, --lease.",
        {
            "{{kind}}": increase_by("kind", "paceline_recoveries_total"),
            "failed steps of {{executor_id}}": increase_by("executor_id", "paceline_step_failures_total"),
        },
    ),
    Lines(
        "How much memory do processes take?",
        "Growing for hours at the same load: tell us.",
        {
            "{{job}} {{executor_id}}": 'process_resident_memory_bytes{job=~"paceline-.+"}',
            "GPU of {{executor_id}}, {{kind}}": "paceline_device_memory_bytes",
        },
        "bytes",
    ),
    Lines(
        "Do we lose spans?",
        "Above 0: the trace collector is down or too slow. Requests are not held up by it.",
        {"dropped": rate("paceline_spans_dropped_total")},
        "ops",
    ),
)

FLEET = Dashboard(
    "paceline-fleet",
    "Paceline: fleet, autoscaling and cost",
    "Panels of the autoscaler are empty where none runs.",
    (*_AT_A_GLANCE, *_SCALING, *_STEPS, *_BETWEEN_PROCESSES),
)
