// Attention over block tables. Softmax goes along with the keys, so that no context is too long for the scores.
//
// Blocks lie anywhere in memory, where a processor does not guess what comes next: while it works on some keys and
// values it is told to fetch those that follow, a line or two with each load. Keys are read as rows and turned into
// columns in registers, which pays the more queries look at them: so tokens of one row go together, and so do rows
// whose first blocks are the same ones, over what they share.
#pragma once

#include "model.h"
#include "numbers.h"
#include "team.h"

namespace paceline {

constexpr int64_t KEYS = 64;              // keys at a time, a multiple of 16
constexpr int64_t SHORTEST_PART = 256;    // keys of a part: merging costs about as much as some keys
constexpr int64_t SHORTEST_ALIKE = KEYS;  // positions that rows must share to be worked on together

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

#if defined(__AVX512F__)
inline vec weigh(vec total, const float *query, __m512i key) { return total + all(*query) * (vec)key; }
#if HAS_BF16
inline vec weigh(vec total, const bf16 *query, __m512i key) { return (vec)dot((__m512)total, key, pair_of(query)); }
#endif

// Scores of Q queries, of which 16 columns of keys are there: two sums for each, which do not wait for each other.
template <int Q, class T>
inline void weigh_all(const T *queries, int64_t dim, const __m512i columns[16], float *scores) {
    constexpr int64_t each = 4 / sizeof(T);  // numbers in a dword
    vec even[Q], odd[Q];
    for (int q = 0; q < Q; q++) even[q] = at(scores + q * KEYS), odd[q] = vec{};
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2)
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            even[q] = weigh(even[q], queries + q * dim + i * each, columns[i]);
            odd[q] = weigh(odd[q], queries + q * dim + (i + 1) * each, columns[i + 1]);
        }
    for (int q = 0; q < Q; q++) at(scores + q * KEYS) = even[q] + odd[q];
}
#endif

// Scores of queries [count, dim] against 16 keys, `[count][KEYS]` from `scores` on; `next` keys are fetched meanwhile.
template <class T>
inline void score(const T *queries, int64_t count, int64_t dim, const T *const keys[16], const T *const next[16],
                  float *scores) {
#if defined(__AVX512F__)
    for (int64_t q = 0; q < count; q++) at(scores + q * KEYS) = vec{};
    for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) {
        __m512i columns[16];
        for (int i = 0; i < 16; i++) {
            columns[i] = _mm512_loadu_si512(keys[i] + d);
            __builtin_prefetch(next[i] + d);
        }
        transpose(columns);
        int64_t q = 0;
        for (; q + 4 <= count; q += 4) weigh_all<4>(queries + q * dim + d, dim, columns, scores + q * KEYS);
        switch (count - q) {
            case 3: weigh_all<3>(queries + q * dim + d, dim, columns, scores + q * KEYS); break;
            case 2: weigh_all<2>(queries + q * dim + d, dim, columns, scores + q * KEYS); break;
            case 1: weigh_all<1>(queries + q * dim + d, dim, columns, scores + q * KEYS);
        }
    }
#else
    for (int i = 0; i < 16; i++) {
        for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(next[i] + d);
        for (int64_t q = 0; q < count; q++) {
            vec total = {};
            for (int64_t d = 0; d < dim; d += 16) total += load(queries + q * dim + d) * load(keys[i] + d);
            scores[q * KEYS + i] = sum(total);
        }
    }
#endif
}

// What one thread does at a time: some key heads of a piece, over one of the parts that its keys are cut into.
struct Share {
    int64_t head, heads, part, parts;
};

// Softmax so far, of the query heads that share a key head: [queries, dim], [queries], [queries].
struct Sums {
    float *sums, *weight, *highest;

    static int64_t size(int64_t dim) { return QUERIES * (dim + 2); }
    Sums(float *memory, int64_t dim) : sums(memory), weight(memory + QUERIES * dim), highest(weight + QUERIES) {}
    Sums(float *sums, float *weight, float *highest) : sums(sums), weight(weight), highest(highest) {}

    Sums from(int64_t query, int64_t dim) const { return {sums + query * dim, weight + query, highest + query}; }

    void clear(int64_t count, int64_t dim) const {
        std::memset(sums, 0, count * dim * sizeof(float));
        for (int64_t i = 0; i < count; i++) weight[i] = 0, highest[i] = -INFINITY;
    }

    // Take in what was summed up over other keys.
    void merge(const Sums &other, int64_t count, int64_t dim) const {
        for (int64_t i = 0; i < count; i++) {
            if (other.weight[i] == 0) continue;
            const float top = std::max(highest[i], other.highest[i]);
            const float here = highest[i] == -INFINITY ? 0.0f : std::exp(highest[i] - top);
            const float there = std::exp(other.highest[i] - top);
            weight[i] = weight[i] * here + other.weight[i] * there;
            for (int64_t d = 0; d < dim; d += 16)
                at(sums + i * dim + d) = at(sums + i * dim + d) * here + at(other.sums + i * dim + d) * there;
            highest[i] = top;
        }
    }
};

