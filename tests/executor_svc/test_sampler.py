"""Sampling: the distribution that was asked for, decided by the row and its key alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from executor_svc import sampler
from executor_svc.batch import SamplingBatch
from executor_svc.sampler import NonFiniteLogitsError, random_bits, row_keys, waiting_times

VOCABULARY_SIZE = 300


def sample(logits, sampling):
    """With the likeliest tokens as torch finds them."""
    return sampler.sample(logits, logits.max(dim=-1), sampling)


def batch(count: int, **columns) -> SamplingBatch:
    """`count` rows that draw without filters, but for `columns`: a value for all rows, or one for each."""
    defaults = {
        "temperature": (1.0, np.float32),
        "top_k": (0, np.int64),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "seed": (11, np.uint64),
        "choice": (0, np.int64),
        "output_index": (0, np.int64),
    }
    filled = {
        name: np.broadcast_to(np.asarray(columns.get(name, default), dtype=dtype), count)
        for name, (default, dtype) in defaults.items()
    }
    return SamplingBatch(row_index=np.arange(count), **filled)


def rows_of(whole: SamplingBatch, rows: list[int]) -> SamplingBatch:
    return replace(whole, **{name: getattr(whole, name)[rows] for name in SamplingBatch.__slots__})


def random_logits(count: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, VOCABULARY_SIZE)) * spread).float()


def draw_many(logits: torch.Tensor, count: int, **columns) -> np.ndarray:
    """`count` draws from one row of logits, as one request would make them in `count` steps."""
    return sample(logits.expand(count, -1), batch(count, output_index=np.arange(count), **columns))


def test_temperature_zero_takes_the_best_token():
    """Greedy rows ignore seed and filters, alone and beside rows that draw."""
    logits = random_logits(4)
    tokens = sample(logits, batch(4, temperature=[0, 1, 0, 1], top_k=2, seed=[1, 2, 3, 4]))

    assert tokens[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert sample(logits, batch(4, temperature=0)).tolist() == logits.argmax(-1).tolist()


ROW = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 5, 50, 100_000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
        "choice": st.sampled_from([0, 0, 1, 7]),
        "output_index": st.integers(0, 100_000),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.lists(ROW, min_size=1, max_size=9), data=st.data())
def test_a_row_draws_the_same_token_in_any_batch(rows, data):
    """A seed gives the same text whatever else the executor computes, and after a move to another one."""
    whole = batch(len(rows), **{name: [row[name] for row in rows] for name in rows[0]})
    logits = random_logits(len(rows), seed=len(rows))
    order = data.draw(st.permutations(range(len(rows))))
    together = sample(logits, whole)

    assert sample(logits[order], rows_of(whole, order)).tolist() == together[order].tolist()
    for row in range(len(rows)):
        assert sample(logits[row : row + 1], rows_of(whole, [row])).tolist() == [together[row]]


def test_rows_drawn_in_several_chunks_draw_as_one(monkeypatch):
    """Large batches are hashed in chunks of rows; the cut must not show."""
    logits, whole = random_logits(7), batch(7, seed=np.arange(7), top_p=[1, 0.5, 1, 1, 0.9, 1, 1])
    together = sample(logits, whole)
    monkeypatch.setattr(sampler, "_CHUNK_ELEMENTS", 2 * VOCABULARY_SIZE)

    assert sample(logits, whole).tolist() == together.tolist()


def test_seed_choice_output_index_and_token_all_change_the_noise():
    """A part left out of the key would repeat noise between requests, choices, steps or tokens."""
    seed, choice, output_index = (axis.flatten() for axis in np.meshgrid([1, 2], [0, 1, 2], [0, 1, 2]))
    keys = row_keys(seed.astype(np.uint64), choice, output_index)
    bits = random_bits(torch.from_numpy(keys), 1000)

    assert len(bits.unique()) == 18_000


def test_the_first_choice_draws_as_a_request_without_others():
    """Asking for one more answer to the same prompt and seed must not change the first: the keys of before choices."""
    keys = row_keys(np.array([0, 11, 2**64 - 1], dtype=np.uint64), np.zeros(3, dtype=np.int64), np.array([0, 5, 99]))

    assert keys.tolist() == [258863698125685209, -9042449474807182589, 2787498801871102612]


def test_choices_of_one_seed_draw_different_texts():
    """They share prompt and seed; the same text three times would be no choice. Each repeats itself exactly."""
    logits = random_logits(1)
    texts = [draw_many(logits, 40, choice=choice).tolist() for choice in range(3)]

    assert [draw_many(logits, 40, choice=choice).tolist() for choice in range(3)] == texts
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(left == right for left, right in zip(texts[one], texts[other], strict=True)) < 15


def test_the_hash_is_splitmix64():
    """The bits are a published generator's, so another implementation can reproduce them: seed 1234567."""
    bits = random_bits(torch.tensor([1234567]), 3)[0]

    assert [value % 2**64 for value in bits.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_waiting_times_are_exponential_and_finite():
    """A time of 0 or infinity would make a token certain or impossible."""
    times = waiting_times(torch.arange(50), 20_000).double()

    assert times.min() > 0
    assert times.max() < 60
    assert times.mean().item() == pytest.approx(1, abs=0.005)
    assert (times < np.log(2)).double().mean().item() == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(filters):
    """Chi-square over 20,000 draws against the probabilities of transformers' own warpers."""
    count = 20_000
    logits = random_logits(1, seed=5, spread=2.0)[:, :40]
    expected = warped(logits, **filters).softmax(-1)[0].double().numpy() * count
    observed = np.bincount(draw_many(logits, count, **filters), minlength=40)

    assert observed[expected == 0].sum() == 0
    likely = expected >= 5
    statistic = ((observed - expected) ** 2 / np.where(likely, expected, 1))[likely].sum()
    degrees = likely.sum() - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees), f"chi-square {statistic:.1f} with {degrees} degrees"


