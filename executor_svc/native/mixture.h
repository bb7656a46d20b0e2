// Mixtures of experts: a router chooses some of them for each token, and tokens are grouped by expert, so that a step
// reads the weights of an expert once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace paceline {

// The `chosen` highest of a token's scores and the share that each has in the softmax of all of them, or, where shares
// are to sum to one, of the chosen ones.
inline void choose(const float *scores, int64_t experts, int64_t chosen, bool sums_to_one, int32_t *choices,
                   float *shares) {
    int64_t count = 0;
    for (int32_t expert = 0; expert < experts; expert++) {
        if (count == chosen && !(scores[expert] > shares[count - 1])) continue;
        int64_t i = count < chosen ? count++ : count - 1;
        for (; i > 0 && scores[expert] > shares[i - 1]; i--) choices[i] = choices[i - 1], shares[i] = shares[i - 1];
        choices[i] = expert, shares[i] = scores[expert];
    }
    const float top = shares[0];
    float total = 0;
    for (int64_t i = 0; i < chosen; i++) total += shares[i] = std::exp(shares[i] - top);
    if (!sums_to_one) total = 0;
    for (int64_t expert = 0; expert < experts && !sums_to_one; expert++) total += std::exp(scores[expert] - top);
    for (int64_t i = 0; i < chosen; i++) shares[i] /= total;
}

// Where the rows of each expert lie, side by side.
struct Groups {
    std::vector<int64_t> first;   // [experts + 1] the first row of each
    std::vector<int64_t> row_of;  // [tokens * chosen] row of each choice
    std::vector<int64_t> asked;   // experts that anybody chose

    void sort(const int32_t *choices, int64_t count, int64_t experts) {
        first.assign(experts + 1, 0);
        row_of.resize(count);
        asked.clear();
        for (int64_t i = 0; i < count; i++) first[choices[i] + 1]++;
        for (int64_t expert = 0; expert < experts; expert++) {
            if (first[expert + 1]) asked.push_back(expert);
            first[expert + 1] += first[expert];
        }
        std::vector<int64_t> next(first);
        for (int64_t i = 0; i < count; i++) row_of[i] = next[choices[i]]++;
    }
};

}  // namespace paceline
