"""Choosing the next token of each row by the rule of `executor_svc.sampler`, without the host waiting for anything.

Four launches, whatever the rows ask for. A vocabulary is cut into parts so that one row keeps many multiprocessors
busy: each part finds its likeliest token; each row puts these together and bounds what its filters let through; each
part draws by exponential races; each row takes the winner. Nothing is sorted: the bound is searched.

Distances take the place of scores: how far a token's logit is below the highest one, which is 0 or more, so that
their bits, taken as integers, are in the same order. Tokens with equal logits pass filters or fail together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TILE = 4096  # tokens of one part
# Tensors that begin anywhere in memory: kernels must not be compiled anew because of it.
_GIVEN = ["chosen", "finite", "temperatures", "top_ks", "top_ps", "min_ps", "keys"]
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)
_LARGEST_UNIFORM = tl.constexpr(1 - 2.0**-24)
_UNIT = tl.constexpr(2.0**-52)
_LN_2 = tl.constexpr(0.6931471805599453)
_INFINITE = tl.constexpr(0x7F800000)  # bits of float32's infinity
_GUESSES = tl.constexpr((0x3F800000, 0x40800000, 0x41800000))  # bits of 1, 4 and 16: most bounds lie about there


@dataclass(frozen=True, slots=True, eq=False)
class SamplingParameters:
    """How each of the S rows chooses its token, as `executor_svc.batch.SamplingBatch` has it, on the device."""

    temperature: torch.Tensor  # [S] float32, 0 is greedy
    top_k: torch.Tensor  # [S] int32, 0 keeps all
    top_p: torch.Tensor  # [S] float32, 1 keeps all
    min_p: torch.Tensor  # [S] float32, 0 keeps all
    key: torch.Tensor  # [S] int64, `executor_svc.sampler.row_keys`


def sample_rows(
    logits: torch.Tensor,
    parameters: SamplingParameters,
    chosen: torch.Tensor,
    finite: torch.Tensor,
    *,
    draws: bool = True,
) -> None:
    """Write the token of each row of `logits`, `[S, vocabulary]`, to `chosen`, `[S]` int64.

    `finite`, `[S]` integers, becomes 1 where the highest logit is finite and none is NaN, else 0; what is chosen there
    means nothing. `draws` may be False where the host knows that every row's temperature is 0: two launches do then.
    """
    row_count, vocabulary_size = logits.shape
    part_count = triton.cdiv(vocabulary_size, _TILE)
    padded_count = triton.next_power_of_2(part_count)
    part_highest = torch.empty(row_count, part_count, dtype=torch.float32, device=logits.device)
    speeds = torch.empty_like(part_highest)
    tokens = torch.empty(row_count, part_count, dtype=torch.int32, device=logits.device)
    highest = torch.empty(row_count, dtype=torch.float32, device=logits.device)
    bounds = torch.empty(row_count, dtype=torch.int32, device=logits.device)
    shape = (logits.stride(0), vocabulary_size, part_count)
    _find_likeliest[(row_count, part_count)](
        logits, part_highest, tokens, *shape, tile=_TILE, num_warps=8, enable_fp_fusion=True
    )
    _bound_draws[(row_count,)](
        logits,
        part_highest,
        tokens,
        highest,
        bounds,
        chosen,
        finite,
        parameters.temperature,
        parameters.top_k,
        parameters.top_p,
        2.0 ** (62 - vocabulary_size.bit_length()),
        *shape,
        tile=_TILE,
        padded_count=padded_count,
        num_warps=16,
        enable_fp_fusion=True,
    )
    if not draws:
        return
    _race[(row_count, part_count)](
        logits,
        part_highest,
        speeds,
        tokens,
        highest,
        bounds,
        parameters.temperature,
        parameters.min_p,
        parameters.key,
        *shape,
        tile=_TILE,
        num_warps=8,
        enable_fp_fusion=True,
    )
    _take_winner[(row_count,)](
        speeds,
        tokens,
        bounds,
        chosen,
        vocabulary_size,
        part_count,
        padded_count=padded_count,
        num_warps=1,
        enable_fp_fusion=True,
    )


@triton.jit
def _find_likeliest(
    logits,
    part_highest,
    part_tokens,
    stride,
    vocabulary_size: tl.constexpr,
    part_count: tl.constexpr,
    tile: tl.constexpr,
):
    """The highest logit of one part of one row, infinite where one is NaN, and the first token that has it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * tile + tl.arange(0, tile)
    logit = tl.load(logits + row * stride + token, mask=token < vocabulary_size, other=float("-inf")).to(tl.float32)
    logit = tl.where(logit == logit, logit, float("inf"))
    highest = tl.max(logit, axis=0)
    tl.store(part_highest + row * part_count + part, highest)
    tl.store(part_tokens + row * part_count + part, tl.min(tl.where(logit == highest, token, vocabulary_size), axis=0))


