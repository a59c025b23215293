// One ancestral step: which masked positions are unmasked, and their tokens. Law: docs/numerics.md, section 5.
#pragma once

#include "isa.h"

DRIFTMAX_BEGIN
// On a bad row nothing is written to `tokens`.
Status unmask(const UnmaskArgs& args);
DRIFTMAX_END
