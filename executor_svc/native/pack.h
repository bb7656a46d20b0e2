// Packing matrices for the products: blocks of 32 outputs, all inputs of a block side by side.
#pragma once

#include "model.h"
#include "numbers.h"

namespace paceline {

// Blocks of 32 outputs, of which `each` numbers lie side by side; `number` gives that of an output and an input.
template <class W, class F> void pack(int64_t outputs, int64_t inputs, int64_t each, W *to, F number) {
    for (int64_t block = 0; block < padded(outputs) / 32; block++)
        for (int64_t k = 0; k < inputs; k += each)
            for (int64_t n = block * 32; n < block * 32 + 32; n++)
                for (int64_t i = 0; i < each; i++) *to++ = n < outputs ? number(n, k + i) : W{};
}

template <class T> void pack_plain(const T *weights, int64_t outputs, int64_t inputs, T *to) {
    pack(outputs, inputs, 4 / sizeof(T), to, [=](int64_t n, int64_t k) { return weights[n * inputs + k]; });
}

// Scales first, then whole numbers from -127 to 127: the largest of an output is one of them, the others are rounded.
template <class T> void pack_int8(const T *weights, int64_t outputs, int64_t inputs, int64_t each, float *to) {
    float *scales = to;
    for (int64_t n = 0; n < padded(outputs); n++) {
        float largest = 0;
        for (int64_t k = 0; n < outputs && k < inputs; k++) {
            const float size = std::abs(to_float(weights[n * inputs + k]));
            if (size > largest || size != size) largest = size;  // NaN stays, and is seen in the logits
        }
        scales[n] = largest / 127;
    }
    pack(outputs, inputs, each, reinterpret_cast<int8_t *>(to + padded(outputs)), [=](int64_t n, int64_t k) {
        return scales[n] > 0 ? int8_t(std::nearbyint(to_float(weights[n * inputs + k]) / scales[n])) : int8_t(0);
    });
}

}  // namespace paceline
