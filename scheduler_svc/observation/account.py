"""Where the time of a request went, in words: made of its spans, and one of their attributes, so that every reader of a
trace has the same sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.spans import Attributes, Span, Value
from common.words import count, duration
from scheduler_svc.observation.pauses import pauses_of

ACCOUNT = "paceline.account"

# What an executor did in the steps of a decode. `wait` is not among them: a plan waits while the step before it
# runs, so that time is in there already.
_PHASES = ("forward", "prepare", "sample", "idle")
_LITTLE = 0.02  # of a whole, below which a part is not worth a word


def account_of(root: Span, parts: Sequence[Span]) -> tuple[str, ...]:
    """Sentences about the request that `root` is, of which `parts` are the children: how it ended, what held it up, and
    where its time went, by choices.
    """
    return (_outcome(root), *pauses_of(root, parts), *_shares(root, parts))


def _outcome(root: Span) -> str:
    """How it ended, and what came of it."""
    facts = root.attributes
    reasons = facts.get("gen_ai.response.finish_reasons", ())
    ended = f"ended with {', '.join(dict.fromkeys(_texts(reasons)))}" if reasons else "goes on"
    sentence = [f"{ended} after {duration(_seconds(root))}"]
    prompt, reused = _number(facts, "gen_ai.usage.input_tokens"), _number(facts, "gen_ai.usage.cache_read.input_tokens")
    if prompt:
        cached = f" ({reused:,} reused)" if reused else ""
        output = _number(facts, "gen_ai.usage.output_tokens")
        sentence.append(f"{count(prompt, 'token')} of prompt{cached} → {output:,}")
    first = facts.get("gen_ai.response.time_to_first_chunk")
    if isinstance(first, float):
        sentence.append(f"first after {duration(first)}")
    elif not reasons and not _number(facts, "gen_ai.usage.output_tokens"):
        sentence.append("no token yet")
    if again := _number(facts, "paceline.recomputations"):
        sentence.append(f"computed again {'once' if again == 1 else f'{again} times'}")
    if forgotten := _number(facts, "paceline.attempts.forgotten"):
        sentence.append(f"{count(forgotten, 'attempt')} not kept")
    return " · ".join(sentence)


def _shares(root: Span, parts: Sequence[Span]) -> list[str]:
    choices = sorted({_number(span.attributes, "paceline.choice") for span in parts})
    is_restored = any(event.name == "restored" for event in root.events)
    sentences = []
    for choice in choices:
        spans = [span for span in parts if _number(span.attributes, "paceline.choice") == choice]
        name = f"choice {choice + 1}: " if len(choices) > 1 else ""
        sentences.append(name + "; ".join(_of_choice(spans, root, choice, is_restored)))
    return sentences


def _of_choice(spans: Sequence[Span], root: Span, choice: int, is_restored: bool) -> list[str]:
    """What was done one after the other, by kind: door, queue, prefill, decode."""
    total_ns = max(1, root.end_ns - root.begin_ns)
    before_ns = accounted_ns = min(span.begin_ns for span in spans) - root.begin_ns
    sentence = []
    if before_ns > _LITTLE * total_ns:
        before = _share(before_ns, total_ns)
        if is_restored:
            sentence.append(f"{before} before the scheduler was started again, of which no more is known")
        else:
            sentence.append(f"until its prompt was read {before}" if choice else f"begun after {before}")
    for name in dict.fromkeys(span.name for span in spans):
        some = [span for span in spans if span.name == name]
        spent_ns = sum(span.end_ns - span.begin_ns for span in some) if name != "prefill" else _wall_ns(some)
        accounted_ns += spent_ns
        more = _more(name, some, is_much=spent_ns > _LITTLE * total_ns)
        sentence.append(f"{'at the door' if name == 'door' else name} {_share(spent_ns, total_ns)}{more}")
    rest_ns = total_ns - accounted_ns
    if rest_ns > _LITTLE * total_ns:
        sentence.append(f"otherwise {_share(rest_ns, total_ns)}")
    return sentence


def _share(part_ns: int, total_ns: int) -> str:
    return f"{duration(part_ns / 1e9)} ({100 * part_ns / total_ns:.0f} %)"


def _wall_ns(prefills: Iterable[Span]) -> int:
    """From the first to the last chunk of each attempt: chunks may overlap, and there may be time between them."""
    attempts: dict[Value, list[Span]] = {}
    for span in prefills:
        attempts.setdefault(span.attributes.get("paceline.attempt", 0), []).append(span)
    return sum(max(one.end_ns for one in some) - min(one.begin_ns for one in some) for some in attempts.values())


def _more(name: str, spans: Sequence[Span], *, is_much: bool) -> str:
    places = list(dict.fromkeys(str(place) for span in spans if (place := span.attributes.get("paceline.executor.id"))))
    where = f" on {' and '.join(places)}" if places else ""
    if name == "prefill":
        return f", {count(_sum(spans, 'paceline.tokens'), 'token')} in {count(_chunks(spans), 'chunk')}{where}"
    if name == "decode":
        steps = _sum(spans, "paceline.steps")
        return f", {count(steps, 'step')}{where}{_of_steps(spans)}" if steps else where
    if name == "queue":
        causes = _causes(spans, "paceline.queue.waited_for") if is_much else ""
        return (f" for {causes}" if causes else "") + (f", {len(spans)} times" if len(spans) > 1 else "")
    if name == "door" and (causes := _causes(spans, "paceline.door.held_for")):
        return f" for {causes}"
    return where


def _causes(spans: Sequence[Span], name: str) -> str:
    return " and ".join(dict.fromkeys(text for span in spans for text in _texts(span.attributes.get(name, ()))))


def _of_steps(spans: Sequence[Span]) -> str:
    """What the executor did in the steps of a decode."""
    sums = {name: sum(_float(span, f"paceline.steps.{name}_s") for span in spans) for name in _PHASES}
    whole = sum(sums.values())
    told = [f"{name} {duration(spent)}" for name, spent in sums.items() if spent > _LITTLE * whole]
    return f" ({', '.join(told)})" if told else ""


def _chunks(spans: Sequence[Span]) -> int:
    return sum(max(1, _number(span.attributes, "paceline.chunks")) for span in spans)


def _sum(spans: Sequence[Span], name: str) -> int:
    return sum(_number(span.attributes, name) for span in spans)


def _seconds(span: Span) -> float:
    return (span.end_ns - span.begin_ns) / 1e9


def _number(facts: Attributes, name: str) -> int:
    value = facts.get(name, 0)
    return value if isinstance(value, int) else 0


def _float(span: Span, name: str) -> float:
    value = span.attributes.get(name, 0.0)
    return value if isinstance(value, float) else 0.0


def _texts(value: Value) -> list[str]:
    return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]
