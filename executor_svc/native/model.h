// What Python hands over: pointers and sizes, in the order of `library.py`.
#pragma once

#include <cstdint>

namespace paceline {

struct Layer {
    const float *norm1, *norm2;        // [hidden] before attention, and before the gated product, or null
    const float *after_attention, *after_product;  // [hidden] norms of what they give, or null
    const float *query_norm, *key_norm;  // [dim], of all heads together [heads * dim], or null
    // Matrices are packed; as int8 the scales of all outputs come first, in float32.
    const void *qkv, *out;
    const void *router;                // [experts, hidden]; null: there is one gated product for all tokens
    const void *const *gate_ups, *const *downs;  // by expert
    const float *qkv_bias, *out_bias;  // [outputs, padded], or null
    void *keys, *values;               // this layer's part of the pool
    int64_t key_stride, value_stride;  // tokens from one block to the next
    int64_t group;                     // which of the step's block tables
    int64_t block_size;                // tokens of a block in that group
    int64_t window;                    // 0: all
    int64_t rotation;                  // which of the step's rotations
    float score_cap;                   // attention's scores are softly no larger; 0: they are what they are
};

struct Model {
    int64_t is_bf16, is_int8, layer_count, hidden, heads, key_heads, dim, inner, vocabulary;
    int64_t rotated;  // numbers of a head that positions rotate
    int64_t norms_heads_together;
    int64_t experts, chosen, sums_to_one;  // of a mixture: how many there are, and a token has; whether shares do
    float epsilon, scaling;
    float gate_slope, gate_cube;  // of the gates' activation: `gate` in `product.h`
    float logit_cap;  // logits are softly no larger; 0: they are what they are
    float embedding_scale;
    const Layer *layers;
    const float *norm;
    const void *output;     // packed, of the output layer
    const void *embedding;  // [vocabulary, hidden], or null: it is the same matrix as that of the output layer
};

struct Step {
    int64_t token_count, row_count, sampled_count;
    const int64_t *row_start;      // [rows + 1] into the tokens
    const int64_t *context;        // [rows] tokens in the cache once the step has run
    const int32_t *const *tables;  // by group [rows, width]
    const int64_t *widths;         // by group
    const float *const *cosine, *const *sine;  // by rotation [positions, rotated]
    const int64_t *tokens;         // [tokens] ids; -1 - i is `previous[i]`
    const int64_t *previous;       // `likeliest` of the step before
    const int64_t *sampled;        // [sampled] tokens whose logits are wanted, each once
    float *logits;                 // [sampled, padded vocabulary]
    int64_t *likeliest;            // [sampled] where the highest logit is, the first of several
    float *highest;                // [sampled] NaN if one is
    void *scratch;
};

// Outputs of a packed matrix, which come in blocks of 32.
inline int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

}  // namespace paceline
