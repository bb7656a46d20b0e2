// Attention over block tables. Softmax goes along with the keys, so that no context is too long for the scores.
#pragma once

#include "model.h"
#include "numbers.h"

namespace paceline {

constexpr int64_t QUERIES = 16;  // query heads times tokens that are computed together
constexpr int64_t KEYS = 64;     // keys at a time, a multiple of 16

struct Piece {
    int64_t row, first, count;  // tokens [first, first + count) of the step, all of one row
};

#if defined(__AVX512F__)
// 16 rows of 16 dwords each become 16 columns.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
#endif

// Scores of `queries` [count, dim] against 16 keys, `[count][KEYS]` from `scores` on.
#if defined(__AVX512F__)
inline vec weigh(vec total, const float *query, __m512i key) { return total + all(*query) * (vec)key; }
#if HAS_BF16
inline vec weigh(vec total, const bf16 *query, __m512i key) { return (vec)dot((__m512)total, pair_of(query), key); }
#endif
#endif

template <class T>
inline void score(const T *queries, int64_t count, int64_t dim, const T *const keys[16], float *scores) {
#if defined(__AVX512F__)
    constexpr int64_t each = 4 / sizeof(T);  // numbers in a dword
    vec totals[QUERIES] = {};
    for (int64_t d = 0; d < dim; d += 16 * each) {
        __m512i columns[16];
        for (int i = 0; i < 16; i++) columns[i] = _mm512_loadu_si512(keys[i] + d);
        transpose(columns);
        for (int64_t q = 0; q < count; q++)
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                totals[q] = weigh(totals[q], queries + q * dim + d + i * each, columns[i]);
    }
    for (int64_t q = 0; q < count; q++) at(scores + q * KEYS) = totals[q];
#else
    for (int i = 0; i < 16; i++)
        for (int64_t q = 0; q < count; q++) {
            vec total = {};
            for (int64_t d = 0; d < dim; d += 16) total += load(queries + q * dim + d) * load(keys[i] + d);
            scores[q * KEYS + i] = sum(total);
        }
#endif
}

template <class T> struct Attention {
    const Model &m;
    const Layer &layer;
    const Step &s;
    const T *queries;  // [tokens, heads, dim], scaled
    T *to;             // the same

    // All query heads that share `key_head`, for the tokens of a piece: softmax goes along with the keys.
    void attend(const Piece &piece, int64_t key_head) const {
        const int64_t dim = m.dim, shared = m.heads / m.key_heads, count = piece.count * shared;
        const int64_t past = s.context[piece.row] - s.row_start[piece.row + 1];  // position of a token: past + its index
        const int64_t last = past + piece.first + piece.count - 1;
        const int64_t begin = layer.window ? std::max<int64_t>(0, past + piece.first + 1 - layer.window) : 0;
        alignas(64) T q[QUERIES * 256];
        alignas(64) float sums[QUERIES * 256], scores[QUERIES * KEYS], weight[QUERIES], highest[QUERIES];
        for (int64_t t = 0; t < piece.count; t++)
            std::memcpy(q + t * shared * dim, queries + ((piece.first + t) * m.heads + key_head * shared) * dim,
                        shared * dim * sizeof(T));
        std::memset(sums, 0, count * dim * sizeof(float));
        for (int64_t i = 0; i < count; i++) weight[i] = 0, highest[i] = -INFINITY;
        const int32_t *table = s.tables[layer.group] + piece.row * s.widths[layer.group];
        for (int64_t start = begin; start <= last; start += KEYS) {
            const int64_t size = std::min(KEYS, last + 1 - start);
            const T *values[KEYS];
            gather(table, key_head, start, size, q, count, scores, values);
            for (int64_t i = 0; i < count; i++) {
                const int64_t position = past + piece.first + i / shared;
                const int64_t from = layer.window ? std::max<int64_t>(0, position + 1 - layer.window - start) : 0;
                const int64_t until = std::min(size, position + 1 - start);
                take(scores + i * KEYS, size, from, until, sums + i * dim, weight[i], highest[i]);
            }
            spread(scores, values, size, count, sums);
        }
        for (int64_t i = 0; i < count; i++) {
            T *out = to + ((piece.first + i / shared) * m.heads + key_head * shared + i % shared) * dim;
            const vec factor = all(1.0f / weight[i]);
            for (int64_t d = 0; d < dim; d += 16) store(out + d, at(sums + i * dim + d) * factor);
        }
    }

    // Scores of keys [start, start + size), and where their values are.
    void gather(const int32_t *table, int64_t key_head, int64_t start, int64_t size, const T *q, int64_t count,
                float *scores, const T **values) const {
        const T *keys[KEYS];
        const T *all_keys = static_cast<const T *>(layer.keys), *all_values = static_cast<const T *>(layer.values);
        const int64_t token = m.key_heads * m.dim;  // numbers of all heads
        int64_t index = start / layer.block_size, offset = start % layer.block_size;
        for (int64_t i = 0; i < size; index++, offset = 0) {
            const int64_t block = table[index], end = std::min(size, i + layer.block_size - offset);
            const T *key = all_keys + (block * layer.key_stride + offset) * token + key_head * m.dim;
            const T *value = all_values + (block * layer.value_stride + offset) * token + key_head * m.dim;
            for (; i < end; i++, key += token, value += token) {
                keys[i] = key, values[i] = value;
                for (int64_t d = 0; d < m.dim; d += 64 / sizeof(T)) __builtin_prefetch(value + d);
            }
        }
        for (int64_t i = size; i < (size + 15) / 16 * 16; i++) keys[i] = keys[0];
        for (int64_t i = 0; i < size; i += 16) score(q, count, m.dim, keys + i, scores + i);
    }

    // Turn the scores of one query into weights: those of keys [from, until) count, of `size` that were scored. What it
    // had summed up before is scaled to the new highest score.
    void take(float *scores, int64_t size, int64_t from, int64_t until, float *sums, float &weight, float &highest) const {
        const int64_t end = (size + 15) / 16 * 16;
        for (int64_t i = 0; i < std::min(from, end); i++) scores[i] = -INFINITY;
        for (int64_t i = std::max<int64_t>(0, until); i < end; i++) scores[i] = -INFINITY;
        vec most = at(scores);
        for (int64_t i = 16; i < end; i += 16) most = most > at(scores + i) ? most : at(scores + i);
        const float top = std::max(highest, largest(most));
        if (top == -INFINITY) {
            if (from < until) weight = NAN;  // it sees keys, and none of them can be scored
            for (int64_t i = 0; i < end; i += 16) at(scores + i) = vec{};
            return;
        }
        if (top > highest) {
            const float factor = highest == -INFINITY ? 0.0f : std::exp(highest - top);
            weight *= factor;
            for (int64_t d = 0; d < m.dim; d += 16) at(sums + d) *= factor;
            highest = top;
        }
        vec total = {};
        for (int64_t i = 0; i < end; i += 16) {
            const vec distance = at(scores + i) - top;
            const vec share = distance < -80.0f ? vec{} : exponential(distance);
            total += share;
            at(scores + i) = share;
        }
        weight += sum(total);
    }

    // sums += weights @ values. Values are read once for several queries, 64 numbers of a head at a time.
    void spread(const float *weights, const T *const *values, int64_t size, int64_t count, float *sums) const {
        int64_t d = 0;
        for (; d + 64 <= m.dim; d += 64) spread_over<4>(weights, values, size, count, sums, d);
        for (; d < m.dim; d += 16) spread_over<1>(weights, values, size, count, sums, d);
    }

    template <int W> void spread_over(const float *weights, const T *const *values, int64_t size, int64_t count,
                                      float *sums, int64_t d) const {
        int64_t i = 0;
        for (; i + 6 <= count; i += 6) spread_to<6, W>(weights + i * KEYS, values, size, sums + i * m.dim, d);
        for (; i + 3 <= count; i += 3) spread_to<3, W>(weights + i * KEYS, values, size, sums + i * m.dim, d);
        for (; i < count; i++) spread_to<1, W>(weights + i * KEYS, values, size, sums + i * m.dim, d);
    }

    template <int Q, int W>
    void spread_to(const float *weights, const T *const *values, int64_t size, float *sums, int64_t d) const {
        vec totals[Q][W];
        for (int q = 0; q < Q; q++)
            for (int w = 0; w < W; w++) totals[q][w] = at(sums + q * m.dim + d + 16 * w);
        for (int64_t i = 0; i < size; i++) {
            vec value[W];
            for (int w = 0; w < W; w++) value[w] = load(values[i] + d + 16 * w);
            for (int q = 0; q < Q; q++)
                for (int w = 0; w < W; w++) totals[q][w] += all(weights[q * KEYS + i]) * value[w];
        }
        for (int q = 0; q < Q; q++)
            for (int w = 0; w < W; w++) at(sums + q * m.dim + d + 16 * w) = totals[q][w];
    }
};

}  // namespace paceline
