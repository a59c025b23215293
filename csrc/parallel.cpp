#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace driftmax {
namespace {

#if defined(__x86_64__)
inline void relax() { __builtin_ia32_pause(); }
#else
inline void relax() { std::this_thread::yield(); }
#endif

struct Job {
    RangeBody body = nullptr;
    void* context = nullptr;
    int64_t count = 0, grain = 1;
    std::atomic<int64_t> next{0};
    std::atomic<int> members{0};  // of a borrowed team, so far
    std::atomic<int> seats{0};    // workers that may still join
    std::atomic<int> running{0};  // workers inside
    std::exception_ptr error;
    std::mutex error_mutex;
};

thread_local bool inside = false;

void work(Job& job, int worker) {
    bool outer = inside;
    inside = true;
    try {
        for (;;) {
            int64_t begin = job.next.fetch_add(job.grain, std::memory_order_relaxed);
            if (begin >= job.count) break;
            job.body(job.context, begin, std::min(begin + job.grain, job.count), worker);
        }
    } catch (...) {
        std::lock_guard lock(job.error_mutex);
        if (!job.error) job.error = std::current_exception();
        job.next.store(job.count, std::memory_order_relaxed);
    }
    inside = outer;
}

class Pool {
public:
    void run(Job& job, int threads) {
        std::lock_guard serve(serve_mutex_);
        {
            std::lock_guard lock(mutex_);
            while (static_cast<int>(workers_.size()) < threads - 1) {
                workers_.emplace_back([this] { loop(); });
                workers_.back().detach();
            }
            job.seats.store(threads - 1);
            job_ = &job;
            epoch_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work(job, 0);
        std::unique_lock lock(mutex_);
        job_ = nullptr;  // nobody joins any more
        done_.wait(lock, [&] { return job.running.load() == 0; });
    }

private:
    void loop() {
        uint64_t seen = 0;
        for (;;) {
            // A short spin keeps back-to-back calls from paying a wake-up each; then sleep.
            for (int i = 0; i < 2000 && epoch_.load(std::memory_order_acquire) == seen; ++i) relax();
            Job* job;
            int worker;
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return epoch_.load() != seen; });
                seen = epoch_.load();
                job = job_;
                if (!job) continue;
                int seat = job->seats.load();
                if (seat <= 0) continue;
                job->seats.store(seat - 1);
                worker = seat;
                job->running.fetch_add(1);
            }
            work(*job, worker);
            {
                std::lock_guard lock(mutex_);
                job->running.fetch_sub(1);
            }
            done_.notify_one();
        }
    }

    std::mutex serve_mutex_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> epoch_{0};
    Job* job_ = nullptr;
};

// Never destroyed: its threads are detached, and a forked child must abandon the parent's (their threads do not exist there).
// A borrowed team's do not exist there either.
std::atomic<Pool*> pool{nullptr};
std::atomic<Team> borrowed{nullptr};
std::once_flag at_fork;

void watch_forks() {
    std::call_once(at_fork, [] {
        pthread_atfork(nullptr, nullptr, [] {
            pool.store(nullptr);
            borrowed.store(nullptr);
            inside = false;
        });
    });
}

Pool& the_pool() {
    watch_forks();
    Pool* p = pool.load(std::memory_order_acquire);
    if (!p) {
        Pool* fresh = new Pool;
        if (pool.compare_exchange_strong(p, fresh)) return *fresh;
        delete fresh;  // another thread was first; nothing runs in ours yet
    }
    return *p;
}

void run_on(Team team, Job& job, int threads) {
    team(
        [](void* shared) {
            Job& job = *static_cast<Job*>(shared);
            work(job, job.members.fetch_add(1, std::memory_order_relaxed));
        },
        &job, static_cast<unsigned>(threads), 0);
}

struct Arena {
    void* data = nullptr;
    size_t size = 0;
    ~Arena() { ::operator delete(data, std::align_val_t(64)); }
};

}  // namespace

void borrow_team(Team team) {
    watch_forks();
    borrowed.store(team);
}

bool team_is_borrowed() { return borrowed.load() != nullptr; }

void parallel_ranges(int64_t count, int64_t grain, int threads, RangeBody body, void* context) {
    if (count <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    int64_t pieces = (count - 1) / grain + 1;
    threads = std::clamp(threads, 1, 1024);
    if (threads == 1 || pieces == 1 || inside) {
        body(context, 0, count, 0);
        return;
    }
    Job job;
    job.body = body;
    job.context = context;
    job.count = count;
    job.grain = grain;
    // A borrowed team keeps its size, however few pieces there are: threads that a smaller one leaves out would end.
    if (Team team = borrowed.load()) run_on(team, job, threads);
    else the_pool().run(job, static_cast<int>(std::min<int64_t>(threads, pieces)));
    if (job.error) std::rethrow_exception(job.error);
}

void* scratch(int slot, size_t bytes) {
    thread_local Arena arenas[kScratchSlots];
    Arena& a = arenas[slot];
    if (a.size < bytes) {
        size_t want = std::max(bytes, a.size + a.size / 2);
        void* fresh = ::operator new(want, std::align_val_t(64));
        ::operator delete(a.data, std::align_val_t(64));
        a.data = fresh;
        a.size = want;
    }
    return a.data;
}

}  // namespace driftmax
