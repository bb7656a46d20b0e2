// One step of a decoder-only transformer over a paged cache: norm, attention, norm, gated product, in every layer.
//
// A step is a program that every thread runs. The work of a phase is dealt out piece by piece, because a core may be
// lent to somebody else in the middle of it; a phase is over when its pieces are done, wherever the threads are.
//
// Weights are packed once: blocks of 32 outputs, all inputs of a block side by side, so that a step reads them from
// beginning to end; as int8 where a user asks for that, turned into the type of the step as they are read. The residual
// stream, scores and sums are float32 whatever the type of the weights is.

#include <exception>

#include "attention.h"
#include "mixture.h"
#include "model.h"
#include "numbers.h"
#include "pack.h"
#include "pieces.h"
#include "product.h"
#include "team.h"

namespace paceline {

template <class T> struct Program {
    Team &team;
    const Model &m;
    const Step &s;
    const bool keeps_time;  // one of the threads does
    const std::vector<Piece> &pieces;
    Groups &groups;
    std::vector<float> sums;  // of all key heads of a piece
    int64_t phase = 0, phase_began;
    T *normed, *attended, *queries, *inner;  // [tokens, hidden], [tokens, heads * dim] twice, [tokens, inner]
    float *x;                                // [tokens, hidden] residual stream
    float *qkv, *given;                      // [tokens, padded], [tokens, hidden]: never needed at the same time
    T *gathered;                             // [tokens * chosen, hidden], of a mixture; so are the rows of `inner`
    float *scores, *shares;                  // [tokens, padded experts], [tokens, chosen]
    int32_t *choices;                        // [tokens, chosen] experts
    const float *after = nullptr;            // norm of what is in `given`, still to be added to the residual stream

    int64_t qkv_count() const { return padded((m.heads + 2 * m.key_heads) * m.dim); }

    Program(Team &team, bool keeps_time)
        : team(team), m(*team.model), s(*team.step), keeps_time(keeps_time), pieces(team.pieces), groups(team.groups),
          sums(m.key_heads * Sums::size(m.dim)), phase_began(now_ns()) {
        char *p = static_cast<char *>(s.scratch);
        auto take = [&](int64_t bytes) { char *here = p; p += (bytes + 63) / 64 * 64; return here; };
        normed = (T *)take(s.token_count * m.hidden * sizeof(T));
        attended = (T *)take(s.token_count * m.heads * m.dim * sizeof(T));
        queries = (T *)take(s.token_count * m.heads * m.dim * sizeof(T));
        const int64_t rows = s.token_count * std::max<int64_t>(1, m.chosen);  // of gated products
        inner = (T *)take(rows * m.inner * sizeof(T));
        x = (float *)take(s.token_count * m.hidden * sizeof(float));
        qkv = given = (float *)take(std::max(s.token_count * qkv_count(), rows * m.hidden) * sizeof(float));
        gathered = (T *)take(m.chosen ? rows * m.hidden * sizeof(T) : 0);
        scores = (float *)take(s.token_count * padded(m.experts) * sizeof(float));
        shares = (float *)take(s.token_count * m.chosen * sizeof(float));
        choices = (int32_t *)take(s.token_count * m.chosen * sizeof(int32_t));
    }

    // Deal out the pieces of a phase, `size` at a time; then wait until all are done.
    template <class F> void deal(Kind kind, int64_t count, int64_t size, F work) {
        Phase &here = team.phases[phase++];
        for (int64_t i; (i = here.dealt.fetch_add(size, std::memory_order_relaxed)) < count;) {
            const int64_t last = std::min(count, i + size);
            for (int64_t j = i; j < last; j++) work(j);
            here.done(last - i, count);
        }
        end(kind, here, count);
    }

    // The same, one by one, where a piece begins with waiting for memory: who works on one has taken the next already,
    // and is told which, or a number past the last.
    template <class F> void deal_ahead(Kind kind, int64_t count, F work) {
        Phase &here = team.phases[phase++];
        for (int64_t i = here.dealt.fetch_add(1, std::memory_order_relaxed), next; i < count; i = next) {
            next = here.dealt.fetch_add(1, std::memory_order_relaxed);
            work(i, next);
            here.done(1, count);
        }
        end(kind, here, count);
    }

    void end(Kind kind, const Phase &here, int64_t count) {
        here.wait(count);
        if (keeps_time) {
            const int64_t now = now_ns();
            team.spent_ns[kind] += now - phase_began;
            phase_began = now;
        }
    }

    void product(Into into, Kind kind, const T *x, int64_t rows, const void *weights, const float *bias, int64_t inputs,
                 int64_t outputs, float *to, T *gated = nullptr) {
        const Product<T> p{.x = x, .bias = bias, .rows = rows, .inputs = inputs, .outputs = outputs, .to = to,
                           .gated = gated, .into = into};
        with_weights(p, weights, [&](const auto &one) { deal_blocks(kind, one); });
    }

    // Do something with a product of these weights, which are of type T, or int8 after the scales of all outputs.
    template <class F> void with_weights(const Product<T> &p, const void *weights, F work) const {
        if (m.is_int8) {
            const float *scales = static_cast<const float *>(weights);
            const int8_t *numbers = reinterpret_cast<const int8_t *>(scales + p.outputs);
            work(Product<T, int8_t>{p.x, numbers, scales, p.bias, p.rows, p.inputs, p.outputs, p.to, p.gated,
                                    m.gate_slope, m.gate_cube, p.into});
        } else {
            work(Product<T>{p.x, static_cast<const T *>(weights), nullptr, p.bias, p.rows, p.inputs, p.outputs, p.to,
                            p.gated, m.gate_slope, m.gate_cube, p.into});
        }
    }

    template <class W> void deal_blocks(Kind kind, const Product<T, W> &p) {
        const int64_t blocks = p.outputs / 32;
        if (p.rows <= FEW_ROWS<T, W>) {  // weights are read once, so that those of blocks in a row come as one stream
            const int64_t size = std::max<int64_t>(1, blocks / (8 * team.thread_count));
            deal(kind, blocks, size, [&](int64_t block) { multiply(p, block, block); });
        } else if (p.rows > FEW_TILES * TILE) {
            deal(kind, blocks, 1, [&](int64_t block) { multiply(p, block, block); });
        } else {
            deal_ahead(kind, blocks, [&](int64_t block, int64_t next) { multiply(p, block, next); });
        }
    }

    void embed(int64_t id, float *to) const {
        const float scale = m.embedding_scale;
        if (m.embedding) {
            const T *row = static_cast<const T *>(m.embedding) + id * m.hidden;
            for (int64_t i = 0; i < m.hidden; i += 16) at(to + i) = load(row + i) * scale;
        } else if (m.is_int8) {
            const float *scales = static_cast<const float *>(m.output);
            unpack(reinterpret_cast<const int8_t *>(scales + padded(m.vocabulary)), id, scales[id] * scale, to);
        } else {
            unpack(static_cast<const T *>(m.output), id, scale, to);
        }
    }

    // A row of a packed matrix is a column of a block: one or two numbers, those of 31 other rows, the next ones.
    template <class W> void unpack(const W *matrix, int64_t row, float scale, float *to) const {
        constexpr int64_t each = 4 / sizeof(T);
        const W *column = matrix + row / 32 * 32 * m.hidden + row % 32 * each;
        for (int64_t k = 0; k < m.hidden; k += each)
            for (int64_t i = 0; i < each; i++) to[k + i] = to_float(column[k * 32 + i]) * scale;
    }

    // What a product gives is added to the residual stream: by the product, or, through a norm of its own where the
    // model has one, by the norms that come next.
    void add(Kind kind, const T *from, const void *weights, const float *bias, int64_t inputs, const float *norm) {
        after = norm;
        if (norm) product(Into::STORE, kind, from, s.token_count, weights, bias, inputs, m.hidden, given);
        else product(Into::ADD, kind, from, s.token_count, weights, bias, inputs, m.hidden, x);
    }

    // What brings the squares of some numbers to 1 on average.
    float factor_of(const float *x, int64_t count) const {
        vec squares = {};
        for (int64_t i = 0; i < count; i += 16) squares += at(x + i) * at(x + i);
        return 1.0f / std::sqrt(sum(squares) / count + m.epsilon);
    }

    void norm(int64_t token, const float *weight, T *to) const {
        float *x = this->x + token * m.hidden;
        if (after) {
            const float *late = given + token * m.hidden;
            const float factor = factor_of(late, m.hidden);
            for (int64_t i = 0; i < m.hidden; i += 16) at(x + i) += at(late + i) * factor * at(after + i);
        }
        const float factor = weight ? factor_of(x, m.hidden) : 1.0f;
        for (int64_t i = 0; i < m.hidden; i += 16)
            store(to + i, weight ? at(x + i) * factor * at(weight + i) : at(x + i));
    }

    void norms(const float *weight) {
        deal(NORM, s.token_count, 4, [&](int64_t t) { norm(t, weight, normed + t * m.hidden); });
    }

    // One head, normed where the model has such a norm, then rotated: x * cos + (-second half, first half) * sin.
    void place(const Layer &layer, const float *x, const float *norm, float factor, int64_t position, float scaling,
               T *to) const {
        alignas(64) float head[256];
        for (int64_t i = 0; i < m.dim; i += 16) at(head + i) = norm ? at(x + i) * factor * at(norm + i) : at(x + i);
        const float *cosine = s.cosine[layer.rotation] + position * m.rotated;
        const float *sine = s.sine[layer.rotation] + position * m.rotated;
        const int64_t half = m.rotated / 2;
        for (int64_t i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * cosine[i] - b * sine[i];
            head[i + half] = b * cosine[i + half] + a * sine[i + half];
        }
        for (int64_t i = 0; i < m.dim; i += 16) store(to + i, at(head + i) * scaling);
    }

    // All heads of a token's queries or keys.
    void place_all(const Layer &layer, const float *x, int64_t heads, const float *norm, int64_t position,
                   float scaling, T *to) const {
        const bool together = norm && m.norms_heads_together;
        float factor = together ? factor_of(x, heads * m.dim) : 1.0f;
        for (int64_t h = 0; h < heads; h++, x += m.dim, to += m.dim) {
            if (norm && !together) factor = factor_of(x, m.dim);
            place(layer, x, together ? norm + h * m.dim : norm, factor, position, scaling, to);
        }
    }

    void write(const Layer &layer, int64_t row, int64_t token) const {
        const float *x = qkv + token * qkv_count();
        const int64_t position = s.context[row] - s.row_start[row + 1] + token;
        place_all(layer, x, m.heads, layer.query_norm, position, m.scaling, queries + token * m.heads * m.dim);
        const int64_t block = s.tables[layer.group][row * s.widths[layer.group] + position / layer.block_size];
        const int64_t offset = position % layer.block_size;
        T *key = static_cast<T *>(layer.keys) + (block * layer.key_stride + offset) * m.key_heads * m.dim;
        T *value = static_cast<T *>(layer.values) + (block * layer.value_stride + offset) * m.key_heads * m.dim;
        place_all(layer, x + m.heads * m.dim, m.key_heads, layer.key_norm, position, 1.0f, key);
        const float *v = x + (m.heads + m.key_heads) * m.dim;
        for (int64_t i = 0; i < m.key_heads * m.dim; i += 16) store(value + i, at(v + i));
    }

    // Pieces where there are enough for everybody; else their heads apart, and a long context in parts.
    void attend(const Attention<T> &attention) {
        const int64_t size = Sums::size(m.dim), parts = team.parts;
        if (parts == 0) {
            const int64_t count = pieces.size();
            deal_ahead(ATTENTION, count, [&](int64_t i, int64_t next) {
                const Piece *following = next < count ? &pieces[next] : nullptr;
                attention.attend(pieces[i], {0, m.key_heads, 0, 1}, following, sums.data());
                for (int64_t h = 0; h < m.key_heads; h++)
                    attention.put_out(pieces[i], h, {sums.data() + h * size, m.dim});
            });
            return;
        }
        float *partial = team.partial.data();
        deal(ATTENTION, pieces.size() * m.key_heads * parts, 1, [&](int64_t i) {
            const Piece &piece = pieces[i / parts / m.key_heads];
            attention.attend(piece, {i / parts % m.key_heads, 1, i % parts, parts}, nullptr, partial + i * size);
            if (parts == 1) attention.put_out(piece, i % m.key_heads, {partial + i * size, m.dim});
        });
        if (parts == 1) return;
        deal(ATTENTION, pieces.size() * m.key_heads, 1, [&](int64_t i) {
            const Piece &piece = pieces[i / m.key_heads];
            const Sums whole(partial + i * parts * size, m.dim);
            for (int64_t part = 1; part < parts; part++)
                whole.merge({partial + (i * parts + part) * size, m.dim}, piece.count * attention.shared(), m.dim);
            attention.put_out(piece, i % m.key_heads, whole);
        });
    }

    // A product for the rows of each expert that has some, with its weights. The number of pieces must not depend on
    // what was chosen: a thread that comes late to a phase asks how many there were.
    void products(Kind kind, const void *const *weights, const Product<T> &whole) {
        const int64_t blocks = whole.outputs / 32, count = std::min(m.experts, s.token_count * m.chosen) * blocks;
        deal(kind, count, std::max<int64_t>(1, count / (8 * team.thread_count)), [&](int64_t i) {
            if (i / blocks >= int64_t(groups.asked.size())) return;
            const int64_t expert = groups.asked[i / blocks], first = groups.first[expert];
            Product<T> p = whole;
            p.rows = groups.first[expert + 1] - first;
            p.x += first * p.inputs;
            if (p.into == Into::GATED) p.gated += first * p.outputs / 2;
            else p.to += first * p.outputs;
            with_weights(p, weights[expert], [&](const auto &one) { multiply(one, i % blocks, i % blocks + 1); });
        });
    }

    // The gated products of the experts that each token has, in place of one for all tokens.
    void mixture(const Layer &layer) {
        const int64_t rows = s.token_count * m.chosen;
        product(Into::STORE, GATE_UP, normed, s.token_count, layer.router, nullptr, m.hidden, padded(m.experts),
                             scores);
        deal(GATE_UP, s.token_count, 8, [&](int64_t t) {
            choose(scores + t * padded(m.experts), m.experts, m.chosen, m.sums_to_one, choices + t * m.chosen,
                   shares + t * m.chosen);
        });
        deal(GATE_UP, 1, 1, [&](int64_t) { groups.sort(choices, rows, m.experts); });
        deal(GATE_UP, rows, 8, [&](int64_t i) {
            std::memcpy(gathered + groups.row_of[i] * m.hidden, normed + i / m.chosen * m.hidden, m.hidden * sizeof(T));
        });
        products(GATE_UP, layer.gate_ups,
                 {.x = gathered, .inputs = m.hidden, .outputs = 2 * m.inner, .gated = inner, .into = Into::GATED});
        products(DOWN, layer.downs,
                 {.x = inner, .inputs = m.inner, .outputs = m.hidden, .to = given, .into = Into::STORE});
        deal(DOWN, s.token_count, 4, [&](int64_t t) {
            float *to = x + t * m.hidden;
            for (int64_t c = t * m.chosen; c < (t + 1) * m.chosen; c++) {
                const float *from = given + groups.row_of[c] * m.hidden;
                for (int64_t i = 0; i < m.hidden; i += 16) at(to + i) += shares[c] * at(from + i);
            }
        });
        after = nullptr;
    }

    void run_layer(const Layer &layer) {
        norms(layer.norm1);
        product(Into::STORE, QKV, normed, s.token_count, layer.qkv, layer.qkv_bias, m.hidden, qkv_count(), qkv);
        deal(WRITE, pieces.size(), 1, [&](int64_t i) {
            for (int64_t t = 0; t < pieces[i].count; t++) write(layer, pieces[i].row_of(t), pieces[i].first + t);
        });
        attend({m, layer, s, queries, attended});
        add(OUT, attended, layer.out, layer.out_bias, m.heads * m.dim, layer.after_attention);
        norms(layer.norm2);
        if (layer.router) return mixture(layer);
        product(Into::GATED, GATE_UP, normed, s.token_count, layer.gate_ups[0], nullptr, m.hidden, 2 * m.inner, nullptr,
                             inner);
        add(DOWN, inner, layer.downs[0], nullptr, m.inner, layer.after_product);
    }

    void run() {
        deal(EMBED, s.token_count, 4, [&](int64_t t) {
            const int64_t id = s.tokens[t];
            embed(id < 0 ? s.previous[-1 - id] : id, x + t * m.hidden);
        });
        for (int64_t l = 0; l < m.layer_count; l++) run_layer(m.layers[l]);
        deal(NORM, s.sampled_count, 4, [&](int64_t i) { norm(s.sampled[i], m.norm, normed + i * m.hidden); });
        product(Into::STORE, OUTPUT, normed, s.sampled_count, m.output, nullptr, m.hidden, padded(m.vocabulary),
                             s.logits);
        deal(OUTPUT, s.sampled_count, 1, [&](int64_t i) {
            if (m.logit_cap) cap(s.logits + i * padded(m.vocabulary), m.vocabulary, m.logit_cap);
            s.likeliest[i] = likeliest(s.logits + i * padded(m.vocabulary), m.vocabulary, s.highest[i]);
        });
    }
};

void run_program(Team &team, bool keeps_time) {
#if HAS_BF16
    if (team.model->is_bf16) {
        Program<bf16>(team, keeps_time).run();
        return;
    }
#endif
    Program<float>(team, keeps_time).run();
}

// The leader has the others run a step, and runs it with them.
void run_step(Team &team, Submitted &submitted) {
    const int64_t began = now_ns();
    team.model = submitted.model;
    team.step = submitted.step;
    const size_t phases = size_t(team.model->layer_count) * 14 + 4;
    if (team.phases.size() != phases) team.phases = std::vector<Phase>(phases);
    for (Phase &phase : team.phases) phase.begin();
    cut(team);
    team.left.store(uint32_t(team.thread_count) - 1, std::memory_order_relaxed);
    team.order.fetch_add(1, std::memory_order_release);
    team.order.notify_all();
    run_program(team, true);
    for (uint32_t left; (left = team.left.load(std::memory_order_acquire)) != 0;) wait_while(team.left, left);
    submitted.took_ns = now_ns() - began;
}

void lead(Team &team) {
    for (uint32_t number = 0;; number++) {
        wait_while(team.submitted, number);
        if (team.is_over) return;
        run_step(team, team.queue[number % MOST_SUBMITTED]);
        team.completed.store(number + 1, std::memory_order_release);
        team.completed.notify_all();
    }
}

void follow(Team &team) {
    for (uint32_t seen = 0;;) {
        wait_while(team.order, seen);
        seen = team.order.load(std::memory_order_acquire);
        if (team.is_over) return;
        run_program(team, false);
        if (team.left.fetch_sub(1, std::memory_order_acq_rel) == 1) team.left.notify_all();
    }
}

}  // namespace paceline

