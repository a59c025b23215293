// f32x16: sixteen float lanes, whatever the hardware's width.
//
// The lane count is part of the contract: reductions over these lanes have the same order, and so the same bits, on every
// ISA. fma() is fused everywhere; x86-64-v2, which has no such instruction, emulates it exactly (docs/decisions/0003).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define DRIFTMAX_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define DRIFTMAX_AVX2 1
#include <immintrin.h>
#elif defined(__SSE4_2__)
#define DRIFTMAX_SSE 1
#include <immintrin.h>
#elif defined(__ARM_NEON)
#define DRIFTMAX_NEON 1
#include <arm_neon.h>
#endif

DRIFTMAX_BEGIN

// ---- one native register ---------------------------------------------------------------------------------------------
#if DRIFTMAX_AVX512
using reg = __m512;
using ireg = __m512i;
inline reg p_set(float x) { return _mm512_set1_ps(x); }
inline ireg p_iset(int32_t x) { return _mm512_set1_epi32(x); }
inline reg p_load(const float* p) { return _mm512_loadu_ps(p); }
inline ireg p_iload(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void p_store(float* p, reg a) { _mm512_storeu_ps(p, a); }
inline reg p_add(reg a, reg b) { return _mm512_add_ps(a, b); }
inline reg p_sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
inline reg p_mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
inline reg p_fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
inline reg p_max(reg a, reg b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline ireg p_iadd(ireg a, ireg b) { return _mm512_add_epi32(a, b); }
template <int n> inline ireg p_shl(ireg a) { return _mm512_slli_epi32(a, n); }
template <int n> inline ireg p_shr(ireg a) { return _mm512_srli_epi32(a, n); }
inline reg p_cvt(ireg a) { return _mm512_cvtepi32_ps(a); }
inline reg p_cast(ireg a) { return _mm512_castsi512_ps(a); }
inline ireg p_icast(reg a) { return _mm512_castps_si512(a); }
inline uint32_t p_ge(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline reg p_keep_ge(reg x, reg a, reg b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), x); }
inline reg p_load(const uint16_t* p, bool half) {
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return half ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
#elif DRIFTMAX_AVX2
using reg = __m256;
using ireg = __m256i;
inline reg p_set(float x) { return _mm256_set1_ps(x); }
inline ireg p_iset(int32_t x) { return _mm256_set1_epi32(x); }
inline reg p_load(const float* p) { return _mm256_loadu_ps(p); }
inline ireg p_iload(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void p_store(float* p, reg a) { _mm256_storeu_ps(p, a); }
inline reg p_add(reg a, reg b) { return _mm256_add_ps(a, b); }
inline reg p_sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
inline reg p_mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
inline reg p_fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
inline reg p_max(reg a, reg b) { return _mm256_max_ps(a, b); }
inline ireg p_iadd(ireg a, ireg b) { return _mm256_add_epi32(a, b); }
template <int n> inline ireg p_shl(ireg a) { return _mm256_slli_epi32(a, n); }
template <int n> inline ireg p_shr(ireg a) { return _mm256_srli_epi32(a, n); }
inline reg p_cvt(ireg a) { return _mm256_cvtepi32_ps(a); }
inline reg p_cast(ireg a) { return _mm256_castsi256_ps(a); }
inline ireg p_icast(reg a) { return _mm256_castps_si256(a); }
inline uint32_t p_ge(reg a, reg b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ))); }
inline reg p_keep_ge(reg x, reg a, reg b) { return _mm256_and_ps(x, _mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
inline reg p_load(const uint16_t* p, bool half) {
    __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return half ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
#elif DRIFTMAX_SSE
using reg = __m128;
using ireg = __m128i;
inline reg p_set(float x) { return _mm_set1_ps(x); }
inline ireg p_iset(int32_t x) { return _mm_set1_epi32(x); }
inline reg p_load(const float* p) { return _mm_loadu_ps(p); }
inline ireg p_iload(const uint32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void p_store(float* p, reg a) { _mm_storeu_ps(p, a); }
inline reg p_add(reg a, reg b) { return _mm_add_ps(a, b); }
inline reg p_sub(reg a, reg b) { return _mm_sub_ps(a, b); }
inline reg p_mul(reg a, reg b) { return _mm_mul_ps(a, b); }
inline reg p_max(reg a, reg b) { return _mm_max_ps(a, b); }
inline ireg p_iadd(ireg a, ireg b) { return _mm_add_epi32(a, b); }
template <int n> inline ireg p_shl(ireg a) { return _mm_slli_epi32(a, n); }
template <int n> inline ireg p_shr(ireg a) { return _mm_srli_epi32(a, n); }
inline reg p_cvt(ireg a) { return _mm_cvtepi32_ps(a); }
inline reg p_cast(ireg a) { return _mm_castsi128_ps(a); }
inline ireg p_icast(reg a) { return _mm_castps_si128(a); }
inline uint32_t p_ge(reg a, reg b) { return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(a, b))); }
inline reg p_keep_ge(reg x, reg a, reg b) { return _mm_and_ps(x, _mm_cmpge_ps(a, b)); }
// Two lanes of fma in double: the product is exact, the sum is rounded to odd, and rounding an odd-rounded 53-bit value to
// 24 bits is the correctly rounded result (Boldo and Melquiond, 2008).
inline __m128d fma_odd(__m128d a, __m128d b, __m128d c) {
    __m128d p = _mm_mul_pd(a, b);
    __m128d s = _mm_add_pd(p, c);
    __m128d t = _mm_sub_pd(s, p);
    __m128d e = _mm_add_pd(_mm_sub_pd(p, _mm_sub_pd(s, t)), _mm_sub_pd(c, t));  // TwoSum: s + e == p + c
    __m128d zero = _mm_setzero_pd();
    __m128i bits = _mm_castpd_si128(s);
    __m128i inexact = _mm_castpd_si128(_mm_or_pd(_mm_cmplt_pd(e, zero), _mm_cmpgt_pd(e, zero)));
    __m128i even = _mm_cmpeq_epi64(_mm_and_si128(bits, _mm_set1_epi64x(1)), _mm_setzero_si128());
    // one ulp away from zero where the error has the sign of s, towards zero where it has not
    __m128i same = _mm_castpd_si128(_mm_cmpge_pd(_mm_mul_pd(s, e), zero));
    __m128i ulp = _mm_sub_epi64(_mm_and_si128(same, _mm_set1_epi64x(2)), _mm_set1_epi64x(1));
    return _mm_castsi128_pd(_mm_add_epi64(bits, _mm_and_si128(_mm_and_si128(inexact, even), ulp)));
}
inline reg p_fma(reg a, reg b, reg c) {
    __m128d lo = fma_odd(_mm_cvtps_pd(a), _mm_cvtps_pd(b), _mm_cvtps_pd(c));
    auto high = [](reg x) { return _mm_cvtps_pd(_mm_movehl_ps(x, x)); };
    __m128d hi = fma_odd(high(a), high(b), high(c));
    return _mm_movelh_ps(_mm_cvtpd_ps(lo), _mm_cvtpd_ps(hi));
}
inline reg p_load(const uint16_t* p, bool half) {
    __m128i h = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    if (!half) return _mm_castsi128_ps(_mm_slli_epi32(h, 16));
    // binary16 without F16C: rebias by a multiplication, which is exact and also normalises subnormals
    __m128i magnitude = _mm_and_si128(h, _mm_set1_epi32(0x7fff));
    __m128i sign = _mm_slli_epi32(_mm_and_si128(h, _mm_set1_epi32(0x8000)), 16);
    __m128 value = _mm_mul_ps(_mm_castsi128_ps(_mm_slli_epi32(magnitude, 13)), _mm_set1_ps(0x1p112f));
    __m128i special = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7bff));  // inf, NaN
    value = _mm_or_ps(value, _mm_castsi128_ps(_mm_and_si128(special, _mm_set1_epi32(0x7f800000))));
    return _mm_or_ps(value, _mm_castsi128_ps(sign));
}
#elif DRIFTMAX_NEON
using reg = float32x4_t;
using ireg = int32x4_t;
inline reg p_set(float x) { return vdupq_n_f32(x); }
inline ireg p_iset(int32_t x) { return vdupq_n_s32(x); }
inline reg p_load(const float* p) { return vld1q_f32(p); }
inline ireg p_iload(const uint32_t* p) { return vreinterpretq_s32_u32(vld1q_u32(p)); }
inline void p_store(float* p, reg a) { vst1q_f32(p, a); }
inline reg p_add(reg a, reg b) { return vaddq_f32(a, b); }
inline reg p_sub(reg a, reg b) { return vsubq_f32(a, b); }
inline reg p_mul(reg a, reg b) { return vmulq_f32(a, b); }
inline reg p_fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
inline reg p_max(reg a, reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline ireg p_iadd(ireg a, ireg b) { return vaddq_s32(a, b); }
template <int n> inline ireg p_shl(ireg a) { return vshlq_n_s32(a, n); }
template <int n> inline ireg p_shr(ireg a) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n)); }
inline reg p_cvt(ireg a) { return vcvtq_f32_s32(a); }
inline reg p_cast(ireg a) { return vreinterpretq_f32_s32(a); }
inline ireg p_icast(reg a) { return vreinterpretq_s32_f32(a); }
inline uint32_t p_ge(reg a, reg b) {
    const uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), vld1q_u32(bit)));
}
inline reg p_keep_ge(reg x, reg a, reg b) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vcgeq_f32(a, b)));
}
inline reg p_load(const uint16_t* p, bool half) {
    uint16x4_t h = vld1_u16(p);
    return half ? vcvt_f32_f16(vreinterpret_f16_u16(h)) : vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}
