"""Whether the requests on an executor will still fit when they have grown."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_MEMORY = 0.98
"""Weight that an ended request keeps with each later one: about the last fifty count."""

_PRIOR_SHARE, _PRIOR_WEIGHT = 0.5, 4.0


class LengthOutlook:
    """What share of the output that they may have requests have had, those that ended last."""

    def __init__(self) -> None:
        """Start with half, not very sure of it."""
        self._shares = _PRIOR_SHARE * _PRIOR_WEIGHT
        self._weight = _PRIOR_WEIGHT

    @property
    def share(self) -> float:
        """Expected part, 0 to 1, of what a request may still generate that it will."""
        return self._shares / self._weight

    def note_ended(self, output_count: int, max_output_count: int) -> None:
        """A request ended by itself."""
        self._shares = self._shares * _MEMORY + output_count / max_output_count
        self._weight = self._weight * _MEMORY + 1.0


def steps_until_full(
    block_count: int,
    held: float,
    token_counts: NDArray[np.float64],
    remaining: NDArray[np.float64],
    blocks_per_token: float,
) -> float:
    """Steps until requests that run together need more than `block_count` blocks; infinity if they never do.

    They hold `held` together now, in proportion to their `token_counts`; each grows by a token a step and gives all
    back after its `remaining` steps. What they need is highest just before one of them ends, when it and all that end
    later are there: the "future required memory" of Gong et al., "Past-Future Scheduler for LLM Serving under SLA
    Guarantees" (ASPLOS 2025).

    Example: two requests of 10 tokens, one with 5 and one with 20 to go, a block a token. They need 30 blocks before
    the first ends, and 30 before the second does. With 29 they are full after 4.5 steps.
    """
    longest_first = np.argsort(-remaining)
    held_by_longest = np.cumsum(token_counts[longest_first]) * (held / token_counts.sum())
    growth = np.arange(1, len(remaining) + 1) * blocks_per_token
    full_after = (block_count - held_by_longest) / growth
    too_early = full_after[full_after < remaining[longest_first]]
    return float(too_early.min()) if len(too_early) else math.inf
