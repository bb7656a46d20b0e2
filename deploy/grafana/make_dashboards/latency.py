"""Where does the time go?"""

from deploy.grafana.make_dashboards.panels import Dashboard, Heatmap, Lines
from deploy.grafana.make_dashboards.queries import mean, quantiles

_FOR_USERS = (  # what they feel, and the parts of it
    Lines(
        "How long until the first token?",
        "What users feel first. The queue and the prompt beside it are its parts: work on the larger.",
        quantiles("paceline_first_token_seconds"),
        "s",
        exemplars=True,
        line_at=2.5,
    ),
    Lines(
        "How long in the queue?",
        "High: too few executors, or --max-num-seqs or the cache admit too few requests.",
        quantiles("paceline_queue_seconds"),
        "s",
        exemplars=True,
    ),
    Lines(
        "How long does the prompt take?",
        "High: long prompts share steps with many others; --policy prefill_first or a larger "
        "--max-num-batched-tokens reads them faster.",
        quantiles("paceline_prefill_seconds"),
        "s",
        exemplars=True,
    ),
    Lines(
        "How long between two tokens?",
        "Gaps as users see them. High p99 and low p50: long prompts hold up the others; lower "
        "--max-num-batched-tokens.",
        quantiles("paceline_between_tokens_seconds"),
        "s",
    ),
    Lines(
        "How fast does a request get its tokens?",
        "Mean of one request after its first token. High for all: lower --max-num-seqs or add executors.",
        quantiles("paceline_per_token_seconds"),
        "s",
        line_at=0.1,
    ),
    Lines(
        "How long does a whole request take?",
        "Grows with the length of answers: compare with output tokens below before you blame the service.",
        quantiles("paceline_request_seconds"),
        "s",
        exemplars=True,
    ),
)

_SPREAD = (
    Heatmap(
        "Who waits for a first token, and who does not?",
        "Two bands are two kinds of requests: reused and new prompts, short and long ones.",
        "paceline_first_token_seconds",
        exemplars=True,
    ),
    Heatmap(
        "Is the queue slow for all or for some?",
        "A band far above the rest are requests that others overtake.",
        "paceline_queue_seconds",
        exemplars=True,
    ),
    Heatmap(
        "Do tokens come evenly?",
        "A second band above the first are steps with long prompts, or preemptions.",
        "paceline_between_tokens_seconds",
    ),
)

_WHY = (
    Lines(
        "Queue or prompt: where does the first token's time go?",
        "Means, one on the other. The larger part is the one to work on.",
        {"queue": mean("paceline_queue_seconds"), "prompt": mean("paceline_prefill_seconds")},
        "s",
        stacked=True,
    ),
    Lines(
        "How long are prompts?",
        "Longer prompts explain slower first tokens.",
        quantiles("paceline_request_prompt_tokens"),
    ),
    Lines(
        "How long are answers?",
        "Longer answers explain slower requests.",
        quantiles("paceline_request_output_tokens"),
    ),
)

LATENCY = Dashboard(
    "paceline-latency",
    "Paceline: latency",
    "Dots are requests: a click leads to the trace of one.",
    (*_FOR_USERS, *_SPREAD, *_WHY),
)
