// Which instruction set a translation unit is compiled for, and the table of entry points chosen at load.
//
// Hot files are compiled once per ISA with DRIFTMAX_ISA=v2|v3|v4|neon|generic; everything in them lives in the namespace
// of that name, so that the linker never merges code of two ISAs.
#pragma once

#include "args.h"

#ifdef DRIFTMAX_ISA
#define DRIFTMAX_BEGIN namespace driftmax::DRIFTMAX_ISA {
#define DRIFTMAX_END }
#endif

namespace driftmax {

struct Kernels {
    const char* name;
    void (*fill)(const FillArgs&);
    Status (*categorical)(const CategoricalArgs&);
    Status (*gumbel_topk)(const GumbelTopkArgs&);
    Status (*lm_head_tile)(const LmHeadTileArgs&);
    Status (*lm_head_finish)(const LmHeadFinishArgs&);
    float (*read_sum)(const float*, int64_t n, int threads);
    void (*philox)(uint32_t* out, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1);
    int64_t (*lm_head_state_bytes)();
    Status (*unmask)(const UnmaskArgs&);
    void (*transfer)(const TransferArgs&);
};

// Implementations that are compiled in and that this processor can run, best first. Ends with name == nullptr.
const Kernels* available_kernels();
// The one in use: DRIFTMAX_ISA from the environment, else the best.
const Kernels& kernels();
// Choose by name; false if it is not available.
bool set_kernels(const char* name);

}  // namespace driftmax
