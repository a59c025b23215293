// The project's own persistent thread pool. No OpenMP: two OpenMP runtimes in one process hang after fork.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace driftmax {

// body(context, begin, end, worker) on disjoint ranges that cover [0, count), each a multiple of `grain` long but the last;
// worker < threads. Ranges are handed out dynamically, so bodies must not depend on who runs which. Calls from several
// threads are served one after another; a call from inside a body runs inline. Safe after fork: the child starts a new pool.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end, int worker);
void parallel_ranges(int64_t count, int64_t grain, int threads, RangeBody body, void* context);

template <typename Body> void parallel_for(int64_t count, int64_t grain, int threads, Body&& body) {
    struct Context {
        Body& body;
    } context{body};
    parallel_ranges(
        count, grain, threads,
        [](void* c, int64_t begin, int64_t end, int worker) { static_cast<Context*>(c)->body(begin, end, worker); }, &context);
}

// The status of the lowest failing row, whoever meets it.
class FirstError {
public:
    void report(int64_t status) {
        if (status == 0) return;
        int64_t seen = status_.load();
        while ((seen == 0 || (status >> 8) < (seen >> 8)) && !status_.compare_exchange_weak(seen, status)) {}
    }
    int64_t get() const { return status_.load(); }

private:
    std::atomic<int64_t> status_{0};
};

// Memory of the calling thread that lives until its next call with the same slot; 64-byte aligned. nullptr when out of memory
// is never returned: std::bad_alloc is thrown.
void* scratch(int slot, size_t bytes);
constexpr int kScratchSlots = 8;

}  // namespace driftmax
