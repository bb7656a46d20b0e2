"""The sampling kernels choose what `executor_svc.sampler` chooses."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc import sampler
from executor_svc.batch import SamplingBatch
from executor_svc.gpu import sampling
from executor_svc.gpu.sampling import SamplingParameters, sample_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {"temperature": np.float32, "top_k": np.int64, "top_p": np.float32, "min_p": np.float32, "seed": np.uint64}
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11}


def batch(count: int, **columns) -> SamplingBatch:
    """`count` rows that draw without filters, but for `columns`: a value for all rows, or one for each."""
    filled = {
        name: np.full(count, np.asarray(columns.get(name, DEFAULTS[name]), dtype=kind)) for name, kind in KINDS.items()
    }
    zeros = np.zeros(count, dtype=np.int64)
    return SamplingBatch(row_index=np.arange(count), choice=zeros, output_index=zeros, **filled)


def on_device(rows: SamplingBatch) -> SamplingParameters:
    def column(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(DEVICE, dtype)

    return SamplingParameters(
        temperature=column(rows.temperature, torch.float32),
        top_k=column(rows.top_k, torch.int32),
        top_p=column(rows.top_p, torch.float32),
        min_p=column(rows.min_p, torch.float32),
        key=column(sampler.row_keys(rows.seed, rows.choice, rows.output_index), torch.int64),
    )


def sample(logits: torch.Tensor, rows: SamplingBatch, **given) -> tuple[list[int], list[int]]:
    """Tokens, and whether logits are finite."""
    chosen = torch.full((len(logits),), -1, dtype=torch.int64, device=DEVICE)
    finite = torch.full((len(logits),), -1, dtype=torch.int32, device=DEVICE)
    sample_rows(logits.to(DEVICE), on_device(rows), chosen, finite, **given)
    return chosen.tolist(), finite.tolist()


def expected(logits: torch.Tensor, rows: SamplingBatch) -> list[int]:
    return sampler.sample(logits, logits.max(dim=-1), rows).tolist()


def random_logits(count: int, vocabulary_size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, vocabulary_size)) * spread).float()


@triton.jit
def waiting_times_kernel(uniform, times, count: tl.constexpr):
    index = tl.arange(0, count)
    tl.store(times + index, sampling._minus_log_1p_minus(tl.load(uniform + index)))


def test_waiting_times_are_exact_wherever_their_uniform_numbers_lie():
    """Short times decide races, and a GPU's own logarithm has no digit of them right."""
    ends = torch.tensor([2.0**-53, 1e-12, 1e-7, 0.4999999, 0.5, 0.5000001, 0.75, 0.99999, 1 - 2.0**-24])
    uniform = torch.cat([ends, torch.rand(503, generator=torch.Generator().manual_seed(1)).clamp(1e-9)]).to(DEVICE)
    times = torch.empty_like(uniform)
    waiting_times_kernel[(1,)](uniform, times, count=512)

    torch.testing.assert_close(times.double(), -torch.log1p(-uniform.double()), rtol=1e-6, atol=0)