@triton.jit(do_not_specialize=_GIVEN)
def _bound_draws(
    logits,
    part_highest,
    part_tokens,
    highest,
    bounds,
    chosen,
    finite,
    temperatures,
    top_ks,
    top_ps,
    weight_unit: tl.constexpr,
    stride,
    vocabulary_size: tl.constexpr,
    part_count: tl.constexpr,
    tile: tl.constexpr,
    padded_count: tl.constexpr,
):
    """One row's likeliest token, and the distance that top-k and top-p let through; -1: the row does not draw."""
    row = tl.program_id(0).to(tl.int64)
    part_highest += row * part_count
    best, token = _best_part(part_highest, part_tokens + row * part_count, vocabulary_size, part_count, padded_count)
    is_finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(chosen + row, token)
    tl.store(highest + row, best)
    tl.store(finite + row, is_finite.to(finite.dtype.element_ty))

    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    bound = tl.where(is_finite & (temperature > 0), _INFINITE, -1)
    logits += row * stride
    if (bound > 0) & (top_k > 0) & (top_k < vocabulary_size):
        bound = _search(
            logits, part_highest, best, temperature, bound, top_k.to(tl.int64), 0.0, vocabulary_size, part_count, tile
        )
    if (bound > 0) & (top_p < 1):
        total = _weight_within(
            logits, part_highest, best, temperature, bound, weight_unit, vocabulary_size, part_count, tile
        )
        wanted = tl.maximum(tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
        bound = _search(
            logits, part_highest, best, temperature, bound, wanted, weight_unit, vocabulary_size, part_count, tile
        )
    tl.store(bounds + row, bound)


@triton.jit
def _search(
    logits,
    part_highest,
    best,
    temperature,
    bound,
    wanted,
    weight_unit: tl.constexpr,
    vocabulary_size: tl.constexpr,
    part_count: tl.constexpr,
    tile: tl.constexpr,
):
    """The longest distance, at most `bound`, such that fewer than `wanted` tokens are nearer.

    With a `weight_unit`, weights count and not tokens: in whole units, so that their sum is exact in any order. Each
    pass over the vocabulary keeps a quarter of the distances, and of these what lies between tokens' own.
    """
    low = bound * 0
    high = bound + 1  # the distance is in [low, high), and so are tokens
    first, second, third = low + _GUESSES[0], low + _GUESSES[1], low + _GUESSES[2]
    while high - low > 1:
        below_first = tl.zeros([tile], tl.int64)
        below_second = tl.zeros([tile], tl.int64)
        below_third = tl.zeros([tile], tl.int64)
        nearest = tl.zeros([tile], tl.int32) + high
        farthest = tl.zeros([tile], tl.int32) + low
        for part in range(part_count):
            if (best - tl.load(part_highest + part)).to(tl.int32, bitcast=True) < high:
                distance, bits = _distances(logits, best, part, vocabulary_size, tile)
                count = tl.zeros([tile], tl.int64) + 1
                if weight_unit > 0:
                    count = _weights(distance, temperature, weight_unit)
                below_first += tl.where(bits < first, count, 0)
                below_second += tl.where(bits < second, count, 0)
                below_third += tl.where(bits < third, count, 0)
                nearest = tl.minimum(nearest, tl.where(bits >= low, bits, high))
                farthest = tl.maximum(farthest, tl.where(bits < high, bits, low))
        is_low_first = tl.sum(below_first, axis=0) < wanted
        is_low_second = tl.sum(below_second, axis=0) < wanted
        is_low_third = tl.sum(below_third, axis=0) < wanted
        low = tl.where(is_low_third, third, tl.where(is_low_second, second, tl.where(is_low_first, first, low)))
        above = tl.where(is_low_first, tl.where(is_low_second, tl.where(is_low_third, high, third), second), first)
        high = tl.minimum(tl.minimum(high, above), tl.max(farthest, axis=0) + 1)
        low = tl.maximum(low, tl.min(nearest, axis=0))
        step = tl.maximum((high - low) // 4, 1)
        first, second, third = low + step, low + 2 * step, low + 3 * step
    return low


@triton.jit
def _weight_within(
    logits,
    part_highest,
    best,
    temperature,
    bound,
    weight_unit: tl.constexpr,
    vocabulary_size: tl.constexpr,
    part_count: tl.constexpr,
    tile: tl.constexpr,
):
    """The weights of all tokens within `bound`, in whole units."""
    total = tl.zeros([tile], tl.int64)
    for part in range(part_count):
        if (best - tl.load(part_highest + part)).to(tl.int32, bitcast=True) <= bound:
            distance, bits = _distances(logits, best, part, vocabulary_size, tile)
            total += tl.where(bits <= bound, _weights(distance, temperature, weight_unit), 0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=_GIVEN)
def _race(
    logits,
    part_highest,
    part_speeds,
    part_tokens,
    highest,
    bounds,
    temperatures,
    min_ps,
    keys,
    stride,
    vocabulary_size: tl.constexpr,
    part_count: tl.constexpr,
    tile: tl.constexpr,
):
    """Draw among one part of one row: the fastest token, and its speed, the inverse of the time that it takes."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * part_count + part
    bound = tl.load(bounds + row)
    best = tl.load(highest + row)
    if bound >= 0:
        if (best - tl.load(part_highest + place)).to(tl.int32, bitcast=True) > bound:
            tl.store(part_speeds + place, -1.0)
        else:
            distance, bits = _distances(logits + row * stride, best, part, vocabulary_size, tile)
            score = tl.div_rn(distance, tl.zeros([tile], tl.float32) + tl.load(temperatures + row))
            min_p = tl.load(min_ps + row)
            lowest = -tl.minimum(tl.log(tl.where(min_p > 0, min_p, 1.0)), 0.0)
            lowest = tl.where(min_p > 0, lowest, float("inf"))
            token = part * tile + tl.arange(0, tile)
            time = _waiting_times(tl.load(keys + row), token)
            passes = (bits <= bound) & (score <= lowest) & (token < vocabulary_size)
            speed = tl.where(passes, tl.exp(-score) / time, -1.0)
            fastest = tl.max(speed, axis=0)
            tl.store(part_speeds + place, fastest)
            tl.store(part_tokens + place, tl.min(tl.where(speed == fastest, token, vocabulary_size), axis=0))


@triton.jit(do_not_specialize=_GIVEN)
def _take_winner(
    part_speeds,
    part_tokens,
    bounds,
    chosen,
    vocabulary_size: tl.constexpr,
    part_count: tl.constexpr,
    padded_count: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(bounds + row) >= 0:
        place = row * part_count
        _, token = _best_part(part_speeds + place, part_tokens + place, vocabulary_size, part_count, padded_count)
        tl.store(chosen + row, token)


@triton.jit
def _best_part(
    part_scores, part_tokens, vocabulary_size: tl.constexpr, part_count: tl.constexpr, padded_count: tl.constexpr
):
    """The highest score of a row's parts, and the first token that has it."""
    part = tl.arange(0, padded_count)
    is_in = part < part_count
    scores = tl.load(part_scores + part, mask=is_in, other=float("-inf"))
    tokens = tl.load(part_tokens + part, mask=is_in, other=vocabulary_size)
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, tokens, vocabulary_size), axis=0).to(tl.int64)


