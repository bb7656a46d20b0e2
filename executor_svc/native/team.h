// Threads that wait for each other without getting in anybody's way: they spin for a moment, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paceline {

constexpr int SPINS = 200;   // some microseconds: about as long as a phase is uneven
constexpr int YIELDS = 100;  // then whoever else wants the core goes first, and in the end the thread sleeps

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

// Threads that sleep between steps. The caller of a step is one of them.
struct Team {
    std::vector<std::thread> threads;
    Barrier barrier;
    std::atomic<uint32_t> order{0};  // counts steps
    std::atomic<uint32_t> left{0};   // threads that are not through with the step
    bool is_over = false;
    const Model *model = nullptr;
    const Step *step = nullptr;
    std::vector<std::atomic<int64_t>> dealt;  // by phase: pieces of work given out
};

}  // namespace paceline