#else
struct reg { float v[4]; };
struct ireg { int32_t v[4]; };
template <typename F> inline reg p_map(F f) { return {{f(0), f(1), f(2), f(3)}}; }
template <typename F> inline ireg p_imap(F f) { return {{f(0), f(1), f(2), f(3)}}; }
inline reg p_set(float x) { return {{x, x, x, x}}; }
inline ireg p_iset(int32_t x) { return {{x, x, x, x}}; }
inline reg p_load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline ireg p_iload(const uint32_t* p) { ireg r; std::memcpy(&r, p, 16); return r; }
inline void p_store(float* p, reg a) { std::memcpy(p, &a, 16); }
inline reg p_add(reg a, reg b) { return p_map([&](int i) { return a.v[i] + b.v[i]; }); }
inline reg p_sub(reg a, reg b) { return p_map([&](int i) { return a.v[i] - b.v[i]; }); }
inline reg p_mul(reg a, reg b) { return p_map([&](int i) { return a.v[i] * b.v[i]; }); }
inline reg p_fma(reg a, reg b, reg c) { return p_map([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); }); }
inline reg p_max(reg a, reg b) { return p_map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline ireg p_iadd(ireg a, ireg b) {
    return p_imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
}
template <int n> inline ireg p_shl(ireg a) {
    return p_imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n); });
}
template <int n> inline ireg p_shr(ireg a) {
    return p_imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> n); });
}
inline reg p_cvt(ireg a) { return p_map([&](int i) { return static_cast<float>(a.v[i]); }); }
inline reg p_cast(ireg a) { reg r; std::memcpy(&r, &a, 16); return r; }
inline ireg p_icast(reg a) { ireg r; std::memcpy(&r, &a, 16); return r; }
inline uint32_t p_ge(reg a, reg b) {
    uint32_t m = 0;
    for (int i = 0; i < 4; ++i) m |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
    return m;
}
inline reg p_keep_ge(reg x, reg a, reg b) { return p_map([&](int i) { return a.v[i] >= b.v[i] ? x.v[i] : 0.0f; }); }
inline float p_half(uint16_t h) {
    uint32_t magnitude = h & 0x7fffu, bits = magnitude << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
    bits |= (magnitude > 0x7bffu ? 0x7f800000u : 0u) | static_cast<uint32_t>(h & 0x8000u) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline reg p_load(const uint16_t* p, bool half) {
    return p_map([&](int i) {
        uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return half ? p_half(p[i]) : value;
    });
}
#endif

// ---- sixteen lanes ---------------------------------------------------------------------------------------------------
constexpr int kWidth = sizeof(reg) / 4;  // lanes of a register
constexpr int kRegs = 16 / kWidth;       // registers of an f32x16

struct f32x16 { reg r[kRegs]; };
struct i32x16 { ireg r[kRegs]; };

template <typename F> inline f32x16 each(F f) {
    f32x16 out;
    for (int i = 0; i < kRegs; ++i) out.r[i] = f(i);
    return out;
}
template <typename F> inline i32x16 ieach(F f) {
    i32x16 out;
    for (int i = 0; i < kRegs; ++i) out.r[i] = f(i);
    return out;
}
inline f32x16 splat(float x) { return each([&](int) { return p_set(x); }); }
inline i32x16 isplat(int32_t x) { return ieach([&](int) { return p_iset(x); }); }
inline f32x16 load16(const float* p) { return each([&](int i) { return p_load(p + i * kWidth); }); }
inline i32x16 iload16(const uint32_t* p) { return ieach([&](int i) { return p_iload(p + i * kWidth); }); }
inline void store16(float* p, f32x16 a) { for (int i = 0; i < kRegs; ++i) p_store(p + i * kWidth, a.r[i]); }
inline f32x16 operator+(f32x16 a, f32x16 b) { return each([&](int i) { return p_add(a.r[i], b.r[i]); }); }
inline f32x16 operator-(f32x16 a, f32x16 b) { return each([&](int i) { return p_sub(a.r[i], b.r[i]); }); }
inline f32x16 operator*(f32x16 a, f32x16 b) { return each([&](int i) { return p_mul(a.r[i], b.r[i]); }); }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return each([&](int i) { return p_fma(a.r[i], b.r[i], c.r[i]); }); }
// b where either is NaN
inline f32x16 max(f32x16 a, f32x16 b) { return each([&](int i) { return p_max(a.r[i], b.r[i]); }); }
inline i32x16 operator+(i32x16 a, i32x16 b) { return ieach([&](int i) { return p_iadd(a.r[i], b.r[i]); }); }
template <int n> inline i32x16 shl(i32x16 a) { return ieach([&](int i) { return p_shl<n>(a.r[i]); }); }
template <int n> inline i32x16 shr(i32x16 a) { return ieach([&](int i) { return p_shr<n>(a.r[i]); }); }
inline f32x16 to_float(i32x16 a) { return each([&](int i) { return p_cvt(a.r[i]); }); }
inline f32x16 as_float(i32x16 a) { return each([&](int i) { return p_cast(a.r[i]); }); }
inline i32x16 as_int(f32x16 a) { return ieach([&](int i) { return p_icast(a.r[i]); }); }
// Bit j is set where a[j] >= b[j]; false with NaN.
inline uint32_t ge(f32x16 a, f32x16 b) {
    uint32_t mask = 0;
    for (int i = 0; i < kRegs; ++i) mask |= p_ge(a.r[i], b.r[i]) << (i * kWidth);
    return mask;
}
// x where a >= b, else 0.
inline f32x16 keep_ge(f32x16 x, f32x16 a, f32x16 b) {
    return each([&](int i) { return p_keep_ge(x.r[i], a.r[i], b.r[i]); });
}

// Fixed order: lane j with lane j + 8, then 4, 2, 1.
inline float sum16(f32x16 a) {
    float x[16];
    store16(x, a);
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; ++j) x[j] = x[j] + x[j + width];
    return x[0];
}
inline float max16(f32x16 a) {
    float x[16];
    store16(x, a);
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; ++j) x[j] = x[j] > x[j + width] ? x[j] : x[j + width];
    return x[0];
}

DRIFTMAX_END
