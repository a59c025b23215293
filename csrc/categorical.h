// One token per row of logits: block race, token race, greedy; by-products; filters. Laws: docs/numerics.md, section 3.
#pragma once

#include "isa.h"

DRIFTMAX_BEGIN
Status categorical(const CategoricalArgs& args);
DRIFTMAX_END
