"""Are we fine?"""

from deploy.grafana.make_dashboards.panels import Dashboard, Lines, Stat, Table
from deploy.grafana.make_dashboards.queries import rate, rate_by

_ENDED = "paceline_requests_ended_total"
_KEPT_OUT = 'sum(rate(paceline_requests_refused_total{reason="internal"}[5m]))'

_AT_A_GLANCE = (
    Stat(
        "Alerts that fire",
        "Above 0: the table below names them; docs/operations.md has a paragraph for each.",
        'count(ALERTS{alertname=~"Paceline.+",alertstate="firing"}) or vector(0)',
        bad_above=1,
    ),
    Stat(
        "Does the scheduler answer?",
        "0: nobody is served. See its log and why its process ended.",
        'min(up{job="paceline-scheduler"})',
        bad_below=1,
    ),
    Stat(
        "Executors that take requests",
        "0 while requests wait: look at Fleet; with an autoscaler one should be starting.",
        'sum(paceline_executors{state="ready"})',
        bad_below=1,
    ),
    Stat(
        "Is what was accepted safe from a restart?",
        "lost: make room where the journal is. off: the scheduler runs without --journal.",
        "paceline_durability == 1",
        names="state",
        bad_name="lost",
    ),
    Stat(
        "First token, p95",
        "Red: Latency says whether the queue or the prompt takes the time.",
        "histogram_quantile(0.95, sum by (le) (rate(paceline_first_token_seconds_bucket[5m])))",
        "s",
        bad_above=2.5,
    ),
    Stat(
        "Requests that fail",
        "Share of those that ended or were kept out in the last 5 min. The scheduler's log names each with its reason.",
        f'(sum(rate({_ENDED}{{outcome=~"error|cut_off"}}[5m])) + {_KEPT_OUT})'
        f" / (sum(rate({_ENDED}[5m])) + {_KEPT_OUT})",
        "percentunit",
        bad_above=0.01,
    ),
)

_OVER_TIME = (
    Lines(
        "Do as many requests end as come?",
        "More come than end for long: the queue grows; add executors.",
        {
            "come": rate("paceline_requests_arrived_total"),
            "end: {{outcome}}": rate_by("outcome", _ENDED),
            "refused: {{reason}}": rate_by("reason", "paceline_requests_refused_total"),
        },
        "reqps",
    ),
    Lines(
        "Does anybody wait?",
        "A queue that stays is too little capacity; one that comes and goes is a burst.",
        {
            "wait": "sum(paceline_requests_waiting)",
            "at the door": "sum(paceline_requests_at_door)",
            "run": "sum(paceline_requests_running)",
        },
    ),
    Lines(
        "For how long?",
        "The age of the oldest waiting request, and the time that executors need for all that is ahead.",
        {"oldest": "max(paceline_oldest_waiting_seconds)", "backlog": "max(paceline_backlog_seconds)"},
        "s",
        line_at=10,
    ),
    Lines(
        "How many tokens do we make?",
        "Fewer at the same load: look at Fleet for step times, at Cache for tokens that are computed twice.",
        {
            "generated": rate("paceline_tokens_generated_total"),
            "computed": rate("paceline_tokens_computed_total"),
            "of prompts that came": rate("paceline_prompt_tokens_arrived_total"),
        },
        "short",
    ),
    Lines(
        "Does the cache have room?",
        "Held near the top for long: requests are preempted or wait; see Cache.",
        {"held": "sum(paceline_blocks_held)", "all": "sum(paceline_blocks)"},
    ),
    Table(
        "Which alerts fire?",
        "docs/operations.md has a paragraph for each.",
        'ALERTS{alertname=~"Paceline.+",alertstate="firing"}',
    ),
)

OVERVIEW = Dashboard(
    "paceline-overview",
    "Paceline: are we fine?",
    "Green above and flat below: yes. Else the title of the panel says where to look.",
    (*_AT_A_GLANCE, *_OVER_TIME),
)