def warped(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """What transformers leaves of the logits, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 17, 299, 300, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 0.001]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_filters_allow_the_tokens_that_transformers_allows(temperature, top_k, top_p, min_p, seed):
    """The same settings mean the same thing as in `generate()`."""
    logits = random_logits(3, seed)
    allowed = sampler_allows(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    assert allowed.tolist() == warped(logits, temperature, top_k, top_p, min_p).isfinite().tolist()


def sampler_allows(logits: torch.Tensor, **columns) -> torch.Tensor:
    draws = sampler._Draws.of(batch(len(logits), **columns), np.arange(len(logits)))
    scores = (logits - logits.amax(-1, keepdim=True)) / columns["temperature"]
    floor = sampler._floor(scores, draws)
    return torch.ones_like(scores, dtype=torch.bool) if floor is None else scores >= floor[:, None]


def test_a_flat_distribution_needs_more_candidates_than_are_looked_at_first(monkeypatch):
    """Top-p looks at the best tokens first and at the whole vocabulary only where these do not suffice."""
    logits = torch.cat([random_logits(1, spread=0.01), random_logits(1, spread=9.0)])
    whole = sampler_allows(logits, temperature=1.0, top_p=0.9)
    monkeypatch.setattr(sampler, "_CANDIDATES", 10)

    assert whole.sum(-1).tolist()[0] > 200
    assert sampler_allows(logits, temperature=1.0, top_p=0.9).tolist() == whole.tolist()


def test_a_tiny_temperature_is_greedy_not_infinite():
    """Dividing by 1e-30 must not overflow into NaN."""
    logits = random_logits(3)

    assert sample(logits, batch(3, temperature=1e-30)).tolist() == logits.argmax(-1).tolist()


def test_broken_logits_name_their_rows():
    """The executor reports the request that broke and goes on with the others."""
    logits = random_logits(4)
    logits[1, 7], logits[3, 5] = float("nan"), float("inf")

    with pytest.raises(NonFiniteLogitsError) as caught:
        sample(logits, batch(4, temperature=[0, 0, 1, 1]))
    assert caught.value.rows == [1, 3]
