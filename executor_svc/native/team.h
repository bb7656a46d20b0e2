// Threads that wait for each other without getting in anybody's way: they spin for a moment, then sleep.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paceline {

// A thread that waits spins for some microseconds, about as long as a phase is uneven. Then it lets whoever else wants its
// core go first, and in the end it sleeps: to be woken takes longer than most waits.
constexpr int SPINS = 200;
constexpr int YIELDS = 1000;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

inline void wait_while(std::atomic<uint32_t> &word, uint32_t value) {
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

struct Barrier {
    std::atomic<uint32_t> arrived{0};
    std::atomic<uint32_t> round{0};
    uint32_t count = 1;

    void wait() {
        if (count == 1) return;
        uint32_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            round.exchange(now + 1);  // not a plain store: who is about to sleep must see it, or be seen
            round.notify_all();
        } else {
            wait_while(round, now);
        }
    }
};

struct Model;
struct Step;

// What the phases of a step are for, in the order of `PHASES` in `library.py`.
enum Kind { NORM, QKV, WRITE, ATTENTION, OUT, GATE_UP, DOWN, OUTPUT, KINDS };

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

// Threads that sleep between steps. The caller of a step is one of them.
struct Team {
    std::vector<std::thread> threads;
    Barrier barrier;
    std::atomic<uint32_t> order{0};  // counts steps
    std::atomic<uint32_t> left{0};   // threads that are not through with the step
    bool is_over = false;
    const Model *model = nullptr;
    const Step *step = nullptr;
    std::vector<Piece> pieces;     // of the step, for its attention
    int64_t parts = 0;             // that the keys of a piece are cut into; 0: there are pieces enough for everybody
    std::vector<float> partial;    // what was summed up over each part
    std::vector<std::atomic<int64_t>> dealt;  // by phase: pieces of work given out
    int64_t spent_ns[KINDS] = {};             // by kind of phase, waiting for each other included, since last asked
};

}  // namespace paceline
