"""Which nodes to take for what is missing, at the least cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from autoscaler_svc.scaling_settings import NodeType

_PARTS = 20
"""Parts of an executor's capacity that are told apart: 0.05."""


def cheapest(missing: float, node_types: Sequence[NodeType], present: Mapping[str, int]) -> Counter[str]:
    """How many more of each type together have at least `missing` capacity, at the lowest price per hour; as much as
    there is where all of them are not enough. Of equal prices fewer executors win, then the type named first.

    A knapsack that has to be filled, over capacities in steps of 0.05. Greedy choice by price per capacity overpays
    where one small node would do for the rest.

    Example: 5 missing, types of capacity 4 for 3.0 and 1 for 1.0: one of each, for 4.0; for 1 missing: the small one.
    """
    needed = math.ceil(missing * _PARTS - 1e-9)
    if needed <= 0:
        return Counter()
    # best[c]: (price, count, types taken) of the cheapest choice with at least c parts, among those looked at so far
    best: list[tuple[float, int, Counter[str]] | None] = [(0.0, 0, Counter()), *[None] * needed]
    for node_type in node_types:
        parts = max(1, round(node_type.capacity * _PARTS))
        room = node_type.max - present.get(node_type.name, 0)
        before = list(best)
        for have in range(needed + 1):
            for several in range(1, min(room, math.ceil((needed - have) / parts)) + 1 if have < needed else 1):
                start = before[have]
                if start is None:
                    break
                reached = min(needed, have + several * parts)
                price = start[0] + several * node_type.price_per_hour
                rival = best[reached]
                if rival is None or (price, start[1] + several) < (round(rival[0], 9), rival[1]):
                    best[reached] = price, start[1] + several, start[2] + Counter({node_type.name: several})
    return next(choice[2] for choice in reversed(best) if choice is not None)
