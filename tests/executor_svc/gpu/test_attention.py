"""Triton's paged attention against float64: interpreted on a CPU, for real where there is a GPU."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import KeySource
from executor_svc.batch import NO_BLOCK, LayerGroup
from executor_svc.gpu import attention
from executor_svc.gpu.attention import Splits, Tiles
from executor_svc.gpu.inputs import StepInputs, inputs_of
from executor_svc.layer_groups import FULL, Visibility
from tests.executor_svc.attention_reference import naive, scattered_tables, slots_of_rows

SPLITS = Splits(3, 8)
TILES = Tiles(16, 16, 4, 2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = {"atol": 3e-6, "rtol": 1e-5}


@dataclass(frozen=True)
class Case:
    """Rows of one step over a pool of random keys and values; what nobody sees of it is NaN."""

    query_lengths: tuple[int, ...] = (1, 9, 5, 1)
    context_lengths: tuple[int, ...] = (30, 9, 23, 1)
    key_heads: int = 2
    group_size: int = 3
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 4
    key_stride: int = 4  # from block to block: longer where a block has room for other layers too
    value_stride: int = 4
    visibility: Visibility = FULL
    softcap: float = 0.0
    has_sinks: bool = False
    padding_rows: int = 0
    padding_tokens: int = 0  # behind the last row's
    stale_entry: int = NO_BLOCK  # of the block tables, before what is seen
    splits: Splits = SPLITS
    tiles: Tiles = TILES
    dtype: torch.dtype = torch.float32
    token_major: bool = True  # how the query lies in memory

    @property
    def is_decode(self) -> bool:
        return set(self.query_lengths) == {1}


class Pool:
    """What the kernels of a case read, and what they should give."""

    def __init__(self, case: Case) -> None:
        draw = np.random.default_rng(4)
        self.case = case
        query_lengths, self.contexts = np.array(case.query_lengths), np.array(case.context_lengths)
        self.tables = scattered_tables(self.contexts, case.block_size)
        self.block_count = int(self.tables.max()) + 1
        self.first_seen = case.visibility.first_key(self.contexts - query_lengths)
        self.keys, self.key_slots = self._random(draw, case.key_stride, case.key_dim)
        self.values, self.value_slots = self._random(draw, case.value_stride, case.value_dim)
        head_count = case.key_heads * case.group_size
        token_count = int(query_lengths.sum()) + case.padding_tokens + case.padding_rows * case.is_decode
        self.query = self._tensor(draw.normal(size=(head_count, token_count, case.key_dim)))
        sinks = self._tensor(draw.normal(size=head_count)) if case.has_sinks else None
        self.rule = ScoreRule(0.3, case.softcap, sinks)
        self.source = KeySource(1, case.visibility, case.key_heads, case.key_stride, case.value_stride)

    def _random(self, draw: np.random.Generator, stride: int, dim: int) -> tuple[torch.Tensor, list[np.ndarray]]:
        numbers = draw.normal(size=(self.block_count * stride, self.case.key_heads, dim))
        slots = slots_of_rows(self.tables, self.contexts, self.case.block_size, stride)
        seen = np.concatenate([row[first:] for row, first in zip(slots, self.first_seen, strict=True)])
        numbers[np.setdiff1d(np.arange(len(numbers)), seen)] = np.nan
        return self._tensor(numbers), slots

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(DEVICE, self.case.dtype)

    def inputs(self) -> StepInputs:
        """The step, in the second of two layer groups; padding is as a step has it that fills static tensors."""
        case = self.case
        is_gone = np.arange(self.tables.shape[1]) < (self.first_seen // case.block_size)[:, None]
        inputs = inputs_of(
            np.array(case.query_lengths),
            self.contexts,
            [np.full_like(self.tables, 10_000), np.where(is_gone, case.stale_entry, self.tables)],
            torch.zeros(sum(case.query_lengths)),
            torch.zeros(0),
            (LayerGroup(case.block_size), LayerGroup(case.block_size, case.visibility.window, case.visibility.chunk)),
            DEVICE,
        )
        row_tokens = case.padding_rows * case.is_decode
        end = inputs.row_starts[-1]
        ends = end + torch.arange(1, case.padding_rows + 1, device=DEVICE).clamp(max=row_tokens)
        token_padding = (0, row_tokens + case.padding_tokens)
        return replace(
            inputs,
            token_ids=torch.nn.functional.pad(inputs.token_ids, token_padding),
            positions=torch.nn.functional.pad(inputs.positions, token_padding, value=3),
            rows=torch.nn.functional.pad(inputs.rows, token_padding, value=-1),
            row_starts=torch.cat([inputs.row_starts, ends.int()]),
            contexts=torch.nn.functional.pad(inputs.contexts, (0, case.padding_rows)),
            table_starts=torch.nn.functional.pad(inputs.table_starts, (0, case.padding_rows)),
        )

    def expected(self) -> torch.Tensor:
        """By the definition, `[T, query heads, value dim]`."""
        slots = (self.key_slots, self.value_slots)
        query, keys, values = (tensor.cpu() for tensor in (self.query, self.keys, self.values))
        sinks = None if self.rule.sinks is None else self.rule.sinks.cpu()
        rule = replace(self.rule, sinks=sinks)
        rows = naive(query, keys, values, slots, self.case.query_lengths, self.case.visibility, rule)
        return torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, self.query.shape[1] - len(rows)))


def attend(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels give and what they should."""
    monkeypatch.setattr(attention, "decode_splits", lambda *_: case.splits)
    monkeypatch.setattr(attention, "decode_tiles", lambda *_: case.tiles)
    monkeypatch.setattr(attention, "prompt_tiles", lambda *_: case.tiles)
    pool = Pool(case)
    query = pool.query.transpose(0, 1).contiguous().transpose(0, 1) if case.token_major else pool.query
    inputs = pool.inputs()
    assert inputs.is_decode == case.is_decode
    attended = attention.attend(query, pool.keys, pool.values, inputs, pool.source, pool.rule, core_count=4)
    return attended.double().cpu(), pool.expected()


