#include "categorical.h"

#include "row_sampler.h"

DRIFTMAX_BEGIN

Status categorical(const CategoricalArgs& args) {
    return sample_rows(args, args.logits.n0 * args.logits.n1, [](const auto& sampler, int64_t draw) { return sampler(draw); });
}

DRIFTMAX_END
