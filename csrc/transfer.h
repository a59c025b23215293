// dLLM decoding's selection: which drawn tokens of a row are kept. Rule: docs/numerics.md, section 5.
#pragma once

#include "isa.h"

DRIFTMAX_BEGIN
void transfer(const TransferArgs& args);
DRIFTMAX_END
