// Matrix products with packed weights, a tile of rows and a block of 32 outputs at a time.
#pragma once

#include <type_traits>
#include <vector>

#include "numbers.h"

namespace paceline {

enum class Into { STORE, ADD, GATED };  // GATED: a block is 16 gates and their 16 ups, and gives 16 numbers

// What to fetch from memory while a tile is computed: F lines with every step of its loop, which are `step` bytes on
// from those of the step before.
template <int F> struct Ahead {
    const char *at;
    int64_t step;

    void fetch(int64_t k) const {
        for (int f = 0; f < F; f++) __builtin_prefetch(at + k * step + f * 64);
    }
};

// Weights are of type T, or int8 of which each output has its scale.
template <class T, class W = T> struct Product {
    const T *x;  // [rows, inputs]
    const W *weights;
    const float *scales;  // [outputs], or null
    const float *bias;
    int64_t rows, inputs, outputs;  // outputs: a multiple of 32
    float *to;                      // [rows, outputs]
    T *gated;                       // [rows, outputs / 2]
    float slope, cube;              // of gates
    Into into;
};

// x times the sigmoid of slope x + cube x^3: silu, and gelu by tanh, whose slope is 2 sqrt(2 / pi) and cube 0.044715 of
// that.
inline vec gate(vec x, float slope, float cube) { return x / (1.0f + exponential(-x * (slope + cube * x * x))); }

template <class T, class W>
__attribute__((noinline)) void finish(const Product<T, W> &p, int64_t row, int64_t block, vec low, vec high) {
    if (p.scales) {
        low *= at(p.scales + block * 32);
        high *= at(p.scales + block * 32 + 16);
    }
    if (p.into == Into::GATED) {
        store(p.gated + row * (p.outputs / 2) + block * 16, gate(low, p.slope, p.cube) * high);
        return;
    }
    if (p.bias) {
        low += at(p.bias + block * 32);
        high += at(p.bias + block * 32 + 16);
    }
    float *to = p.to + row * p.outputs + block * 32;
    if (p.into == Into::ADD) {
        low += at(to);
        high += at(to + 16);
    }
    at(to) = low;
    at(to + 16) = high;
}

template <int R, int F, class W>
void tile(const Product<float, W> &p, int64_t row, int64_t block, Ahead<F> ahead) {
    const float *x = p.x + row * p.inputs;
    const W *w = p.weights + block * 32 * p.inputs;
    vec low[R] = {}, high[R] = {};
    for (int64_t k = 0; k < p.inputs; k++) {
        vec first = load(w + k * 32), second = load(w + k * 32 + 16);
        ahead.fetch(k);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            vec number = all(x[r * p.inputs + k]);
            low[r] += number * first;
            high[r] += number * second;
        }
    }
    for (int r = 0; r < R; r++) finish(p, row + r, block, low[r], high[r]);
}

#if HAS_BF16
template <int R, int F, class W>
void tile(const Product<bf16, W> &p, int64_t row, int64_t block, Ahead<F> ahead) {
    const bf16 *x = p.x + row * p.inputs;
    const W *w = p.weights + block * 32 * p.inputs;
    constexpr int U = R == 1 ? 4 : R <= 3 ? 2 : 1;  // sums that do not wait for each other
    __m512 low[R * U], high[R * U];
    for (int i = 0; i < R * U; i++) low[i] = high[i] = _mm512_setzero_ps();
    int64_t pairs = p.inputs / 2, k = 0;
    for (; k + U <= pairs; k += U) {
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) {
            const W *here = w + (k + u) * 64;
            ahead.fetch(k + u);
            __m512i first = pairs_at(here), second = pairs_at(here + 32);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                __m512i numbers = pair_of(x + r * p.inputs + 2 * (k + u));
                low[r * U + u] = dot(low[r * U + u], numbers, first);
                high[r * U + u] = dot(high[r * U + u], numbers, second);
            }
        }
    }
    for (; k < pairs; k++)
        for (int r = 0; r < R; r++) {
            __m512i numbers = pair_of(x + r * p.inputs + 2 * k);
            low[r * U] = dot(low[r * U], numbers, pairs_at(w + k * 64));
            high[r * U] = dot(high[r * U], numbers, pairs_at(w + k * 64 + 32));
        }
    for (int r = 0; r < R; r++) {
        for (int u = 1; u < U; u++) {
            low[r * U] = _mm512_add_ps(low[r * U], low[r * U + u]);
            high[r * U] = _mm512_add_ps(high[r * U], high[r * U + u]);
        }
        finish(p, row + r, block, (vec)low[r * U], (vec)high[r * U]);
    }
}
#endif