template <class T> struct Attention {
    const Model &m;
    const Layer &layer;
    const Step &s;
    const T *queries;  // [tokens, heads, dim], scaled
    T *to;             // the same

    struct Keys {
        int64_t size;
        const T *keys[KEYS], *values[KEYS];  // those of the first head; what follows the last repeats the first
    };

    // Where the keys and values of the positions [start, end) are, the first `KEYS` of them.
    void locate(int64_t row, int64_t start, int64_t end, Keys &to) const {
        to.size = std::max<int64_t>(0, std::min(KEYS, end - start));
        if (to.size == 0) return;
        const int32_t *table = s.tables[layer.group] + row * s.widths[layer.group];
        const T *all_keys = static_cast<const T *>(layer.keys), *all_values = static_cast<const T *>(layer.values);
        const int64_t token = m.key_heads * m.dim;  // numbers of all heads
        int64_t index = start / layer.block_size, offset = start % layer.block_size;
        for (int64_t i = 0; i < to.size; index++, offset = 0) {
            const int64_t block = table[index], until = std::min(to.size, i + layer.block_size - offset);
            const T *key = all_keys + (block * layer.key_stride + offset) * token;
            const T *value = all_values + (block * layer.value_stride + offset) * token;
            for (; i < until; i++, key += token, value += token) to.keys[i] = key, to.values[i] = value;
        }
        for (int64_t i = to.size; i < (to.size + 15) / 16 * 16; i++) to.keys[i] = to.keys[0];
    }

    int64_t shared() const { return m.heads / m.key_heads; }
    int64_t position(const Piece &piece, int64_t token) const {
        const int64_t row = piece.row_of(token);
        return s.context[row] - s.row_start[row + 1] + piece.first + token;
    }

    // Keys of one row that are seen by some tokens one after the other.
    struct Run {
        int64_t row, begin, end;
    };

    // What all tokens of a piece see by the table of its first row. Of a piece whose rows begin alike: of what they
    // share.
    Run run(const Piece &piece) const {
        const int64_t first = layer.window ? std::max<int64_t>(0, position(piece, 0) + 1 - layer.window) : 0;
        if (!piece.alike) return {piece.row, first, position(piece, piece.count - 1) + 1};
        int64_t begin = first;
        for (int64_t t = 1; t < piece.count && layer.window; t++)
            begin = std::min(begin, std::max<int64_t>(0, position(piece, t) + 1 - layer.window));
        return {piece.row, std::min(begin, piece.alike), piece.alike};
    }

    // What token `t` of a piece whose rows begin alike sees beyond that.
    Run rest(const Piece &piece, int64_t t) const {
        const int64_t first = layer.window ? std::max<int64_t>(0, position(piece, t) + 1 - layer.window) : 0;
        return {piece.row + t, std::max(first, piece.alike), position(piece, t) + 1};
    }

    // Sum up a share, each key head's into `sums` of its own. Keys of several heads lie side by side, so they are taken
    // together; those that come next are fetched meanwhile, at the end those of the piece `after`.
    void attend(const Piece &piece, const Share &share, const Piece *after, float *memory) const {
        for (int64_t h = 0; h < share.heads; h++) sums_of(memory, h).clear(piece.count * shared(), m.dim);
        const Run whole = run(piece), last = after ? run(*after) : Run{0, 0, 0};
        if (!piece.alike) {
            const int64_t length = ((whole.end - 1 - whole.begin) / share.parts / KEYS + 1) * KEYS;  // of a part
            const int64_t begin = whole.begin + share.part * length;
            walk({whole.row, begin, std::min(whole.end, begin + length)}, last, piece, 0, share, memory);
            return;
        }
        walk(whole, rest(piece, 0), piece, 0, share, memory);
        for (int64_t t = 0; t < piece.count; t++) {
            const Piece one{piece.row + t, piece.first + t, 1, 0};
            walk(rest(piece, t), t + 1 < piece.count ? rest(piece, t + 1) : last, one, t * shared(), share, memory);
        }
    }

    Sums sums_of(float *memory, int64_t head) const { return {memory + head * Sums::size(m.dim), m.dim}; }

    // Add the keys of a run to the sums of a piece, which begin at query `offset`; `after` is the run that comes next.
    void walk(const Run &run, const Run &after, const Piece &piece, int64_t offset, const Share &share,
              float *memory) const {
        Keys now, next;
        locate(run.row, run.begin, run.end, now);
        for (int64_t start = run.begin; start < run.end; start += KEYS, std::swap(now, next)) {
            if (start + KEYS < run.end) locate(run.row, start + KEYS, run.end, next);
            else locate(after.row, after.begin, after.end, next);
            for (int64_t h = 0; h < share.heads; h++)
                take_in(piece, share.head + h, start, now, next, sums_of(memory, h).from(offset, m.dim));
        }
    }

    // Add one lot of keys, whose first has position `start`, to the sums of a key head.
    void take_in(const Piece &piece, int64_t key_head, int64_t start, const Keys &keys, const Keys &next,
                 const Sums &sums) const {
        const int64_t dim = m.dim, count = piece.count * shared(), head = key_head * dim;
        alignas(64) T q[QUERIES * 256];
        alignas(64) float scores[QUERIES * KEYS];
        for (int64_t t = 0; t < piece.count; t++)
            std::memcpy(q + t * shared() * dim, queries + ((piece.first + t) * m.heads + key_head * shared()) * dim,
                        shared() * dim * sizeof(T));
        const T *here[KEYS], *later[KEYS];
        for (int64_t i = 0; i < (keys.size + 15) / 16 * 16; i++)
            here[i] = keys.keys[i] + head, later[i] = i < next.size ? next.keys[i] + head : here[i];
        for (int64_t i = 0; i < keys.size; i += 16) score(q, count, dim, here + i, later + i, scores + i);
        for (int64_t i = 0; i < count && layer.score_cap; i++) cap(scores + i * KEYS, keys.size, layer.score_cap);
        for (int64_t i = 0; i < count; i++) {
            const int64_t place = position(piece, i / shared());
            const int64_t from = layer.window ? std::max<int64_t>(0, place + 1 - layer.window - start) : 0;
            const int64_t until = std::min(keys.size, place + 1 - start);
            take(scores + i * KEYS, keys.size, from, until, sums.sums + i * dim, sums.weight[i], sums.highest[i]);
        }
        for (int64_t i = 0; i < keys.size; i++)
            here[i] = keys.values[i] + head, later[i] = i < next.size ? next.values[i] + head : here[i];
        spread(scores, here, later, keys.size, count, sums.sums);
    }

    void put_out(const Piece &piece, int64_t key_head, const Sums &sums) const {
        for (int64_t i = 0; i < piece.count * shared(); i++) {
            T *out = to + ((piece.first + i / shared()) * m.heads + key_head * shared() + i % shared()) * m.dim;
            const vec factor = all(1.0f / sums.weight[i]);
            for (int64_t d = 0; d < m.dim; d += 16) store(out + d, at(sums.sums + i * m.dim + d) * factor);
        }
    }

    // Turn the scores of one query into weights: those of keys [from, until) count, of `size` that were scored. What it
    // had summed up before is scaled to the new highest score.
    void take(float *scores, int64_t size, int64_t from, int64_t until, float *sums, float &weight,
              float &highest) const {
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

    // sums += weights @ values. Values are read once for several queries, 64 numbers of a head at a time; the `next`
    // ones are fetched meanwhile.
    void spread(const float *weights, const T *const *values, const T *const *next, int64_t size, int64_t count,
                float *sums) const {
        int64_t d = 0;
        for (; d + 64 <= m.dim; d += 64) spread_over<4>(weights, values, next, size, count, sums, d);
        for (; d < m.dim; d += 16) spread_over<1>(weights, values, next, size, count, sums, d);
    }

    template <int W>
    void spread_over(const float *weights, const T *const *values, const T *const *next, int64_t size, int64_t count,
                     float *sums, int64_t d) const {
        int64_t i = 0;
        for (; i + 6 <= count; i += 6) spread_to<6, W>(weights + i * KEYS, values, next, size, sums + i * m.dim, d);
        switch (count - i) {
            case 5: spread_to<5, W>(weights + i * KEYS, values, next, size, sums + i * m.dim, d); break;
            case 4: spread_to<4, W>(weights + i * KEYS, values, next, size, sums + i * m.dim, d); break;
            case 3: spread_to<3, W>(weights + i * KEYS, values, next, size, sums + i * m.dim, d); break;
            case 2: spread_to<2, W>(weights + i * KEYS, values, next, size, sums + i * m.dim, d); break;
            case 1: spread_to<1, W>(weights + i * KEYS, values, next, size, sums + i * m.dim, d);
        }
    }

    template <int Q, int W>
    void spread_to(const float *weights, const T *const *values, const T *const *next, int64_t size, float *sums,
                   int64_t d) const {
        vec totals[Q][W];
        for (int q = 0; q < Q; q++)
            for (int w = 0; w < W; w++) totals[q][w] = at(sums + q * m.dim + d + 16 * w);
        for (int64_t i = 0; i < size; i++) {
            vec value[W];
            for (int64_t e = 0; e < 16 * W; e += 64 / sizeof(T)) __builtin_prefetch(next[i] + d + e);
            for (int w = 0; w < W; w++) value[w] = load(values[i] + d + 16 * w);
            for (int q = 0; q < Q; q++)
                for (int w = 0; w < W; w++) totals[q][w] += all(weights[q * KEYS + i]) * value[w];
        }
        for (int q = 0; q < Q; q++)
            for (int w = 0; w < W; w++) at(sums + q * m.dim + d + 16 * w) = totals[q][w];
    }
};

}  // namespace paceline
