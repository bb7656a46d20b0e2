"""Is there room?"""

from deploy.grafana.make_dashboards.panels import Dashboard, Lines
from deploy.grafana.make_dashboards.queries import rate, rate_by

_RECOMPUTED, _COMPUTED = "paceline_tokens_recomputed_total", "paceline_tokens_computed_total"
_REUSED, _PLACED = "paceline_tokens_reused_total", "paceline_prompt_tokens_placed_total"

_ROOM = (
    Lines(
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
    Lines(
        "How full is each executor?",
        "One full and others empty: its requests share a beginning; that is meant, until it preempts.",
        {"{{executor_id}}": "paceline_executor_blocks_held / paceline_executor_blocks"},
        "percentunit",
        width=12,
    ),
)

_COMPUTED_TWICE_OR_NOT_AT_ALL = (
    Lines(
        "How much of the prompts need not be computed?",
        "Low although prompts begin alike: the cache is too small to keep them, cache_salt separates them, or "
        "--no-prefix-reuse is set.",
        {"hit rate": f"{rate(_REUSED)} / {rate(_PLACED)}"},
        "percentunit",
    ),
    Lines(
        "Is anybody preempted?",
        "Often above 0: more --cache-memory or fewer --max-num-seqs.",
        {"preemptions": rate("paceline_preemptions_total")},
        "ops",
    ),
    Lines(
        "How much is computed twice?",
        "Above the line throughput is lost. With preemptions: cache. Without: executors are lost, see below.",
        {"recomputed": f"{rate(_RECOMPUTED)} / {rate(_COMPUTED)}"},
        "percentunit",
        line_at=0.05,
    ),
)

_LOAD = (
    Lines(
        "Who had to go on elsewhere, and why?",
        "lost: see the executor's log and machine. out_of_memory: lower --gpu-memory-utilization there. "
        "drained: meant.",
        {"{{cause}}": rate_by("cause", "paceline_moves_total")},
        "ops",
    ),
    Lines(
        "How many tokens wait and run?",
        "Running tokens times the bytes of one are what the cache has to hold.",
        {"wait": "sum(paceline_waiting_tokens)", "run": "sum(paceline_running_tokens)"},
    ),
    Lines(
        "How large is the cache of each executor?",
        "Less than you expect: see its log line `executor ready`, and --cache-memory.",
        {"{{executor_id}}": "paceline_cache_bytes"},
        "bytes",
    ),
)

CACHE = Dashboard(
    "paceline-cache",
    "Paceline: cache",
    "Keys and values: who holds them, who is spared computing, who has to compute again.",
    (*_ROOM, *_COMPUTED_TWICE_OR_NOT_AT_ALL, *_LOAD),
)
