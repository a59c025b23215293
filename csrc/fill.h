// Fills of raw words, uniforms, exponentials, Gumbels and normals.
#pragma once

#include "isa.h"

DRIFTMAX_BEGIN
void fill(const FillArgs& args);
void philox4x32(uint32_t* out, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1);
// Sum of a buffer: one bare read of it, the limit that the bench divides by.
float read_sum(const float* data, int64_t n, int threads);
DRIFTMAX_END
