// k draws without replacement: the k largest of l / T + Gumbel (Kool, van Hoof, Welling, 2019).
#pragma once

#include "isa.h"

DRIFTMAX_BEGIN
Status gumbel_topk(const GumbelTopkArgs& args);
DRIFTMAX_END
