"""The portable attention backend against a plain float64 computation of the same rule."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc.attention import layout as layout_module
from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import StepLayout, Visibility, group_by_length
from executor_svc.attention.torch_backend import TorchAttention

BLOCK_SIZE = 4
FULL = Visibility()


@dataclass(frozen=True)
class Case:
    """Rows of one step over a pool of random keys and values."""

    query_lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    key_heads: int = 2
    group_size: int = 3
    key_dim: int = 8
    value_dim: int = 8
    visibility: Visibility = FULL
    softcap: float = 0.0
    has_sinks: bool = False
    group_token_limit: int = 1 << 20


def attend(case: Case, dtype: torch.dtype = torch.float32, poison: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backend computes and what it should, `[tokens, heads, dim]`; unowned slots hold `poison`."""
    draw = np.random.default_rng(3)
    query_lengths, context_lengths = np.array(case.query_lengths), np.array(case.context_lengths)
    block_counts = -(-context_lengths // BLOCK_SIZE)
    # Block 0 belongs to nobody: padding of the tables points at it.
    block_ids = draw.permutation(np.arange(1, block_counts.sum() + 1))
    tables = np.zeros((len(query_lengths), block_counts.max() + 2), dtype=np.int32)
    for row, ids in enumerate(np.split(block_ids, np.cumsum(block_counts)[:-1])):
        tables[row, : len(ids)] = ids
    padding_slot = (len(block_ids) + 1) * BLOCK_SIZE
    keys = torch.from_numpy(draw.normal(size=(padding_slot + 1, case.key_heads, case.key_dim)))
    values = torch.from_numpy(draw.normal(size=(padding_slot + 1, case.key_heads, case.value_dim)))
    head_count = case.key_heads * case.group_size
    query = torch.from_numpy(draw.normal(size=(head_count, query_lengths.sum(), case.key_dim)))
    sinks = torch.from_numpy(draw.normal(size=head_count)) if case.has_sinks else None
    keys, values, query = (tensor.to(dtype) for tensor in (keys, values, query))
    owned = np.concatenate(
        [
            tables[row, np.arange(count) // BLOCK_SIZE] * BLOCK_SIZE + np.arange(count) % BLOCK_SIZE
            for row, count in enumerate(context_lengths)
        ]
    )
    if poison:
        unowned = np.setdiff1d(np.arange(padding_slot), owned)
        keys[unowned], values[unowned] = poison, poison
    layout = StepLayout(
        query_lengths,
        context_lengths,
        tables,
        block_size=BLOCK_SIZE,
        padding_slot=padding_slot,
        group_token_limit=case.group_token_limit,
        gathered=False,
        device=torch.device("cpu"),
    )
    rule = ScoreRule(0.3, case.softcap, sinks)
    backend = TorchAttention()
    parts = layout.parts(case.visibility, case.key_heads)
    backend.attend(torch.randn_like(query), keys, values, parts, rule)  # what its scratch memory keeps is no matter
    actual = backend.attend(query, keys, values, parts, rule)
    return actual, naive(
        case, query.double(), keys.double(), values.double(), np.split(owned, np.cumsum(context_lengths)[:-1]), rule
    )


def naive(case, query, keys, values, owned, rule) -> torch.Tensor:
    """One query and one head at a time, by the definition."""
    output, token = [], 0
    for slots, query_length in zip(owned, case.query_lengths, strict=True):
        for position in range(len(slots) - query_length, len(slots)):
            visible = [
                slot
                for key_position, slot in enumerate(slots.tolist())
                if key_position <= position
                and (not case.visibility.window or position - key_position < case.visibility.window)
                and (
                    not case.visibility.chunk
                    or position // case.visibility.chunk == key_position // case.visibility.chunk
                )
            ]
            for head in range(len(query)):
                key_head = head // case.group_size
                scores = keys[visible, key_head] @ query[head, token] * rule.scaling
                if rule.softcap:
                    scores = torch.tanh(scores / rule.softcap) * rule.softcap
                if rule.sinks is not None:
                    scores = torch.cat([scores, rule.sinks[head : head + 1].double()])
                weights = scores.softmax(0)[: len(visible)]
                output.append(weights @ values[visible, key_head])
            token += 1
    return torch.stack(output).view(token, len(query), -1)


MIXED = Case(query_lengths=(1, 9, 1, 5, 1, 1), context_lengths=(30, 9, 1, 23, 7, 8))


def changed(**changes) -> Case:
    return Case(**({"query_lengths": MIXED.query_lengths, "context_lengths": MIXED.context_lengths} | changes))


CASES = {
    "plain": MIXED,
    "only decodes of equal length": Case((1, 1, 1), (12, 12, 12)),
    "one head per group": changed(group_size=1),
    "one key head": changed(key_heads=1, group_size=6),
    "values narrower than keys": changed(value_dim=3),
    "window": changed(visibility=Visibility(window=6)),
    "window of one": changed(visibility=Visibility(window=1)),
    "chunks": changed(visibility=Visibility(chunk=8)),
    "softcap": changed(softcap=0.7),
    "sinks": changed(has_sinks=True),
    "softcap, sinks and window": changed(softcap=0.7, has_sinks=True, visibility=Visibility(window=6)),
    "groups of two short rows": changed(group_token_limit=16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_computes_the_rule(case):
    """Every model family asks for another mixture of these; each must be exact."""
    actual, expected = attend(case)

    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", [MIXED, CASES["sinks"]], ids=["plain", "sinks"])
def test_prompts_cut_into_parts_compute_the_same(case, monkeypatch):
    """A very long context is computed in parts to bound memory."""
    monkeypatch.setattr(layout_module, "SCORE_LIMIT", 30)
    actual, expected = attend(case)

    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_never_reads_what_is_not_the_rows_own(case):
    """Padding and stale blocks may hold anything, even NaN: a broken request must not break its neighbours."""
    actual, expected = attend(case, poison=float("nan"))

    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", [MIXED, CASES["softcap"]], ids=["plain", "softcap"])
def test_bfloat16_loses_no_more_than_rounding(case):
    """Scores and softmax stay float32: only keys, values and the result are rounded."""
    actual, expected = attend(case, torch.bfloat16)

    torch.testing.assert_close(actual.double(), expected, atol=0.03, rtol=0.02)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 20)), min_size=1, max_size=6),
    window=st.sampled_from([0, 1, 5, 16]),
    group_token_limit=st.sampled_from([1, 24, 1 << 20]),
)
def test_any_mixture_of_rows_computes_the_rule(rows, window, group_token_limit):
    """The scheduler mixes rows freely; no mixture may be special."""
    case = Case(
        query_lengths=tuple(query for query, _ in rows),
        context_lengths=tuple(query + past for query, past in rows),
        visibility=Visibility(window=window),
        group_token_limit=group_token_limit,
    )
    actual, expected = attend(case)

    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-5)


def test_one_very_long_row_is_a_group_of_its_own():
    """Otherwise every short row would be padded to its length, in memory and in time."""
    groups = [group.tolist() for group in group_by_length(np.array([100, 9000, 90]), token_limit=1 << 20)]

    assert groups == [[1], [0, 2]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 5000), max_size=40), token_limit=st.integers(1, 20_000))
def test_groups_hold_every_row_once_within_the_limit(lengths, token_limit):
    """The limit is what keeps decode attention inside its scratch memory."""
    groups = list(group_by_length(np.array(lengths, dtype=np.int64), token_limit))

    assert sorted(row for group in groups for row in group.tolist()) == list(range(len(lengths)))
    assert all(len(group) == 1 or max(lengths[row] for row in group) * len(group) <= token_limit for group in groups)
