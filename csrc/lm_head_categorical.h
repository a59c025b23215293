// Categorical draws from logits that arrive in vocabulary tiles and are never stored: an online block race.
#pragma once

#include "isa.h"

DRIFTMAX_BEGIN
Status lm_head_tile(const LmHeadTileArgs& args);
int64_t lm_head_state_bytes();
Status lm_head_finish(const LmHeadFinishArgs& args);
DRIFTMAX_END