#define EXPORT __attribute__((visibility("default")))

using namespace paceline;

extern "C" {

// What this build can do: 1 float32, 2 bfloat16.
EXPORT int64_t paceline_types() { return 1 + 2 * HAS_BF16; }

EXPORT void paceline_pack(int64_t is_bf16, const void *weights, int64_t outputs, int64_t inputs, void *to) {
    if (is_bf16) pack_plain((const bf16 *)weights, outputs, inputs, (bf16 *)to);
    else pack_plain((const float *)weights, outputs, inputs, (float *)to);
}

// For steps in bfloat16 or float32, from weights in either.
EXPORT void paceline_pack_int8(int64_t is_bf16, int64_t from_bf16, const void *weights, int64_t outputs, int64_t inputs,
                               float *to) {
    const int64_t each = is_bf16 ? 2 : 1;
    if (from_bf16) pack_int8((const bf16 *)weights, outputs, inputs, each, to);
    else pack_int8((const float *)weights, outputs, inputs, each, to);
}

EXPORT int64_t paceline_scratch_bytes(const Model *m, int64_t tokens) {
    const int64_t item = m->is_bf16 ? 2 : 4, qkv = padded((m->heads + 2 * m->key_heads) * m->dim);
    const int64_t rows = std::max<int64_t>(1, m->chosen), gathered = m->chosen * m->hidden;  // of one token
    const int64_t numbers = m->hidden + 2 * m->heads * m->dim + rows * m->inner + gathered;
    const int64_t floats = m->hidden + std::max(qkv, rows * m->hidden) + padded(m->experts) + 2 * m->chosen;
    return tokens * (item * numbers + 4 * floats) + 10 * 64;
}

// Wait until a step is over; returns the nanoseconds that it took. Of steps long ago that is not known any more.
EXPORT int64_t paceline_wait(Team *team, uint32_t number) {
    for (uint32_t now; int32_t((now = team->completed.load(std::memory_order_acquire)) - number) <= 0;)
        team->completed.wait(now, std::memory_order_acquire);
    return team->queue[number % MOST_SUBMITTED].took_ns;
}

EXPORT void paceline_team_end(Team *team) {
    const uint32_t submitted = team->submitted.load(std::memory_order_relaxed);
    if (submitted) paceline_wait(team, submitted - 1);
    team->is_over = true;
    for (auto *word : {&team->submitted, &team->order}) {
        word->fetch_add(1, std::memory_order_release);
        word->notify_all();
    }
    for (auto &thread : team->threads) thread.join();
    delete team;
}

// Null where the system has no room for so many threads.
EXPORT Team *paceline_team(int64_t threads) {
    Team *team = new Team;
    team->thread_count = threads;
    try {
        team->threads.emplace_back([team] { lead(*team); });
        for (int64_t i = 1; i < threads; i++) team->threads.emplace_back([team] { follow(*team); });
    } catch (const std::exception &) {
        paceline_team_end(team);
        return nullptr;
    }
    return team;
}

// Have a step run after those before it; returns its number. What the pointers lead to must stay until it has been
// waited for. Only one thread submits at a time; it waits while there is no room in the queue.
EXPORT uint32_t paceline_submit(Team *team, const Model *model, const Step *step) {
    const uint32_t number = team->submitted.load(std::memory_order_relaxed);
    if (number >= MOST_SUBMITTED) paceline_wait(team, number - MOST_SUBMITTED);
    team->queue[number % MOST_SUBMITTED] = {model, step, 0};
    team->submitted.store(number + 1, std::memory_order_release);
    team->submitted.notify_all();
    return number;
}

// Nanoseconds by kind of phase since the last call.
EXPORT void paceline_spent_ns(Team *team, int64_t *by_kind) {
    for (int kind = 0; kind < KINDS; kind++) by_kind[kind] = team->spent_ns[kind], team->spent_ns[kind] = 0;
}
}