@triton.jit
def _distances(logits, best, part, vocabulary_size: tl.constexpr, tile: tl.constexpr):
    """How far each token of a part is below the best one, infinitely where there is no token; and the bits of that."""
    token = part * tile + tl.arange(0, tile)
    distance = best - tl.load(logits + token, mask=token < vocabulary_size, other=float("-inf")).to(tl.float32)
    return distance, distance.to(tl.int32, bitcast=True)


@triton.jit
def _weights(distance, temperature, weight_unit: tl.constexpr):
    return (tl.exp(-distance / temperature) * weight_unit).to(tl.int64)


@triton.jit
def _waiting_times(key, token):
    """Exponentially distributed times; see `executor_svc.sampler.waiting_times`."""
    bits = key.to(tl.uint64, bitcast=True) + (token + 1).to(tl.uint64) * _GOLDEN
    bits = (bits ^ (bits >> 30)) * _MULTIPLIER_1
    bits = (bits ^ (bits >> 27)) * _MULTIPLIER_2
    bits = bits ^ (bits >> 31)
    uniform = ((bits >> 12).to(tl.int64).to(tl.float32) + 0.5) * _UNIT
    return _minus_log_1p_minus(tl.minimum(uniform, _LARGEST_UNIFORM))


@triton.jit
def _minus_log_1p_minus(u):
    """-log(1 - u) for u in (0, 1), as exact near 0 as elsewhere, which no logarithm of a GPU by itself is.

    It is 2 * atanh(u / (2 - u)), and atanh has a short series up to 1/3. Above u = 1/2, powers of two come off first.
    """
    is_low = u <= 0.5
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    halvings = 126 - (bits >> 23)
    mantissa = ((bits & 0x7FFFFF) | (126 << 23)).to(tl.float32, bitcast=True)  # [1/2, 1)
    z = tl.where(is_low, u, 1.0 - mantissa) / tl.where(is_low, 2.0 - u, 1.0 + mantissa)
    square = z * z
    series = 1 / 15.0
    for index in tl.static_range(7):
        series = series * square + 1 / (13.0 - 2 * index)
    return 2.0 * z * series + tl.where(is_low, 0.0, halvings.to(tl.float32) * _LN_2)