ROW = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-30, 0.01, 0.7, 1.0, 2.5, 1e6]),
        "top_k": st.sampled_from([0, 0, 1, 2, 40, 319, 320, 999, 100_000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.9999, 0.95, 0.5, 0.01, 1e-7]),
        "min_p": st.sampled_from([0.0, 0.0, 1e-4, 0.05, 0.5, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.lists(ROW, min_size=1, max_size=3),
    vocabulary_size=st.sampled_from([320, 1000]),
    shape=st.sampled_from(["spread", "peaked", "flat", "tied", "masked", "bfloat16"]),
)
def test_tokens_are_those_of_the_reference(rows, vocabulary_size, shape):
    """A request that moves between executors with and without this kernel goes on with the text it would have had."""
    whole = batch(len(rows), **{name: [row[name] for row in rows] for name in rows[0]})
    logits = random_logits(len(rows), vocabulary_size, seed=len(rows))
    if shape == "peaked":
        logits *= 8
    elif shape == "flat":
        logits *= 0.01
    elif shape == "tied":
        logits.div_(4).round_()
    elif shape == "masked":
        logits[:, torch.arange(vocabulary_size) % 7 != 3] = -torch.inf
    elif shape == "bfloat16":
        logits = logits.bfloat16()

    assert sample(logits, whole) == (expected(logits, whole), [1] * len(rows))


@pytest.mark.parametrize("vocabulary_size", [128, 500])
def test_a_vocabulary_of_several_parts_draws_as_one_of_one(vocabulary_size, monkeypatch):
    """Parts spread a row over a GPU; the cut must not show, nor a part that filters leave empty."""
    filters = {"temperature": [0, 0.5, 1, 1, 1.5, 1, 2, 1], "top_k": [0, 0, 0, 5, 60, 0, 1, 128]}
    whole = batch(8, top_p=[1, 1, 0.7, 1, 0.8, 1, 1, 0.5], min_p=[0, 0, 0, 0, 0, 0.3, 0, 0], **filters)
    logits = random_logits(8, vocabulary_size)
    monkeypatch.setattr(sampling, "_TILE", 128)

    assert sample(logits, whole)[0] == expected(logits, whole)


def test_a_large_vocabulary_draws_the_same_tokens():
    """The size of real ones, where float32 sums would no longer be exact."""
    whole = batch(5, temperature=[1, 0.8, 1, 1.2, 0], top_k=[0, 50, 0, 3000, 0], top_p=[1, 0.95, 0.9, 0.99, 1])
    logits = random_logits(5, 32_000)

    assert sample(logits, whole)[0] == expected(logits, whole)


def test_draws_of_many_seeds_are_the_same_tokens():
    """Rare bits of the hash decide rare draws: each of these rows has others."""
    whole = batch(100, seed=np.arange(100))
    logits = random_logits(1, 320).expand(100, -1)

    assert sample(logits, whole)[0] == expected(logits, whole)


def test_equal_logits_pass_filters_together():
    """No order among them may matter, or an executor's way to sort would show in texts."""
    logits = torch.full((20, 320), -20.0)
    logits[:, [7, 90, 200, 319]] = 1.5
    drawn = set(sample(logits, batch(20, seed=np.arange(20), top_k=2))[0])

    assert drawn == {7, 90, 200, 319}


def test_greedy_rows_need_no_draw():
    """The first of the best tokens, as torch finds it, with and without the launches that draw."""
    logits = random_logits(3, 320)
    logits[1, [5, 60, 300]] = 100.0
    whole = batch(3, temperature=0, top_k=3, top_p=0.1)
    tokens = logits.argmax(-1).tolist()

    assert tokens[1] == 5
    assert sample(logits, whole) == (tokens, [1, 1, 1])
    assert sample(logits, whole, draws=False) == (tokens, [1, 1, 1])


def test_broken_logits_are_reported_and_the_other_rows_chosen():
    """The executor reports the request that broke and goes on with the others."""
    logits = random_logits(6, 320)
    logits[1, 7], logits[3, 5], logits[4, :] = float("nan"), float("inf"), float("-inf")
    logits[2, 1:] = float("-inf")
    tokens, finite = sample(logits, batch(6, temperature=[0, 0, 1, 1, 1, 1], top_k=3, top_p=0.5))

    assert finite == [1, 0, 1, 0, 0, 1]
    assert [tokens[0], tokens[2]] == [int(logits[0].argmax()), 0]
    assert all(0 <= token < 320 for token in tokens)


def test_rows_may_lie_apart():
    """Logits of a padded vocabulary are part of wider rows."""
    wide = random_logits(3, 400)
    whole = batch(3, top_k=30)

    assert sample(wide[:, :320], whole)[0] == expected(wide[:, :320].contiguous(), whole)
