"""Where the time of a request went, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from paceline_cli.sight.spans import Span
from paceline_cli.sight.words import count, duration, plain

# What an executor did in the steps of a decode. `wait` is not among them: a plan waits while the step before it
# runs, so that time is in there already.
_PHASES = ("forward", "prepare", "sample", "idle")
_LITTLE = 0.02  # of a whole, below which a part is not worth a word


def account_of(root: Span) -> list[str]:
    """Sentences about the time of the request that `root` is, the most telling first."""
    total_ns = max(1, root.end_ns - root.begin_ns)
    choices = sorted({span.choice for span in root.children}) or [0]
    lines = []
    for choice in choices:
        spans = [span for span in root.children if span.choice == choice]
        name = f"choice {choice + 1}: " if len(choices) > 1 else ""
        lines.append(name + "; ".join(_parts(spans, root.begin_ns, total_ns)))
    return [line for line in lines if line]


def outcome_of(root: Span) -> str:
    """How it ended, and what came of it."""
    facts = root.facts
    reasons = facts.get("gen_ai.response.finish_reasons", ())
    ended = f"ended with {', '.join(dict.fromkeys(map(str, reasons)))}" if reasons else "goes on"
    parts = [f"{ended} after {duration((root.end_ns - root.begin_ns) / 1e9)}"]
    prompt, reused = facts.get("gen_ai.usage.input_tokens"), facts.get("gen_ai.usage.cache_read.input_tokens")
    if prompt is not None:
        cached = f" ({reused:,} reused)" if reused else ""
        parts.append(f"{count(prompt, 'token')} of prompt{cached} → {facts.get('gen_ai.usage.output_tokens', 0):,}")
    first = facts.get("gen_ai.response.time_to_first_chunk")
    parts.append(
        "no token yet" if first is None and not reasons else "" if first is None else f"first after {duration(first)}"
    )
    if again := facts.get("paceline.recomputations"):
        parts.append(f"computed again {'once' if again == 1 else f'{again} times'}")
    if forgotten := facts.get("paceline.attempts.forgotten"):
        parts.append(f"{count(forgotten, 'attempt')} not kept")
    return plain(" · ".join(part for part in parts if part))


def _parts(spans: Sequence[Span], begin_ns: int, total_ns: int) -> list[str]:
    """What was done one after the other, by kind: queue, prefill, decode."""
    if not spans:
        return []
    accounted_ns = spans[0].begin_ns - begin_ns
    parts = [f"begun after {_share(accounted_ns, total_ns)}"] if accounted_ns > _LITTLE * total_ns else []
    for name in dict.fromkeys(span.name for span in spans):
        some = [span for span in spans if span.name == name]
        spent_ns = sum(span.end_ns - span.begin_ns for span in some) if name != "prefill" else _wall_ns(some)
        accounted_ns += spent_ns
        parts.append(f"{name} {_share(spent_ns, total_ns)}{_more(name, some)}")
    rest_ns = total_ns - accounted_ns
    if rest_ns > _LITTLE * total_ns:
        parts.append(f"otherwise {_share(rest_ns, total_ns)}")
    return parts


def _share(part_ns: int, total_ns: int) -> str:
    return f"{duration(part_ns / 1e9)} ({100 * part_ns / total_ns:.0f} %)"


def _wall_ns(prefills: Iterable[Span]) -> int:
    """From the first to the last chunk of each attempt: chunks may overlap, and there may be time between them."""
    attempts: dict[tuple[str, int], list[Span]] = {}
    for span in prefills:
        attempts.setdefault((span.executor_id, span.attempt), []).append(span)
    return sum(max(one.end_ns for one in some) - min(one.begin_ns for one in some) for some in attempts.values())


def _more(name: str, spans: Sequence[Span]) -> str:
    places = list(dict.fromkeys(plain(span.executor_id) for span in spans if span.executor_id))
    where = f" on {' and '.join(places)}" if places else ""
    if name == "prefill":
        chunks = sum(int(span.facts.get("paceline.chunks", 1)) for span in spans)
        tokens = sum(int(span.facts.get("paceline.tokens", 0)) for span in spans)
        return f", {count(tokens, 'token')} in {count(chunks, 'chunk')}{where}"
    if name == "decode":
        steps = sum(int(span.facts.get("paceline.steps", 0)) for span in spans)
        return f", {count(steps, 'step')}{where}{_of_steps(spans)}" if steps else where
    if name == "queue" and len(spans) > 1:
        return f", {len(spans)} times"
    return where


def _of_steps(spans: Sequence[Span]) -> str:
    """What the executor did in the steps of a decode."""
    sums: dict[str, Any] = {
        name: sum(float(span.facts.get(f"paceline.steps.{name}_s", 0)) for span in spans) for name in _PHASES
    }
    whole = sum(sums.values())
    told = [f"{name} {duration(spent)}" for name, spent in sums.items() if spent > _LITTLE * whole]
    return f" ({', '.join(told)})" if told else ""
