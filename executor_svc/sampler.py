"""Choosing the next token of each row, so that nothing but the row itself decides.

Tokens are drawn by exponential races: every vocabulary id gets a waiting time from (seed, choice, output index, id),
divided by its probability, and the shortest wins. That is an exact draw from the distribution, and no other row, slot,
executor or attempt takes part in it. The waiting times come from a hash, computed in 64-bit integers, which are the
same bits on every device: the SplitMix64 generator of Steele, Lea and Flood, "Fast splittable pseudorandom number
generators" (OOPSLA 2014), whose n-th output is a function of its seed and n alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from executor_svc.batch import SamplingBatch

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_CHUNK_ELEMENTS = 1 << 18  # hashed at once: small enough for a CPU's cache
_CANDIDATES = 1024  # looked at first for top-p; sorting a whole vocabulary costs twenty times as much


class NonFiniteLogitsError(ArithmeticError):
    """A row's logits are NaN or infinite; `rows` are indices among the sampling rows."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"sampling rows {rows} have NaN or infinite logits")
        self.rows = rows


def sample(
    logits: torch.Tensor, likeliest: tuple[torch.Tensor, torch.Tensor], sampling: SamplingBatch
) -> NDArray[np.int64]:
    """Choose a token for each row of `logits`, `[S, vocabulary]`.

    `likeliest` has the highest of each row, NaN where one of them is, and its token, which becomes the chosen one.
    Filters apply in the order temperature, top-k, top-p, min-p.
    """
    best, tokens = likeliest
    drawn = np.flatnonzero(sampling.temperature > 0)
    if len(drawn):
        index = torch.from_numpy(drawn).to(logits.device)
        tokens[index] = _draw(logits, best, _Draws.of(sampling, drawn))
    finite, chosen = _on_host(best, tokens)
    if not finite.all():
        raise NonFiniteLogitsError(np.flatnonzero(~finite).tolist())
    return chosen


def _on_host(best: torch.Tensor, tokens: torch.Tensor) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of the highest are finite, and the tokens."""
    if tokens.device.type == "cpu":
        return np.isfinite(best.float().numpy()), tokens.numpy()
    finite, chosen = torch.stack([best.isfinite().long(), tokens]).cpu().numpy()  # one transfer
    return finite != 0, chosen


@dataclass(frozen=True, slots=True)
class _Draws:
    """The rows that draw, on the host."""

    row: NDArray[np.int64]  # [D] among the sampling rows
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    key: NDArray[np.int64]  # [D] seed of the row's generator

    @classmethod
    def of(cls, sampling: SamplingBatch, row: NDArray[np.int64]) -> "_Draws":
        key = row_keys(sampling.seed[row], sampling.choice[row], sampling.output_index[row])
        return cls(row, sampling.temperature[row], sampling.top_k[row], sampling.top_p[row], sampling.min_p[row], key)

    def chunks(self, size: int) -> Iterator["_Draws"]:
        for start in range(0, len(self.row), size):
            part = slice(start, start + size)
            yield _Draws(
                self.row[part],
                self.temperature[part],
                self.top_k[part],
                self.top_p[part],
                self.min_p[part],
                self.key[part],
            )


def row_keys(seed: NDArray[np.uint64], choice: NDArray[np.int64], output_index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seed of the generator whose n-th output belongs to vocabulary id n, for each row."""
    golden = np.uint64(_GOLDEN)
    with np.errstate(over="ignore"):
        # A choice moves the seed as far as no other request's seed is likely to be; choice 0 leaves it.
        mixed = _mix_on_host(seed + _mix_on_host(choice.astype(np.uint64) * golden) + golden)
        return _mix_on_host(mixed ^ (output_index.astype(np.uint64) + np.uint64(1)) * golden).view(np.int64)


def _mix_on_host(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(multiplier)
    return bits ^ (bits >> np.uint64(_SHIFTS[2]))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def random_bits(key: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
    """64 random bits for each row and vocabulary id, `[D, vocabulary]` int64."""
    bits = torch.arange(1, vocabulary_size + 1, device=key.device).mul_(_signed(_GOLDEN)) + key[:, None]
    shifted = torch.empty_like(bits)
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        torch.bitwise_right_shift(bits, shift, out=shifted)
        bits.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))  # the shift copies the sign: clear it
        if multiplier is not None:
            bits.mul_(_signed(multiplier))  # wraps around, as it should
    return bits


