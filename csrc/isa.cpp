#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace driftmax {

#define DRIFTMAX_DECLARE(isa)                                                               \
    namespace isa {                                                                         \
    void fill(const FillArgs&);                                                             \
    Status categorical(const CategoricalArgs&);                                             \
    Status gumbel_topk(const GumbelTopkArgs&);                                              \
    Status lm_head_tile(const LmHeadTileArgs&);                                             \
    Status lm_head_finish(const LmHeadFinishArgs&);                                         \
    float read_sum(const float*, int64_t, int);                                             \
    void philox4x32(uint32_t*, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t); \
    int64_t lm_head_state_bytes();                                                          \
    Status unmask(const UnmaskArgs&);                                                       \
    void transfer(const TransferArgs&);                                                     \
    }
#define DRIFTMAX_ENTRY(isa)                                                                                              \
    {#isa,          isa::fill,       isa::categorical,         isa::gumbel_topk, isa::lm_head_tile, isa::lm_head_finish, \
     isa::read_sum, isa::philox4x32, isa::lm_head_state_bytes, isa::unmask,      isa::transfer}

#ifdef DRIFTMAX_HAS_v2
DRIFTMAX_DECLARE(v2)
DRIFTMAX_DECLARE(v3)
DRIFTMAX_DECLARE(v4)
#endif
#ifdef DRIFTMAX_HAS_neon
DRIFTMAX_DECLARE(neon)
#endif
#ifdef DRIFTMAX_HAS_generic
DRIFTMAX_DECLARE(generic)
#endif

namespace {

std::atomic<const Kernels*> chosen{nullptr};

struct Table {
    Kernels entries[4] = {};
    Table() {
        int n = 0;
#ifdef DRIFTMAX_HAS_v2
        __builtin_cpu_init();
        bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
        bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
        if (avx512) entries[n++] = DRIFTMAX_ENTRY(v4);
        if (avx2) entries[n++] = DRIFTMAX_ENTRY(v3);
        if (__builtin_cpu_supports("sse4.2")) entries[n++] = DRIFTMAX_ENTRY(v2);
#endif
#ifdef DRIFTMAX_HAS_neon
        entries[n++] = DRIFTMAX_ENTRY(neon);
#endif
#ifdef DRIFTMAX_HAS_generic
        entries[n++] = DRIFTMAX_ENTRY(generic);
#endif
    }
};

}  // namespace

const Kernels* available_kernels() {
    static const Table table;
    return table.entries;
}

bool set_kernels(const char* name) {
    for (const Kernels* k = available_kernels(); k->name; ++k) {
        if (std::strcmp(k->name, name) == 0) {
            chosen.store(k, std::memory_order_release);
            return true;
        }
    }
    return false;
}

const Kernels& kernels() {
    const Kernels* k = chosen.load(std::memory_order_acquire);
    if (k) return *k;
    const char* name = std::getenv("DRIFTMAX_ISA");
    if (!name || !*name || !set_kernels(name)) chosen.store(available_kernels(), std::memory_order_release);
    return *chosen.load(std::memory_order_acquire);
}

}  // namespace driftmax
