// Cutting the attention of a step into pieces that threads take one by one.
#pragma once

#include "attention.h"
#include "model.h"
#include "team.h"

namespace paceline {

// Positions at which two rows have the same blocks, in all groups; of those that both have in the cache already.
inline int64_t alike(const Model &m, const Step &s, int64_t row, int64_t other) {
    int64_t count = std::min(s.context[row], s.context[other]) - 1;
    for (int64_t l = 0; l < m.layer_count; l++) {
        const Layer &layer = m.layers[l];
        if (l > 0 && layer.group == m.layers[l - 1].group) continue;
        const int32_t *table = s.tables[layer.group] + row * s.widths[layer.group];
        const int32_t *others = s.tables[layer.group] + other * s.widths[layer.group];
        int64_t blocks = 0;
        while ((blocks + 1) * layer.block_size <= count && table[blocks] == others[blocks]) blocks++;
        count = std::min(count, blocks * layer.block_size);
    }
    return count;
}

// Rows from `row` on that compute one token each and begin alike, at most `most`; and how much they share.
inline Piece alike_from(const Model &m, const Step &s, int64_t row, int64_t most) {
    Piece piece{row, s.row_start[row], 1, 0};
    for (int64_t other = row + 1; other < s.row_count && piece.count < most; other++, piece.count++) {
        if (s.row_start[other + 1] - s.row_start[other] != 1) break;
        const int64_t count = alike(m, s, row, other);
        if (count < SHORTEST_ALIKE || (piece.alike && count < piece.alike / 2)) break;
        piece.alike = piece.alike ? std::min(piece.alike, count) : count;
    }
    return piece;
}

// Cut the attention of a step into what threads take one by one: some tokens of a row, or rows that begin alike.
inline void cut_into_pieces(Team &team, bool joins) {
    const Model &m = *team.model;
    const Step &s = *team.step;
    const int64_t together = std::max<int64_t>(1, QUERIES / (m.heads / m.key_heads));
    team.pieces.clear();
    for (int64_t row = 0; row < s.row_count; row++) {
        const int64_t begin = s.row_start[row], end = s.row_start[row + 1];
        if (joins && end - begin == 1) {
            team.pieces.push_back(alike_from(m, s, row, together));
            row += team.pieces.back().count - 1;
            continue;
        }
        for (int64_t t = begin; t < end; t += together) team.pieces.push_back({row, t, std::min(together, end - t), 0});
    }
}

inline void cut(Team &team) {
    const int64_t threads = team.thread_count;
    const int64_t wanted = threads == 1 ? 1 : 4 * threads;  // so that nobody waits for long
    cut_into_pieces(team, true);
    team.parts = 0;
    if (int64_t(team.pieces.size()) >= wanted) return;
    cut_into_pieces(team, false);
    const int64_t pieces = team.pieces.size(), heads = team.model->key_heads;
    if (pieces >= wanted) return;
    int64_t longest = 0;
    for (int64_t row = 0; row < team.step->row_count; row++) longest = std::max(longest, team.step->context[row]);
    team.parts = std::max<int64_t>(1, std::min(longest / SHORTEST_PART, wanted / (pieces * heads) + 1));
    team.partial.resize(pieces * heads * team.parts * Sums::size(team.model->dim));
}

}  // namespace paceline