def waiting_times(key: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
    """Exponentially distributed times with mean 1, `[D, vocabulary]` float32, never 0 and never infinite."""
    bits = random_bits(key, vocabulary_size).bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1)
    # Short times decide races, so they keep full relative precision: u is near 0 there and log1p exact.
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-52).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


def _draw(logits: torch.Tensor, best: torch.Tensor, draws: _Draws) -> torch.Tensor:
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    return torch.cat([_draw_chunk(logits, best, chunk) for chunk in draws.chunks(size)])


def _draw_chunk(logits: torch.Tensor, best: torch.Tensor, draws: _Draws) -> torch.Tensor:
    def column(values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(logits.device)

    row = column(draws.row)
    # Scores are 0 for the likeliest token and negative for the others: no temperature makes them overflow.
    scores = logits.index_select(0, row).float().sub_(best.index_select(0, row).float()[:, None])
    scores.div_(column(draws.temperature)[:, None])
    floor = _floor(scores, draws)
    weights = scores.exp()
    if floor is not None:
        weights.masked_fill_(scores < floor[:, None], 0.0)
    return weights.div_(waiting_times(column(draws.key), logits.shape[-1])).argmax(dim=-1)


def _floor(scores: torch.Tensor, draws: _Draws) -> torch.Tensor | None:
    """The lowest score that each row's filters let through; None when no row filters.

    Tokens with equal scores pass or fail together, so no order among them matters.
    """
    vocabulary_size = scores.shape[-1]
    top_k = np.where((draws.top_k > 0) & (draws.top_k < vocabulary_size), draws.top_k, 0)
    if not top_k.any() and (draws.top_p >= 1).all() and (draws.min_p <= 0).all():
        return None
    # The likeliest token always passes, with score 0.
    floor = torch.from_numpy(np.log(draws.min_p, out=np.full_like(draws.min_p, -np.inf), where=draws.min_p > 0))
    floor = floor.clamp_(max=0.0).to(scores.device)
    for rows, limits in ((np.flatnonzero(top_k > 0), top_k), (np.flatnonzero((top_k == 0) & (draws.top_p < 1)), None)):
        if len(rows):
            index = torch.from_numpy(rows).to(scores.device)
            top_p = torch.from_numpy(draws.top_p[rows]).to(scores.device)
            own = scores.index_select(0, index)
            if limits is None:
                passed = _top_p_floor(own, top_p)
            else:
                passed = _top_k_floor(own, torch.from_numpy(limits[rows]).to(scores.device), top_p, int(limits.max()))
            floor[index] = torch.maximum(floor[index], passed)
    return floor


def _top_k_floor(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, largest_k: int) -> torch.Tensor:
    """The lowest score that passes top-k, and top-p among what passed."""
    candidates = scores.topk(largest_k, dim=-1).values
    kth = candidates.gather(1, (top_k - 1)[:, None])
    weights = candidates.double().exp().masked_fill_(candidates < kth, 0.0)
    nucleus, _ = _nucleus_floor(candidates, weights, weights.sum(-1), top_p)
    return torch.maximum(kth[:, 0], nucleus)


def _top_p_floor(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The lowest score in the smallest set of likeliest tokens that has probability `top_p`."""
    total = scores.exp().sum(-1, dtype=torch.float64)
    candidates = scores.topk(min(_CANDIDATES, scores.shape[-1]), dim=-1).values
    floor, is_complete = _nucleus_floor(candidates, candidates.double().exp(), total, top_p)
    rest = (~is_complete).nonzero()[:, 0]
    if len(rest) and candidates.shape[-1] < scores.shape[-1]:
        ordered = scores[rest].sort(dim=-1, descending=True).values
        floor[rest] = _nucleus_floor(ordered, ordered.double().exp(), total[rest], top_p[rest])[0]
    return floor


def _nucleus_floor(
    ordered: torch.Tensor, weights: torch.Tensor, total: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last score that is needed to reach `top_p`, and whether the given ones, best first, reach it at all."""
    reached = weights.cumsum(-1)
    # At 1 nothing is left out, though rounding may reach the total before the last.
    needed = torch.where(top_p < 1, top_p.double() * total, torch.inf)
    count = (reached - weights < needed[:, None]).sum(-1).clamp_(min=1)
    return ordered.gather(1, (count - 1)[:, None])[:, 0], reached[:, -1] >= needed
