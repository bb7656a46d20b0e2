// Numbers: float32 and bfloat16, sixteen at a time.
//
// `vec` is GCC's and Clang's portable vector; on a processor with narrower registers it is several of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif
#if defined(__AVX512F__)
#define TILE 12  // rows of a tile: their sums stay in registers
#else
#define TILE 3
#endif

namespace paceline {

struct bf16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(int8_t value) { return value; }
inline float to_float(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline void put(float &to, float value) { to = value; }
inline void put(bf16 &to, float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    if (value != value) to.bits = 0x7fc0;
}

typedef float vec __attribute__((vector_size(64), aligned(4)));  // 16 numbers, wherever they are
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef int8_t int8vec __attribute__((vector_size(16), aligned(1)));

inline vec &at(float *p) { return *reinterpret_cast<vec *>(p); }
inline const vec &at(const float *p) { return *reinterpret_cast<const vec *>(p); }
inline vec all(float value) { return vec{} + value; }

inline vec load(const float *p) { return at(p); }
inline vec load(const bf16 *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    vec out;
    for (int i = 0; i < 16; i++) out[i] = to_float(p[i]);
    return out;
#endif
}
inline vec load(const int8_t *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const int8vec *>(p), ivec), vec);
#endif
}
inline void store(float *p, vec value) { at(p) = value; }
inline void store(bf16 *p, vec value) {
#if HAS_BF16
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
    for (int i = 0; i < 16; i++) put(p[i], value[i]);
#endif
}
inline float sum(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float out = 0;
    for (int i = 0; i < 16; i++) out += v[i];
    return out;
#endif
}
inline float largest(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float out = v[0];
    for (int i = 1; i < 16; i++) out = std::max(out, v[i]);
    return out;
#endif
}

// Where the highest of `count` numbers is, the first of several; `highest` is NaN if one of them is.
inline int64_t likeliest(const float *x, int64_t count, float &highest) {
    constexpr int W = 4;  // so many do not wait for each other
    vec best[W];
    ivec where[W], none[W];
    for (int w = 0; w < W; w++) best[w] = all(-INFINITY), where[w] = ivec{}, none[w] = ivec{};
    int64_t i = 0;
    for (; i + 16 * W <= count; i += 16 * W)
        for (int w = 0; w < W; w++) {
            const vec here = at(x + i + 16 * w);
            const ivec higher = here > best[w];
            best[w] = higher ? here : best[w];
            where[w] = higher ? ivec{} + int32_t(i) : where[w];
            none[w] |= here != here;
        }
    highest = -INFINITY;
    int64_t place = 0;
    bool is_nan = false;
    for (int w = 0; w < W; w++)
        for (int lane = 0; lane < 16; lane++) {
            const int64_t index = where[w][lane] + 16 * w + lane;
            is_nan |= none[w][lane] != 0;
            const bool is_first = best[w][lane] == highest && index < place;
            if (best[w][lane] > highest || is_first) highest = best[w][lane], place = index;
        }
    for (; i < count; i++) {
        is_nan |= x[i] != x[i];
        if (x[i] > highest) highest = x[i], place = i;
    }
    if (is_nan) highest = NAN;
    return place;
}

// exp to about one unit in the last place of float32: 2^n * p(r), r in [-ln 2 / 2, ln 2 / 2] (Cephes' expf).
inline vec exponential(vec x) {
    const vec low = all(-87.0f), high = all(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    vec n = x * 1.44269504088896341f;
    ivec whole = __builtin_convertvector(n + (n < 0 ? all(-0.5f) : all(0.5f)), ivec);
    n = __builtin_convertvector(whole, vec);
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec scale = (whole + 127) << 23;
    return p * (vec)scale;
}

// Each of `count` numbers becomes softly no larger than `most`, either way: most * tanh(x / most).
inline void cap(float *x, int64_t count, float most) {
    for (int64_t i = 0; i < count; i += 16)
        at(x + i) = most - 2 * most / (exponential(at(x + i) * (2 / most)) + 1.0f);
}

#if HAS_BF16
inline __m512i pair_of(const bf16 *p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
}
inline __m512i pairs_at(const bf16 *p) { return _mm512_loadu_si512(p); }
inline __m512i pairs_at(const int8_t *p) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(p + 16), (__m512)load(p));
}
inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

// `count` numbers, a multiple of 32, in another type.
inline void expand(const int8_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += 16) store(to + i, load(from + i));
}
#if HAS_BF16
inline void expand(const int8_t *from, int64_t count, bf16 *to) {
    for (int64_t i = 0; i < count; i += 32) _mm512_storeu_si512(to + i, pairs_at(from + i));
}
#endif

}  // namespace paceline
