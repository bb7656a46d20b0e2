"""The portable attention backend against a plain float64 computation of the same rule."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc.attention import layout as layout_module
from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import KeySource, StepLayout, split_by_length
from executor_svc.attention.torch_backend import TorchAttention
from executor_svc.batch import NO_BLOCK, LayerGroup
from executor_svc.layer_groups import FULL, Visibility
from tests.executor_svc.attention_reference import naive, scattered_tables, slots_of_rows

BLOCK_SIZE = 4


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
    decode_token_limit: int = 1 << 20
    key_stride: int = BLOCK_SIZE  # from block to block: longer where a block has room for other layers too
    value_stride: int = BLOCK_SIZE
    gathered: bool = False  # the model is handed all keys end to end, as one that expands them needs
    stale_entry: int = NO_BLOCK  # of the block tables, behind what is seen


def attend(case: Case, dtype: torch.dtype = torch.float32, poison: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backend computes and what it should, `[tokens, heads, dim]`; slots that nobody sees hold `poison`."""
    query_lengths, context_lengths = np.array(case.query_lengths), np.array(case.context_lengths)
    tables = scattered_tables(context_lengths, BLOCK_SIZE)
    padding_block = int(tables.max()) + 1
    draw = np.random.default_rng(4)
    head_count = case.key_heads * case.group_size
    keys = draw.normal(size=((padding_block + 1) * case.key_stride, case.key_heads, case.key_dim))
    values = draw.normal(size=((padding_block + 1) * case.value_stride, case.key_heads, case.value_dim))
    query = draw.normal(size=(head_count, query_lengths.sum(), case.key_dim))
    sinks = torch.from_numpy(draw.normal(size=head_count)).to(dtype) if case.has_sinks else None
    first_seen = case.visibility.first_key(context_lengths - query_lengths)
    key_slots = slots_of_rows(tables, context_lengths, BLOCK_SIZE, case.key_stride)
    value_slots = slots_of_rows(tables, context_lengths, BLOCK_SIZE, case.value_stride)
    if poison:
        for array, slots in ((keys, key_slots), (values, value_slots)):
            seen = np.concatenate([row[first:] for row, first in zip(slots, first_seen, strict=True)])
            array[np.setdiff1d(np.arange(len(array) * padding_block // (padding_block + 1)), seen)] = poison
    keys, values, query = (torch.from_numpy(array).to(dtype) for array in (keys, values, query))
    rule = ScoreRule(0.3, case.softcap, sinks)
    expected = naive(query, keys, values, (key_slots, value_slots), case.query_lengths, case.visibility, rule)
    layout = StepLayout(
        query_lengths,
        context_lengths,
        [np.where(np.arange(tables.shape[1]) < (first_seen // BLOCK_SIZE)[:, None], case.stale_entry, tables)],
        groups=[LayerGroup(BLOCK_SIZE, case.visibility.window, case.visibility.chunk)],
        padding_block=padding_block,
        decode_token_limit=case.decode_token_limit,
        gathered=case.gathered,
        device=torch.device("cpu"),
    )
    source = KeySource(0, case.visibility, case.key_heads, case.key_stride, case.value_stride)
    if case.gathered:
        keys, values = keys[layout.read_slots(0, case.key_stride)], values[layout.read_slots(0, case.value_stride)]
        source = KeySource(0, case.visibility, case.key_heads)
        assert len(keys) == (context_lengths - first_seen).sum() + 1, "more is gathered than is seen"
    backend, parts = TorchAttention(), layout.parts(source)
    backend.attend(torch.randn_like(query), keys, values, parts, rule)  # what its scratch memory keeps is no matter
    return backend.attend(query, keys, values, parts, rule), expected


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
    "parts of two short rows": changed(decode_token_limit=16),
    "blocks with room for other layers": changed(key_stride=12, value_stride=12, visibility=Visibility(window=6)),
    "keys and values at other strides": changed(key_stride=8, value_stride=12, value_dim=3),
    "gathered": changed(gathered=True),
    "gathered window": changed(gathered=True, visibility=Visibility(window=6), key_stride=8),
    "gathered chunks": changed(gathered=True, visibility=Visibility(chunk=8), softcap=0.7),
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


@pytest.mark.parametrize("stale_entry", [NO_BLOCK, 0, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_never_reads_what_is_not_the_rows_own(case, stale_entry):
    """Padding and blocks that were given back may hold anything, even NaN: nobody may break his neighbours."""
    actual, expected = attend(replace(case, stale_entry=stale_entry), poison=float("nan"))

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
    decode_token_limit=st.sampled_from([1, 24, 1 << 20]),
    gathered=st.booleans(),
)
def test_any_mixture_of_rows_computes_the_rule(rows, window, decode_token_limit, gathered):
    """The scheduler mixes rows freely; no mixture may be special."""
    case = Case(
        query_lengths=tuple(query for query, _ in rows),
        context_lengths=tuple(query + past for query, past in rows),
        visibility=Visibility(window=window),
        decode_token_limit=decode_token_limit,
        gathered=gathered,
    )
    actual, expected = attend(case, poison=float("nan"))

    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-5)


def test_one_very_long_row_is_computed_alone():
    """Otherwise every short row would be padded to its length, in memory and in time."""
    parts = [part.tolist() for part in split_by_length(np.array([100, 9000, 90]), token_limit=1 << 20)]

    assert parts == [[1], [0, 2]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 5000), max_size=40), token_limit=st.integers(1, 20_000))
def test_parts_hold_every_row_once_within_the_limit(lengths, token_limit):
    """The limit is what keeps decode attention inside its scratch memory."""
    parts = list(split_by_length(np.array(lengths, dtype=np.int64), token_limit))

    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(lengths)))
    assert all(len(part) == 1 or max(lengths[row] for row in part) * len(part) <= token_limit for part in parts)


def test_a_step_that_writes_where_it_has_no_block_is_a_bug_that_shows():
    """A negative block would count from the end of the pool, where another request's tokens are."""
    layout = StepLayout(
        np.array([1]),
        np.array([6]),
        [np.array([[3, NO_BLOCK]], dtype=np.int32)],
        groups=[LayerGroup(BLOCK_SIZE)],
        padding_block=9,
        decode_token_limit=1,
        gathered=False,
        device=torch.device("cpu"),
    )

    with pytest.raises(AssertionError, match="without a block"):
        layout.write_slots(0, BLOCK_SIZE)