// A tile of `count` rows, at most R and at least `least`.
template <int R, int least, int F, class T, class W>
void tile_of(const Product<T, W> &p, int64_t row, int64_t count, int64_t block, Ahead<F> ahead) {
    if constexpr (R > least) {
        if (count < R) return tile_of<R - 1, least, F>(p, row, count, block, ahead);
    }
    tile<R, F>(p, row, block, ahead);
}

// All rows in tiles of about the same size. With each step of its loop a tile fetches its part of `line` bytes from
// `there` on.
template <int F, int most, int least, class T, class W>
void tiles(const Product<T, W> &p, int64_t block, int64_t count, const char *there, int64_t line) {
    const int64_t steps = p.inputs * int64_t(sizeof(T)) / 4;
    for (int64_t i = 0, row = 0; i < count; i++) {
        const int64_t size = (p.rows - row) / (count - i);
        const Ahead<F> ahead{there + i * steps * line / count, line / count};
        tile_of<most, least, F>(p, row, size, block, ahead);
        row += size;
    }
}

// The product with the weights of one block in type T.
template <class T> Product<T> expanded(const Product<T> &p, int64_t) { return p; }

// Of int8 that is a copy in this thread's cache, which the next block overwrites. Weights are found by their block's
// number: they begin where those of block 0 would be.
template <class T> Product<T> expanded(const Product<T, int8_t> &p, int64_t block) {
    struct alignas(64) Line {
        char bytes[64];
    };
    static thread_local std::vector<Line> lines;
    const int64_t count = 32 * p.inputs;
    const size_t wanted = count * sizeof(T) / sizeof(Line);
    if (lines.size() < wanted) lines.resize(wanted);
    T *to = reinterpret_cast<T *>(lines.data());
    expand(p.weights + block * count, count, to);
    return {p.x, to - block * count, p.scales, p.bias, p.rows, p.inputs, p.outputs, p.to, p.gated, p.slope, p.cube,
            p.into};
}

constexpr int64_t FEW_TILES = 8;  // of more tiles the first, which waits for memory, is a small part

// So many rows are one tile that takes weights as they come. Of more rows int8 is turned into numbers beforehand: these
// tiles are compiled anyway.
constexpr int FEW_ROWS_OF_INT8 = std::min(TILE, 4);
template <class T, class W> constexpr int FEW_ROWS = std::is_same_v<T, W> ? TILE : FEW_ROWS_OF_INT8;

constexpr int LEAST_ROWS = std::min((TILE + 1) / 2, FEW_ROWS_OF_INT8 + 1);  // of a tile where there are more rows

// One block of 32 outputs, for all rows: its weights stay in the cache meanwhile, and those of block `next` are fetched
// there. Few rows fetch what they need themselves soon; of many tiles none fetches anything.
template <class T, class W> void multiply(const Product<T, W> &p, int64_t block, int64_t next) {
    constexpr int64_t line = 32 * 4 * sizeof(W) / sizeof(T);  // bytes of weights for each step of a tile's loop
    const int64_t count = (p.rows + TILE - 1) / TILE;
    auto bytes_of = [&](int64_t b) { return reinterpret_cast<const char *>(p.weights + b * 32 * p.inputs); };
    const char *there = bytes_of(std::min(next, p.outputs / 32 - 1));
    if (p.rows <= FEW_ROWS<T, W>) {
        tiles<(line + 63) / 64, FEW_ROWS<T, W>, 1>(p, block, count, bytes_of(block) + 4096, line);
    } else if (count <= FEW_TILES) {
        tiles<1, TILE, LEAST_ROWS>(expanded(p, block), block, count, there, line);
    } else {
        tiles<0, TILE, LEAST_ROWS>(expanded(p, block), block, count, nullptr, 0);
    }
}

}  // namespace paceline
