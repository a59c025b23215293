// Several threads draw at once, each with its own and changing thread count, while the instruction set is switched and the
// process forks and draws in the child. Every result must equal the one computed alone. Meant for ThreadSanitizer.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "cases.h"
#include "isa.h"

namespace fuzz {
namespace {

using driftmax::Method;

struct Task {
    Case c;
    Method method = Method::block;
    std::vector<int64_t> expected;
    std::vector<float> noise;
    uint64_t seed = 0;
};

std::vector<int64_t> draw(const Task& t, int threads) {
    std::vector<int64_t> tokens(t.c.draws(), -7);
    driftmax::CategoricalArgs a;
    a.logits = t.c.view();
    a.streams = t.c.streams();
    a.options = t.c.options();
    a.method = t.method;
    a.tokens = tokens.data();
    a.threads = threads;
    require(driftmax::kernels().categorical(a) == 0, "status without a fault");
    return tokens;
}

std::vector<float> noise(const Task& t, int threads) {
    std::vector<float> out(4 * 3001);
    driftmax::FillArgs a;
    a.kind = 5;
    a.out = out.data();
    a.rows = 4;
    a.row_length = a.row_stride = 3001;
    a.streams.seed = t.seed;
    a.threads = threads;
    driftmax::kernels().fill(a);
    return out;
}

std::vector<Task> make_tasks(uint64_t seed) {
    std::vector<Task> tasks(6);
    for (size_t i = 0; i < tasks.size(); ++i) {
        Random r(seed, i);
        Task& t = tasks[i];
        t.c = random_case(r, false, i % 2 == 1);
        t.method = i % 3 ? Method::block : Method::gumbel;
        t.seed = r.bits();
        t.expected = draw(t, 1);
        t.noise = noise(t, 1);
    }
    return tasks;
}

void check(const Task& t, int threads) {
    require(draw(t, threads) == t.expected, "a draw differs with threads " + std::to_string(threads));
    require(noise(t, threads) == t.noise, "a fill differs with threads " + std::to_string(threads));
}

// AddressSanitizer's allocator is not safe to fork while other threads allocate: its lock may be held for ever in the child.
// There, callers stand still for the fork itself, and only the pool's own threads are around.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kStandStill = true;
#else
constexpr bool kStandStill = false;
#endif

class Gate {
public:
    void enter() {
        for (;;) {
            active_.fetch_add(1);
            if (!closed_.load()) return;
            active_.fetch_sub(1);
            std::this_thread::yield();
        }
    }
    void leave() { active_.fetch_sub(1); }
    void close() {
        closed_.store(true);
        while (active_.load() != 0) std::this_thread::yield();
    }
    void open() { closed_.store(false); }

private:
    std::atomic<bool> closed_{false};
    std::atomic<int> active_{0};
};

// ThreadSanitizer cannot follow threads that start after a fork: there the child draws on its one thread.
#ifdef __SANITIZE_THREAD__
constexpr bool kChildThreads = false;
#else
constexpr bool kChildThreads = true;
#endif

// The child finds no pool threads: it must start its own, draw the same, and end.
void fork_and_draw(const std::vector<Task>& tasks, Gate& gate) {
    std::fflush(nullptr);
    if (kStandStill) gate.close();
    pid_t child = fork();
    if (child != 0) gate.open();
    require(child >= 0, "fork failed");
    if (child == 0) {
        alarm(60);  // a hang ends the child, and so the run
        for (int threads : {3, 1, 5}) check(tasks[static_cast<size_t>(threads) % tasks.size()], kChildThreads ? threads : 1);
        _exit(0);
    }
    int status = 0;
    require(waitpid(child, &status, 0) == child, "waitpid failed");
    require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child of a fork ended with status " + std::to_string(status));
}

int run(const Settings& settings) {
    context() = {settings.seed, 0, "concurrency"};
    std::vector<Task> tasks = make_tasks(settings.seed);
    Gate gate;
    std::atomic<bool> stop{false};
    std::atomic<long> rounds{0};
    std::vector<std::thread> callers;
    for (int id = 0; id < 3; ++id) {
        callers.emplace_back([&, id] {
            Random r(settings.seed, 1000 + static_cast<uint64_t>(id));
            while (!stop.load()) {
                const Task& task = tasks[static_cast<size_t>(r.below(static_cast<int64_t>(tasks.size())))];
                gate.enter();
                check(task, static_cast<int>(1 + r.below(6)));
                gate.leave();
                rounds.fetch_add(1);
            }
        });
    }
    long forks = 0;
    std::vector<const char*> names;
    for (const driftmax::Kernels* k = driftmax::available_kernels(); k->name; ++k) names.push_back(k->name);
    for (double end = now() + settings.seconds; now() < end; ++forks) {
        require(driftmax::set_kernels(names[static_cast<size_t>(forks) % names.size()]), "an available ISA was refused");
        fork_and_draw(tasks, gate);
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    stop.store(true);
    for (std::thread& t : callers) t.join();
    std::printf("concurrency: %ld rounds in 3 threads, %ld forks passed\n", rounds.load(), forks);
    return 0;
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) { return fuzz::run(fuzz::parse(argc, argv)); }
