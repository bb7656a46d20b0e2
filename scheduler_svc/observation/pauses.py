"""What held a request up after it had begun, in words: who was lost or gave way, when, and how long that took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.spans import Attributes, Span, SpanEvent
from common.words import duration

# Events after which nobody computes a choice, or it has to begin anew; `{executor}` is the one that they name.
_WORDS = {
    "restored": "the scheduler was started again",
    "executor cut off": "{executor} was cut off",
    "executor lost": "{executor} was lost",
    "executor did not come back": "{executor} did not come back",
    "executor came back without it": "{executor} came back without it",
    "preempted": "it gave way for {cause}",
    "drained": "its executor was drained",
    "out of memory": "its executor ran out of memory",
}
_MOST = 3  # kinds of pauses that are told


@dataclass(slots=True)
class _Pause:
    """Nobody computed a choice, or its earlier tokens were computed again."""

    what: str
    choices: tuple[int, ...]
    begin_ns: int
    end_ns: int | None  # when it went on; None: it has not, or never did
    has_begun: bool  # whether its user had a token before
    more: str = ""  # what happened during it

    def until(self, end_ns: int) -> int:
        """How long it was, up to the end of the request."""
        return (end_ns if self.end_ns is None else self.end_ns) - self.begin_ns


def pauses_of(root: Span, parts: Sequence[Span]) -> list[str]:
    """A sentence for each kind of pause, the one that took most first."""
    kinds: dict[str, list[_Pause]] = {}
    for pause in _pauses(root, parts):
        kinds.setdefault(pause.what + pause.more, []).append(pause)
    longest = sorted(kinds.values(), key=lambda some: -sum(pause.until(root.end_ns) for pause in some))
    return [_sentence(some, root, "gen_ai.response.finish_reasons" in root.attributes) for some in longest[:_MOST]]


def _pauses(root: Span, parts: Sequence[Span]) -> list[_Pause]:
    choices = {_choice(span.attributes) for span in parts} or {0}
    decodes = [(span.begin_ns, _choice(span.attributes)) for span in parts if span.name == "decode"]
    pauses: list[_Pause] = []
    for event, words in _told(root):
        affected = _choices(event.attributes) or tuple(sorted(choices))
        earlier = next((one for one in reversed(pauses) if set(one.choices) & set(affected)), None)
        if earlier is not None and (earlier.end_ns is None or event.at_ns < earlier.end_ns):
            who, _, became = words.partition(" ")
            earlier.more += f" and {became if earlier.what.startswith(f'{who} ') else words}"
            continue
        begins = [begin_ns for begin_ns, choice in decodes if choice in affected]
        end_ns = min((begin_ns for begin_ns in begins if begin_ns >= event.at_ns), default=None)
        has_begun = any(begin_ns < event.at_ns for begin_ns in begins)
        pauses.append(_Pause(words, affected, event.at_ns, end_ns, has_begun))
    return pauses


def _told(root: Span) -> Iterator[tuple[SpanEvent, str]]:
    for event in sorted(root.events, key=lambda event: event.at_ns):
        if event.name in _WORDS:
            executor = event.attributes.get("paceline.executor.id", "its executor")
            cause = event.attributes.get("paceline.preempted.for", "others")
            yield event, _WORDS[event.name].format(executor=executor, cause=cause)


def _sentence(pauses: Sequence[_Pause], root: Span, has_ended: bool) -> str:
    """Example: `executor-0 was lost at +1.14 s: a pause of 3.60 s`."""
    first = pauses[0]
    at = f"at +{duration((first.begin_ns - root.begin_ns) / 1e9)}"
    took = duration(sum(pause.until(root.end_ns) for pause in pauses) / 1e9)
    if len(pauses) > 1:
        return f"{first.what}{first.more} {len(pauses)} times, first {at}: pauses of {took} in all"
    head = f"{first.what} {at}{first.more}"
    if first.end_ns is None:
        return f"{head}: {'no token came' if has_ended else 'no token has come'} in the {took} since"
    if first.has_begun:
        return f"{head}: a pause of {took}"
    # How far it was before a restart of the scheduler is not known any more.
    is_restored = any(event.name == "restored" for event in root.events)
    return f"{head}: its {'next' if is_restored else 'first'} token came {took} later"


def _choice(facts: Attributes) -> int:
    choice = facts.get("paceline.choice", 0)
    return choice if isinstance(choice, int) else 0


def _choices(facts: Attributes) -> tuple[int, ...]:
    """Whom an event concerns; () where it does not say, as there is but one."""
    several = facts.get("paceline.choices", ())
    if isinstance(several, tuple) and several:
        return tuple(one for one in several if isinstance(one, int))
    return (_choice(facts),) if "paceline.choice" in facts else ()
