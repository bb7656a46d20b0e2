"""Attention by its definition, in float64, over keys that lie in scattered blocks."""

from collections.abc import Sequence

import numpy as np
import torch

from executor_svc.attention.backend import ScoreRule
from executor_svc.layer_groups import Visibility


def scattered_tables(context_lengths: np.ndarray, block_size: int) -> np.ndarray:
    """Block tables in no order. Block 0 belongs to nobody: padding of the tables points at it."""
    block_counts = -(-context_lengths // block_size)
    block_ids = np.random.default_rng(3).permutation(np.arange(1, block_counts.sum() + 1))
    tables = np.zeros((len(context_lengths), block_counts.max() + 2), dtype=np.int32)
    for row, ids in enumerate(np.split(block_ids, np.cumsum(block_counts)[:-1])):
        tables[row, : len(ids)] = ids
    return tables


def slots_of_rows(tables: np.ndarray, context_lengths: np.ndarray, block_size: int, stride: int) -> list[np.ndarray]:
    """The slot of every position, for each row."""
    return [
        table[np.arange(count) // block_size] * stride + np.arange(count) % block_size
        for table, count in zip(tables, context_lengths, strict=True)
    ]


def naive(
    query: torch.Tensor,  # [query heads, T, dim]
    keys: torch.Tensor,  # [slots, key heads, dim]
    values: torch.Tensor,  # [slots, key heads, value dim]
    slots: tuple[list[np.ndarray], list[np.ndarray]],  # of the keys and of the values of each row
    query_lengths: Sequence[int],
    visibility: Visibility,
    rule: ScoreRule,
) -> torch.Tensor:
    """One query and one head at a time: `[T, query heads, value dim]`."""
    query, keys, values = query.double(), keys.double(), values.double()
    group_size = len(query) // keys.shape[1]
    output, token = [], 0
    for key_slots, value_slots, query_length in zip(*slots, query_lengths, strict=True):
        for position in range(len(key_slots) - query_length, len(key_slots)):
            visible = [key for key in range(position + 1) if _sees(position, key, visibility)]
            for head in range(len(query)):
                key_head = head // group_size
                scores = keys[key_slots[visible], key_head] @ query[head, token] * rule.scaling
                if rule.softcap:
                    scores = torch.tanh(scores / rule.softcap) * rule.softcap
                if rule.sinks is not None:
                    scores = torch.cat([scores, rule.sinks[head : head + 1].double()])
                weights = scores.softmax(0)[: len(visible)]
                output.append(weights @ values[value_slots[visible], key_head])
            token += 1
    return torch.stack(output).view(token, len(query), -1)


def _sees(position: int, key: int, visibility: Visibility) -> bool:
    is_in_window = not visibility.window or position - key < visibility.window
    return is_in_window and (not visibility.chunk or position // visibility.chunk == key // visibility.chunk)
