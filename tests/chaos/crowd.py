"""Requests of every kind, the answers that they get when nothing happens, and readers that compare.

The answers are those of the fake model: a token depends on all tokens before it, on the seed, on the choice and on its
place, so a token that was lost, repeated or sampled anew changes everything after it.
"""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache

from executor_svc.fake import next_token
from paceline import FinishReason, PacelineError

PATIENCE_S = 90
"""How long an answer may take, with everything that happens to it."""


@dataclass(frozen=True, slots=True)
class Expected:
    """One continuation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and what it gets."""

    prompt: str
    options: dict
    choices: tuple[Expected, ...] = ()  # empty: not known yet


def greedy(prompt, count):
    """The most likely tokens."""
    return Ask(prompt, {"max_output_tokens": count}, (_whole(prompt, count),))


def seeded(prompt, count, seed):
    """Tokens by chance, the same ones each time."""
    options = {"max_output_tokens": count, "temperature": 1.0, "seed": seed}
    return Ask(prompt, options, (_whole(prompt, count, seed),))


def stopped(prompt, count, seed):
    """Ends before its length, at a text that begins in one token and ends in another."""
    whole = _whole(prompt, count, seed)
    stop = whole.text[count - 5 : count - 2]
    at = whole.text.index(stop)
    options = {"max_output_tokens": count, "temperature": 1.0, "seed": seed, "stop": [stop]}
    return Ask(prompt, options, (Expected(whole.text[:at], whole.token_ids[: at + 3], FinishReason.STOP),))


def several(prompt, count, seed):
    """Three continuations of one prompt."""
    options = {"max_output_tokens": count, "temperature": 1.0, "seed": seed, "n": 3}
    return Ask(prompt, options, tuple(_whole(prompt, count, seed, choice) for choice in range(3)))


def of_every_kind(dice, count, *, rounds=2, prompt_length=20):
    """Some requests of each kind that generate about `count` tokens each, all different."""
    asks = []
    for _ in range(rounds):
        for kind in (greedy, seeded, stopped, several):
            prompt = "".join(dice.choices("abcdefgh ", k=dice.randint(prompt_length // 2, prompt_length)))
            seed = () if kind is greedy else (dice.getrandbits(64),)
            asks.append(kind(prompt, count + dice.randint(0, 10), *seed))
    return asks


@cache
def _whole(prompt, count, seed=None, choice=0):
    known = list(prompt.encode())
    for index in range(count):
        known.append(next_token(known, seed, index, choice))
    ids = tuple(known[-count:])
    return Expected(bytes(ids).decode(), ids, FinishReason.LENGTH)


class Verdict(StrEnum):
    """What became of a request."""

    RIGHT = "right"
    LOST = "lost"  # it failed, or something is missing
    REPEATED = "repeated"  # more came, or it ended more often, than it should
    WRONG = "wrong"  # as much as it should be, but something else


@dataclass(slots=True)
class _Received:
    """What has come of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[FinishReason] = field(default_factory=list)

    def verdict(self, expected):
        reasons, length = len(self.finish_reasons), len(expected.token_ids)
        if reasons > 1 or len(self.token_ids) > length:
            return Verdict.REPEATED
        if reasons < 1 or len(self.token_ids) < length:
            return Verdict.LOST
        whole = Expected(self.text, tuple(self.token_ids), self.finish_reasons[0])
        return Verdict.RIGHT if whole == expected else Verdict.WRONG


class Reader:
    """Sends one request, reads its answer chunk by chunk, and keeps account of how it came."""

    def __init__(self, client, ask):
        self.ask = ask
        self.usage = None
        self.failure = None
        self.longest_pause_s = 0.0  # between two pieces, or before the first
        self._usage_count = 0
        self._choices = defaultdict(_Received)
        self._stream = client.generate(ask.prompt, timeout_s=PATIENCE_S, **ask.options)

    @property
    def token_count(self):
        """Tokens that have come, of all choices."""
        return sum(len(choice.token_ids) for choice in self._choices.values())

    async def read(self):
        """Read until the answer ends, well or not."""
        came_at = time.monotonic()
        try:
            async for chunk in self._stream:
                now = time.monotonic()
                self.longest_pause_s, came_at = max(self.longest_pause_s, now - came_at), now
                self._take(chunk)
        except PacelineError as error:
            self.failure = error
        return self

    def verdict(self):
        """What became of it, the worst first."""
        if self.failure or not self._usage_count:
            return Verdict.LOST
        verdicts = {self._choices[index].verdict(choice) for index, choice in enumerate(self.ask.choices)}
        if self._usage_count > 1 or len(self._choices) > len(self.ask.choices):
            verdicts.add(Verdict.REPEATED)
        return max(verdicts, key=list(Verdict).index)

    def answer(self):
        """The request, with what has come as what it gets: for a model of which nothing is known before."""
        choices = (self._choices[index] for index in range(self.ask.options.get("n", 1)))
        whole = (Expected(choice.text, tuple(choice.token_ids), choice.finish_reasons[0]) for choice in choices)
        return Ask(self.ask.prompt, self.ask.options, tuple(whole))

    def __str__(self):
        ends = [choice.finish_reasons for choice in self._choices.values()]
        got = "".join(f"\n  got      {choice.text!r}" for choice in self._choices.values())
        wanted = "".join(f"\n  expected {choice.text!r}" for choice in self.ask.choices)
        return f"{self.verdict()}: {self._stream.request_id} {self.ask.options} {self.failure} {ends}{got}{wanted}"

    def _take(self, chunk):
        choice = self._choices[chunk.choice]
        choice.text += chunk.text
        choice.token_ids.extend(chunk.token_ids)
        if chunk.finish_reason:
            choice.finish_reasons.append(chunk.finish_reason)
        if chunk.usage:
            self.usage = chunk.usage
            self._usage_count += 1


class Crowd:
    """Readers at work."""

    def __init__(self, client, asks):
        self.readers = [Reader(client, ask) for ask in asks]
        self._reading = [asyncio.create_task(reader.read()) for reader in self.readers]

    @property
    def is_done(self):
        """Whether every answer has ended."""
        return all(task.done() for task in self._reading)

    async def has_begun(self, token_count=3):
        """Wait until every request has so many tokens."""
        async with asyncio.timeout(PATIENCE_S):
            while not all(reader.token_count >= token_count or reader.failure for reader in self.readers):
                await asyncio.sleep(0.005)
        assert not self.is_done, "the answers are too short for what is to happen to them"

    async def recomputation_counts(self):
        """Read everything to its end; assert that nobody could tell that anything happened, but by waiting.

        Returns how often each request was computed again.
        """
        await asyncio.gather(*self._reading)
        bad = [str(reader) for reader in self.readers if reader.verdict() is not Verdict.RIGHT]
        assert not bad, "\n".join(bad)
        return [reader.usage.recomputation_count for reader in self.readers]
