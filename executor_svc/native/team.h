// Threads that wait for each other without getting in anybody's way: they spin for a moment, then sleep.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "mixture.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paceline {

// A thread that waits spins for some microseconds, about as long as a phase is uneven. Then it lets whoever else wants
// its core go first, and in the end it sleeps: to be woken takes longer than most waits.
constexpr int SPINS = 200;
constexpr int YIELDS = 1000;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

inline void wait_while(const std::atomic<uint32_t> &word, uint32_t value) {
    for (int i = 0; i < SPINS; i++) {
        if (word.load(std::memory_order_acquire) != value) return;
        pause();
    }
    for (int i = 0; i < YIELDS; i++) {
        std::this_thread::yield();
        if (word.load(std::memory_order_acquire) != value) return;
    }
    while (word.load(std::memory_order_acquire) == value) word.wait(value, std::memory_order_acquire);
}

// One phase of a step. It waits for pieces of work and not for threads: one that has lost its core holds up the others
// only while it has a piece in hand, or at the end of the step, where everybody has to come by.
struct Phase {
    std::atomic<int64_t> dealt{0};  // pieces given out
    std::atomic<uint32_t> finished{0};

    void begin() {
        dealt.store(0, std::memory_order_relaxed);
        finished.store(0, std::memory_order_relaxed);
    }

    // So many pieces more are done, of `count` in all.
    void done(int64_t pieces, int64_t count) {
        if (finished.fetch_add(uint32_t(pieces), std::memory_order_acq_rel) + pieces == count) finished.notify_all();
    }

    void wait(int64_t count) const {
        for (uint32_t now; (now = finished.load(std::memory_order_acquire)) != uint32_t(count);)
            wait_while(finished, now);
    }
};

struct Model;
struct Step;

// What the phases of a step are for, in the order of `PHASES` in `library.py`.
enum Kind { EMBED, NORM, QKV, WRITE, ATTENTION, OUT, GATE_UP, DOWN, OUTPUT, KINDS };

inline int64_t now_ns() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

constexpr int64_t QUERIES = 16;  // query heads times tokens whose attention is computed together

// Tokens [first, first + count) of the step: all of `row`; or, where `alike` is not 0, one each of `row` and the rows
// that follow it, whose first `alike` positions are the same blocks.
struct Piece {
    int64_t row, first, count, alike;

    int64_t row_of(int64_t token) const { return alike ? row + token : row; }
};

constexpr uint32_t MOST_SUBMITTED = 4;

// A step that waits for its turn, or has run.
struct Submitted {
    const Model *model;
    const Step *step;
    int64_t took_ns;
};

// Threads that run steps in the order in which they are submitted, and sleep when there is none. The first one leads.
struct Team {
    std::vector<std::thread> threads;
    int64_t thread_count = 1;
    Submitted queue[MOST_SUBMITTED];
    std::atomic<uint32_t> submitted{0}, completed{0};  // steps
    std::atomic<uint32_t> order{0};  // of the leader to the others: counts steps
    std::atomic<uint32_t> left{0};   // threads that are not through with the step
    std::atomic<bool> is_over{false};
    const Model *model = nullptr;
    const Step *step = nullptr;
    std::vector<Piece> pieces;     // of the step, for its attention
    int64_t parts = 0;             // that the keys of a piece are cut into; 0: there are pieces enough for everybody
    Groups groups;                 // of the mixture that is being computed
    std::vector<float> partial;    // what was summed up over each part
    std::vector<Phase> phases;
    int64_t spent_ns[KINDS] = {};             // by kind of phase, waiting for each other included, since last asked
};

}  // namespace paceline