WINDOW = Visibility(window=6)
CHUNKS = Visibility(chunk=8)
DECODES = Case(query_lengths=(1, 1, 1), context_lengths=(70, 1, 16))
CASES = {
    "prefill, chunk and decode": Case(),
    "decodes": DECODES,
    "one split": replace(DECODES, splits=Splits(1, 1)),
    "many splits": Case((1,), (70,), key_heads=1, splits=Splits(20, 1), tiles=Tiles(16, 2, 4, 2)),
    "padding rows": Case(padding_rows=3, padding_tokens=5),
    "padding rows that decode": replace(DECODES, padding_rows=3, has_sinks=True),
    "one head per group": Case(group_size=1),
    "groups of five": Case(group_size=5, query_lengths=(1, 9), context_lengths=(30, 9)),
    "groups of seven": Case(group_size=7, query_lengths=(1, 9), context_lengths=(30, 9)),
    "a group larger than a tile": Case(key_heads=1, group_size=20, tiles=Tiles(32, 16, 4, 2)),
    "dims that are no powers of two": Case(key_dim=24, value_dim=40),
    "values narrower than keys": Case(key_dim=32, value_dim=8),
    "blocks of 96": Case(block_size=96, key_stride=96, value_stride=96),
    "blocks of 3": Case(block_size=3, key_stride=3, value_stride=3),
    "blocks with room for other layers": Case(key_stride=12, value_stride=12, visibility=WINDOW),
    "keys and values at other strides": Case(key_stride=8, value_stride=12, value_dim=8),
    "window": Case(visibility=WINDOW, stale_entry=0),
    "window of decodes": replace(DECODES, visibility=Visibility(window=20), stale_entry=1),
    "window of one": Case(visibility=Visibility(window=1)),
    "chunks": Case(visibility=CHUNKS),
    "chunks of decodes": replace(DECODES, visibility=Visibility(chunk=24)),
    "softcap": Case(softcap=0.7),
    "softcap far above the scores": Case(softcap=100.0),
    "sinks": Case(has_sinks=True),
    "softcap, sinks and window": Case(softcap=0.7, has_sinks=True, visibility=WINDOW),
    "softcap, sinks and decodes": replace(DECODES, softcap=0.7, has_sinks=True),
    "heads before tokens": Case(token_major=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_computes_the_rule(case, monkeypatch):
    """Every model family asks for another mixture of these; what nobody sees is NaN and must not matter."""
    actual, expected = attend(case, monkeypatch)

    torch.testing.assert_close(actual, expected, **EXACT)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=4),
    visibility=st.sampled_from([FULL, Visibility(window=1), Visibility(window=17), Visibility(chunk=16)]),
    splits=st.tuples(st.integers(1, 5), st.integers(1, 20)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    group_size=st.integers(1, 4),
)
def test_any_mixture_of_rows_computes_the_rule(rows, visibility, splits, padding, group_size):
    """The scheduler mixes rows freely; no mixture may be special."""
    is_decode = all(query == 1 for query, _ in rows)
    case = Case(
        query_lengths=tuple(query for query, _ in rows),
        context_lengths=tuple(query + past for query, past in rows),
        key_heads=1,
        group_size=group_size,
        visibility=visibility,
        splits=Splits(*splits),
        padding_rows=padding[0],
        padding_tokens=0 if is_decode else padding[1],
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        actual, expected = attend(case, monkeypatch)

    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("case", [Case(), replace(Case(), softcap=0.7), DECODES], ids=["mixed", "softcap", "decodes"])
def test_bfloat16_loses_no_more_than_rounding(case, monkeypatch):
    """Scores and softmax stay float32: only weights, values and the result are rounded, to 8 bits each."""
    actual, expected = attend(replace(case, dtype=torch.bfloat16), monkeypatch)

    torch.testing.assert_close(actual, expected, atol=2**-7, rtol=2**-7)


def test_real_tiles_compute_the_rule():
    """What is launched on a GPU, on a step that is long enough for several tiles and splits."""
    pool = Pool(Case((1, 20, 1), (600, 150, 150), key_heads=1, group_size=2, key_dim=64, value_dim=64))
    attended = attention.attend(pool.query, pool.keys, pool.values, pool.inputs(), pool.source, pool.rule, core_count=1)

    torch.testing.assert_close(attended.double().cpu(), pool.expected(), **EXACT)


def test_is_the_same_every_time(monkeypatch):
    """A request gets the same tokens when its step is run again."""
    runs = [attend(Case((1,), (70,), key_heads=1, splits=Splits(4, 1)), monkeypatch)[0] for _ in range(2)]

    assert torch.equal(*runs)


@pytest.mark.parametrize("case", [Case(padding_rows=2, padding_tokens=3), replace(DECODES, padding_rows=2)])
def test_stores_each_token_in_its_slot_and_padding_nowhere(case):
    """A slot of another request would be overwritten without anybody noticing."""
    case = replace(case, key_stride=8, value_stride=12, value_dim=8, block_size=3)
    pool = Pool(case)
    key = torch.randn(case.key_heads, pool.query.shape[1], case.key_dim, device=DEVICE)
    value = torch.randn(pool.query.shape[1], case.key_heads, case.value_dim, device=DEVICE).transpose(0, 1)
    keys, values = pool.keys.clone(), pool.values.clone()
    attention.store(key, value, keys, values, pool.inputs(), pool.source)

    for new, slots, before, after in (
        (key, pool.key_slots, pool.keys, keys),
        (value, pool.value_slots, pool.values, values),
    ):
        written = [row[-length:] for row, length in zip(slots, case.query_lengths, strict=True)]
        expected = before.index_copy(
            0, torch.from_numpy(np.concatenate(written)).to(DEVICE), new.transpose(0, 1)[: sum(case.query_lengths)]
        )
        torch.testing.assert_close(after, expected, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("row_count", "splits"),
    [(1, Splits(64, 128)), (16, Splits(17, 128)), (64, Splits(5, 256)), (256, Splits(4, 1024)), (2048, Splits(1, 1))],
)
def test_rows_are_split_by_what_the_batch_leaves_idle(row_count, splits):
    """One long row alone must use the whole device; among many, splitting it only costs. Eight key heads on an H200."""
    assert attention.decode_splits(row_count, key_heads=8, core_count=132) == splits


def test_refuses_heads_that_are_too_wide_with_the_way_out():
    """Expanded latents of some models are wider than a tile can be."""
    with pytest.raises(ValueError, match="576 numbers, and Triton's tiles 512; use attention 'torch'"):
        attention.decode_tiles(16, key_dim=576, value_dim=512, itemsize=2)
