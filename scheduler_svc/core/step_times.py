"""How long an executor's steps take, learnt from those that it has run."""

import math
from collections import deque

_MEMORY = 0.98
"""Weight that an observation keeps with each later one: about the last fifty count."""

_FEW = 16
"""Observations before anything is said to be certain: first steps are slow."""

_FASTEST_OF = 256
"""Observations among which the fastest says how fast it can be."""

_FORGET_AFTER_S = 30.0
"""Without a step for so long, nothing is certain any more: who is refused by it teaches nothing new."""


class StepTimes:
    """A line through (tokens of a step, seconds it took), fitted to the last steps with fading weights.

    What was never seen costs nothing here: an executor without a past looks fast until it has one.
    """

    def __init__(self, step_token_count: int) -> None:
        """Start knowing nothing of steps that compute up to `step_token_count` tokens."""
        self._large = step_token_count // 2  # tokens from which a step counts as a large one
        self.observation_count = 0
        self._weight = 0.0
        self._tokens = self._seconds = 0.0  # weighted means
        self._tokens_squared = self._tokens_seconds = 0.0  # weighted means of products
        self._last_steps: deque[float] = deque(maxlen=_FASTEST_OF)  # seconds
        self._last_large_steps: deque[float] = deque(maxlen=_FASTEST_OF)
        self._least: tuple[float, float] | None = None  # the least of each; None: to be worked out
        self._observed_at = -math.inf

    def observe(self, token_count: int, seconds: float, now: float) -> None:
        """Take in a step that computed `token_count` tokens; it was planned at `now`."""
        self.observation_count += 1
        self._observed_at = now
        self._last_steps.append(seconds)
        if token_count >= self._large:
            self._last_large_steps.append(seconds)
        self._least = None
        self._weight = self._weight * _MEMORY + 1.0
        share = 1.0 / self._weight
        self._tokens += share * (token_count - self._tokens)
        self._seconds += share * (seconds - self._seconds)
        self._tokens_squared += share * (token_count * token_count - self._tokens_squared)
        self._tokens_seconds += share * (token_count * seconds - self._tokens_seconds)

    def seconds(self, step_count: int, token_count: int) -> float:
        """Expected seconds for steps that compute `token_count` tokens together."""
        per_token, per_step = self.line()
        return step_count * per_step + token_count * per_token

    def least_seconds(self, step_count: int, token_count: int, now: float) -> float:
        """Seconds that these steps take at the very least, going by the fastest of late: what work is refused by."""
        if self.observation_count < _FEW or now - self._observed_at > _FORGET_AFTER_S:
            return 0.0
        if self._least is None:
            of_all = min(self._last_steps)
            self._least = of_all, min(self._last_large_steps, default=of_all)
        of_all, of_large = self._least
        return step_count * (of_large if token_count >= self._large * step_count else of_all)

    def line(self) -> tuple[float, float]:
        """(seconds for a token, seconds for a step), neither below 0."""
        variance = self._tokens_squared - self._tokens * self._tokens
        if variance < 0.01 * self._tokens * self._tokens + 1e-9:  # steps of one size say nothing of others
            return 0.0, self._seconds
        slope = (self._tokens_seconds - self._tokens * self._seconds) / variance
        slope = min(max(slope, 0.0), self._seconds / self._tokens)
        return slope, self._seconds - slope * self._tokens
