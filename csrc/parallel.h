// Who runs a kernel's ranges: the project's own persistent threads, or those of an OpenMP runtime that is in the process anyway
// (docs/decisions/0010). None is linked: two of them in one process hang after fork.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace driftmax {

// body(context, begin, end, worker) on disjoint ranges that cover [0, count), each a multiple of `grain` long but the last;
// worker < threads. Ranges are handed out dynamically, so bodies must not depend on who runs which. Calls from several
// threads share the pool one after another; a call from inside a body runs inline. Safe after fork: the child starts a new pool.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end, int worker);
void parallel_ranges(int64_t count, int64_t grain, int threads, RangeBody body, void* context);

// GOMP_parallel of the runtime whose threads are to serve instead of the pool's; nullptr: the pool. A forked child goes back to
// a pool of its own. Its teams belong to their callers, so that calls from several threads run side by side.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void borrow_team(Team team);
bool team_is_borrowed();

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
