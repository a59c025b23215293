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

// Inlining is not left to the compiler: an f32x16 that goes through memory costs more than the arithmetic. Sanitizers'
// instrumentation of such functions takes minutes to compile, and there speed does not matter.
#ifdef DRIFTMAX_SANITIZED
#define DRIFTMAX_INLINE inline
#else
#define DRIFTMAX_INLINE inline __attribute__((always_inline))
#endif

// For a lambda that prefetches: GCC takes a call of it for one without effects, and drops it unless it is inlined first.
#define DRIFTMAX_LAMBDA_INLINE __attribute__((always_inline))

DRIFTMAX_BEGIN

// The same pointer, of which a compiler knows nothing any more, so that it cannot load ahead what is behind it.
template <typename T> DRIFTMAX_INLINE const T* opaque(const T* p) {
    __asm__("" : "+r"(p));
    return p;
}

// ---- one native register ---------------------------------------------------------------------------------------------
#if DRIFTMAX_AVX512
using reg = __m512;
using ireg = __m512i;
DRIFTMAX_INLINE reg p_set(float x) { return _mm512_set1_ps(x); }
DRIFTMAX_INLINE ireg p_iset(int32_t x) { return _mm512_set1_epi32(x); }
DRIFTMAX_INLINE reg p_load(const float* p) { return _mm512_loadu_ps(p); }
DRIFTMAX_INLINE ireg p_iload(const uint32_t* p) { return _mm512_loadu_si512(p); }
DRIFTMAX_INLINE void p_store(float* p, reg a) { _mm512_storeu_ps(p, a); }
DRIFTMAX_INLINE reg p_add(reg a, reg b) { return _mm512_add_ps(a, b); }
DRIFTMAX_INLINE reg p_sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
DRIFTMAX_INLINE reg p_mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
DRIFTMAX_INLINE reg p_fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
DRIFTMAX_INLINE reg p_max(reg a, reg b) { return _mm512_max_ps(a, b); }  // b where either is NaN
DRIFTMAX_INLINE reg p_min(reg a, reg b) { return _mm512_min_ps(a, b); }
DRIFTMAX_INLINE ireg p_iadd(ireg a, ireg b) { return _mm512_add_epi32(a, b); }
template <int n> DRIFTMAX_INLINE ireg p_shl(ireg a) { return _mm512_slli_epi32(a, n); }
template <int n> DRIFTMAX_INLINE ireg p_shr(ireg a) { return _mm512_srli_epi32(a, n); }
DRIFTMAX_INLINE reg p_cvt(ireg a) { return _mm512_cvtepi32_ps(a); }
DRIFTMAX_INLINE reg p_cast(ireg a) { return _mm512_castsi512_ps(a); }
DRIFTMAX_INLINE ireg p_icast(reg a) { return _mm512_castps_si512(a); }
DRIFTMAX_INLINE uint32_t p_ge(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
using dreg = __m512d;
DRIFTMAX_INLINE dreg p_load(const double* p) { return _mm512_loadu_pd(p); }
// float(v * c - r), each step rounded in double but the last
DRIFTMAX_INLINE reg p_narrow(dreg low, dreg high, double c, double r) {
    auto half = [&](dreg v) { return _mm512_cvtpd_ps(_mm512_sub_pd(_mm512_mul_pd(v, _mm512_set1_pd(c)), _mm512_set1_pd(r))); };
    return _mm512_insertf32x8(_mm512_castps256_ps512(half(low)), half(high), 1);
}
DRIFTMAX_INLINE reg p_keep_ge(reg x, reg a, reg b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), x); }
DRIFTMAX_INLINE reg p_load(const uint16_t* p, bool half) {
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return half ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
DRIFTMAX_INLINE ireg p_iand(ireg a, ireg b) { return _mm512_and_si512(a, b); }
// lanes of 16 bits
DRIFTMAX_INLINE ireg p_set16(int16_t x) { return _mm512_set1_epi16(x); }
DRIFTMAX_INLINE ireg p_load16(const uint16_t* p) { return _mm512_loadu_si512(p); }
DRIFTMAX_INLINE void p_store16(uint16_t* p, ireg a) { _mm512_storeu_si512(p, a); }
DRIFTMAX_INLINE ireg p_max_signed(ireg a, ireg b) { return _mm512_max_epi16(a, b); }
DRIFTMAX_INLINE ireg p_min_signed(ireg a, ireg b) { return _mm512_min_epi16(a, b); }
DRIFTMAX_INLINE ireg p_max_unsigned(ireg a, ireg b) { return _mm512_max_epu16(a, b); }
DRIFTMAX_INLINE bool p_any_negative(ireg a) { return _mm512_movepi16_mask(a) != 0; }
#elif DRIFTMAX_AVX2
using reg = __m256;
using ireg = __m256i;
DRIFTMAX_INLINE reg p_set(float x) { return _mm256_set1_ps(x); }
DRIFTMAX_INLINE ireg p_iset(int32_t x) { return _mm256_set1_epi32(x); }
DRIFTMAX_INLINE reg p_load(const float* p) { return _mm256_loadu_ps(p); }
DRIFTMAX_INLINE ireg p_iload(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
DRIFTMAX_INLINE void p_store(float* p, reg a) { _mm256_storeu_ps(p, a); }
DRIFTMAX_INLINE reg p_add(reg a, reg b) { return _mm256_add_ps(a, b); }
DRIFTMAX_INLINE reg p_sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
DRIFTMAX_INLINE reg p_mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
DRIFTMAX_INLINE reg p_fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
DRIFTMAX_INLINE reg p_max(reg a, reg b) { return _mm256_max_ps(a, b); }
DRIFTMAX_INLINE reg p_min(reg a, reg b) { return _mm256_min_ps(a, b); }
DRIFTMAX_INLINE ireg p_iadd(ireg a, ireg b) { return _mm256_add_epi32(a, b); }
template <int n> DRIFTMAX_INLINE ireg p_shl(ireg a) { return _mm256_slli_epi32(a, n); }
template <int n> DRIFTMAX_INLINE ireg p_shr(ireg a) { return _mm256_srli_epi32(a, n); }
DRIFTMAX_INLINE reg p_cvt(ireg a) { return _mm256_cvtepi32_ps(a); }
DRIFTMAX_INLINE reg p_cast(ireg a) { return _mm256_castsi256_ps(a); }
DRIFTMAX_INLINE ireg p_icast(reg a) { return _mm256_castps_si256(a); }
DRIFTMAX_INLINE uint32_t p_ge(reg a, reg b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ))); }
using dreg = __m256d;
DRIFTMAX_INLINE dreg p_load(const double* p) { return _mm256_loadu_pd(p); }
DRIFTMAX_INLINE reg p_narrow(dreg low, dreg high, double c, double r) {
    auto half = [&](dreg v) { return _mm256_cvtpd_ps(_mm256_sub_pd(_mm256_mul_pd(v, _mm256_set1_pd(c)), _mm256_set1_pd(r))); };
    return _mm256_insertf128_ps(_mm256_castps128_ps256(half(low)), half(high), 1);
}
DRIFTMAX_INLINE reg p_keep_ge(reg x, reg a, reg b) { return _mm256_and_ps(x, _mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
DRIFTMAX_INLINE reg p_load(const uint16_t* p, bool half) {
    __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return half ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
DRIFTMAX_INLINE ireg p_iand(ireg a, ireg b) { return _mm256_and_si256(a, b); }
DRIFTMAX_INLINE ireg p_set16(int16_t x) { return _mm256_set1_epi16(x); }
DRIFTMAX_INLINE ireg p_load16(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
DRIFTMAX_INLINE void p_store16(uint16_t* p, ireg a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
DRIFTMAX_INLINE ireg p_max_signed(ireg a, ireg b) { return _mm256_max_epi16(a, b); }
DRIFTMAX_INLINE ireg p_min_signed(ireg a, ireg b) { return _mm256_min_epi16(a, b); }
DRIFTMAX_INLINE ireg p_max_unsigned(ireg a, ireg b) { return _mm256_max_epu16(a, b); }
DRIFTMAX_INLINE bool p_any_negative(ireg a) { return (_mm256_movemask_epi8(a) & 0xaaaaaaaa) != 0; }
#elif DRIFTMAX_SSE
using reg = __m128;
using ireg = __m128i;
DRIFTMAX_INLINE reg p_set(float x) { return _mm_set1_ps(x); }
DRIFTMAX_INLINE ireg p_iset(int32_t x) { return _mm_set1_epi32(x); }
DRIFTMAX_INLINE reg p_load(const float* p) { return _mm_loadu_ps(p); }
DRIFTMAX_INLINE ireg p_iload(const uint32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
DRIFTMAX_INLINE void p_store(float* p, reg a) { _mm_storeu_ps(p, a); }
DRIFTMAX_INLINE reg p_add(reg a, reg b) { return _mm_add_ps(a, b); }
DRIFTMAX_INLINE reg p_sub(reg a, reg b) { return _mm_sub_ps(a, b); }
DRIFTMAX_INLINE reg p_mul(reg a, reg b) { return _mm_mul_ps(a, b); }
DRIFTMAX_INLINE reg p_max(reg a, reg b) { return _mm_max_ps(a, b); }
DRIFTMAX_INLINE reg p_min(reg a, reg b) { return _mm_min_ps(a, b); }
DRIFTMAX_INLINE ireg p_iadd(ireg a, ireg b) { return _mm_add_epi32(a, b); }
template <int n> DRIFTMAX_INLINE ireg p_shl(ireg a) { return _mm_slli_epi32(a, n); }
template <int n> DRIFTMAX_INLINE ireg p_shr(ireg a) { return _mm_srli_epi32(a, n); }
DRIFTMAX_INLINE reg p_cvt(ireg a) { return _mm_cvtepi32_ps(a); }
DRIFTMAX_INLINE reg p_cast(ireg a) { return _mm_castsi128_ps(a); }
DRIFTMAX_INLINE ireg p_icast(reg a) { return _mm_castps_si128(a); }
DRIFTMAX_INLINE uint32_t p_ge(reg a, reg b) { return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(a, b))); }
using dreg = __m128d;
DRIFTMAX_INLINE dreg p_load(const double* p) { return _mm_loadu_pd(p); }
DRIFTMAX_INLINE reg p_narrow(dreg low, dreg high, double c, double r) {
    auto half = [&](dreg v) { return _mm_cvtpd_ps(_mm_sub_pd(_mm_mul_pd(v, _mm_set1_pd(c)), _mm_set1_pd(r))); };
    return _mm_movelh_ps(half(low), half(high));
}
DRIFTMAX_INLINE reg p_keep_ge(reg x, reg a, reg b) { return _mm_and_ps(x, _mm_cmpge_ps(a, b)); }
// Two lanes of fma: the product is exact in double, the sum is rounded to odd, and rounding an odd-rounded 53-bit value to 24
// bits or fewer is the correctly rounded result (Boldo and Melquiond, 2008).
inline __m128d fma_odd(__m128d p, __m128d c) {
    __m128d s = _mm_add_pd(p, c);
    __m128d t = _mm_sub_pd(s, p);
    __m128d e = _mm_add_pd(_mm_sub_pd(p, _mm_sub_pd(s, t)), _mm_sub_pd(c, t));  // TwoSum: s + e == p + c
    __m128d zero = _mm_setzero_pd();
    __m128i bits = _mm_castpd_si128(s);
    __m128i inexact = _mm_castpd_si128(_mm_or_pd(_mm_cmplt_pd(e, zero), _mm_cmpgt_pd(e, zero)));
    __m128i even = _mm_cmpeq_epi64(_mm_and_si128(bits, _mm_set1_epi64x(1)), _mm_setzero_si128());
    // one ulp away from zero where the error has the sign of s, towards zero where it has not
    __m128i opposite = _mm_xor_si128(bits, _mm_castpd_si128(e));  // its sign bit
    __m128i ulp = _mm_sub_epi64(_mm_set1_epi64x(1), _mm_slli_epi64(_mm_srli_epi64(opposite, 63), 1));
    return _mm_castsi128_pd(_mm_add_epi64(bits, _mm_and_si128(_mm_and_si128(inexact, even), ulp)));
}
__attribute__((noinline)) inline reg fma_exact(__m128d p0, __m128d p1, __m128d c0, __m128d c1) {
    return _mm_movelh_ps(_mm_cvtpd_ps(fma_odd(p0, c0)), _mm_cvtpd_ps(fma_odd(p1, c1)));
}
// Rounding the double sum once more to float errs only where it looks like a tie of float, or where the float is subnormal.
DRIFTMAX_INLINE reg p_fma(reg a, reg b, reg c) {
    __m128d c0 = _mm_cvtps_pd(c), c1 = _mm_cvtps_pd(_mm_movehl_ps(c, c));
    __m128d p0 = _mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b));
    __m128d p1 = _mm_mul_pd(_mm_cvtps_pd(_mm_movehl_ps(a, a)), _mm_cvtps_pd(_mm_movehl_ps(b, b)));
    __m128d s0 = _mm_add_pd(p0, c0), s1 = _mm_add_pd(p1, c1);
    reg sum = _mm_movelh_ps(_mm_cvtpd_ps(s0), _mm_cvtpd_ps(s1));
    __m128i low = _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(s0), _mm_castpd_ps(s1), 0x88));
    __m128i tie = _mm_cmpeq_epi32(_mm_and_si128(low, _mm_set1_epi32(0x1fffffff)), _mm_set1_epi32(0x10000000));
    __m128i tiny = _mm_cmpeq_epi32(_mm_and_si128(_mm_castps_si128(sum), _mm_set1_epi32(0x7f800000)), _mm_setzero_si128());
    __m128i doubt = _mm_or_si128(tie, tiny);
    if (__builtin_expect(!_mm_testz_si128(doubt, doubt), 0)) return fma_exact(p0, p1, c0, c1);
    return sum;
}
DRIFTMAX_INLINE reg p_load(const uint16_t* p, bool half) {
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
DRIFTMAX_INLINE ireg p_iand(ireg a, ireg b) { return _mm_and_si128(a, b); }
DRIFTMAX_INLINE ireg p_set16(int16_t x) { return _mm_set1_epi16(x); }
DRIFTMAX_INLINE ireg p_load16(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
DRIFTMAX_INLINE void p_store16(uint16_t* p, ireg a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }
DRIFTMAX_INLINE ireg p_max_signed(ireg a, ireg b) { return _mm_max_epi16(a, b); }
DRIFTMAX_INLINE ireg p_min_signed(ireg a, ireg b) { return _mm_min_epi16(a, b); }
DRIFTMAX_INLINE ireg p_max_unsigned(ireg a, ireg b) { return _mm_max_epu16(a, b); }
DRIFTMAX_INLINE bool p_any_negative(ireg a) { return (_mm_movemask_epi8(a) & 0xaaaa) != 0; }
#elif DRIFTMAX_NEON
using reg = float32x4_t;
using ireg = int32x4_t;
DRIFTMAX_INLINE reg p_set(float x) { return vdupq_n_f32(x); }
DRIFTMAX_INLINE ireg p_iset(int32_t x) { return vdupq_n_s32(x); }
DRIFTMAX_INLINE reg p_load(const float* p) { return vld1q_f32(p); }
DRIFTMAX_INLINE ireg p_iload(const uint32_t* p) { return vreinterpretq_s32_u32(vld1q_u32(p)); }
DRIFTMAX_INLINE void p_store(float* p, reg a) { vst1q_f32(p, a); }
DRIFTMAX_INLINE reg p_add(reg a, reg b) { return vaddq_f32(a, b); }
DRIFTMAX_INLINE reg p_sub(reg a, reg b) { return vsubq_f32(a, b); }
DRIFTMAX_INLINE reg p_mul(reg a, reg b) { return vmulq_f32(a, b); }
DRIFTMAX_INLINE reg p_fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
DRIFTMAX_INLINE reg p_max(reg a, reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
DRIFTMAX_INLINE reg p_min(reg a, reg b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
DRIFTMAX_INLINE ireg p_iadd(ireg a, ireg b) { return vaddq_s32(a, b); }
template <int n> DRIFTMAX_INLINE ireg p_shl(ireg a) { return vshlq_n_s32(a, n); }
template <int n> DRIFTMAX_INLINE ireg p_shr(ireg a) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n)); }
DRIFTMAX_INLINE reg p_cvt(ireg a) { return vcvtq_f32_s32(a); }
DRIFTMAX_INLINE reg p_cast(ireg a) { return vreinterpretq_f32_s32(a); }
DRIFTMAX_INLINE ireg p_icast(reg a) { return vreinterpretq_s32_f32(a); }
DRIFTMAX_INLINE uint32_t p_ge(reg a, reg b) {
    const uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), vld1q_u32(bit)));
}
using dreg = float64x2_t;
DRIFTMAX_INLINE dreg p_load(const double* p) { return vld1q_f64(p); }
DRIFTMAX_INLINE reg p_narrow(dreg low, dreg high, double c, double r) {
    auto half = [&](dreg v) { return vcvt_f32_f64(vsubq_f64(vmulq_f64(v, vdupq_n_f64(c)), vdupq_n_f64(r))); };
    return vcombine_f32(half(low), half(high));
}
DRIFTMAX_INLINE reg p_keep_ge(reg x, reg a, reg b) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vcgeq_f32(a, b)));
}
DRIFTMAX_INLINE reg p_load(const uint16_t* p, bool half) {
    uint16x4_t h = vld1_u16(p);
    return half ? vcvt_f32_f16(vreinterpret_f16_u16(h)) : vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}
DRIFTMAX_INLINE ireg p_iand(ireg a, ireg b) { return vandq_s32(a, b); }
DRIFTMAX_INLINE ireg p_set16(int16_t x) { return vreinterpretq_s32_s16(vdupq_n_s16(x)); }
DRIFTMAX_INLINE ireg p_load16(const uint16_t* p) { return vreinterpretq_s32_u16(vld1q_u16(p)); }
DRIFTMAX_INLINE void p_store16(uint16_t* p, ireg a) { vst1q_u16(p, vreinterpretq_u16_s32(a)); }
DRIFTMAX_INLINE ireg p_max_signed(ireg a, ireg b) {
    return vreinterpretq_s32_s16(vmaxq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
DRIFTMAX_INLINE ireg p_min_signed(ireg a, ireg b) {
    return vreinterpretq_s32_s16(vminq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
DRIFTMAX_INLINE ireg p_max_unsigned(ireg a, ireg b) {
    return vreinterpretq_s32_u16(vmaxq_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b)));
}
DRIFTMAX_INLINE bool p_any_negative(ireg a) { return vminvq_s16(vreinterpretq_s16_s32(a)) < 0; }
#else
struct reg {
    float v[4];
};
struct ireg {
    int32_t v[4];
};
template <typename F> DRIFTMAX_INLINE reg p_map(F f) { return {{f(0), f(1), f(2), f(3)}}; }
template <typename F> DRIFTMAX_INLINE ireg p_imap(F f) { return {{f(0), f(1), f(2), f(3)}}; }
DRIFTMAX_INLINE reg p_set(float x) { return {{x, x, x, x}}; }
DRIFTMAX_INLINE ireg p_iset(int32_t x) { return {{x, x, x, x}}; }
DRIFTMAX_INLINE reg p_load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
DRIFTMAX_INLINE ireg p_iload(const uint32_t* p) {
    ireg r;
    std::memcpy(&r, p, 16);
    return r;
}
DRIFTMAX_INLINE void p_store(float* p, reg a) { std::memcpy(p, &a, 16); }
DRIFTMAX_INLINE reg p_add(reg a, reg b) {
    return p_map([&](int i) { return a.v[i] + b.v[i]; });
}
DRIFTMAX_INLINE reg p_sub(reg a, reg b) {
    return p_map([&](int i) { return a.v[i] - b.v[i]; });
}
DRIFTMAX_INLINE reg p_mul(reg a, reg b) {
    return p_map([&](int i) { return a.v[i] * b.v[i]; });
}
DRIFTMAX_INLINE reg p_fma(reg a, reg b, reg c) {
    return p_map([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
DRIFTMAX_INLINE reg p_max(reg a, reg b) {
    return p_map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
DRIFTMAX_INLINE reg p_min(reg a, reg b) {
    return p_map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
DRIFTMAX_INLINE ireg p_iadd(ireg a, ireg b) {
    return p_imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
}
template <int n> DRIFTMAX_INLINE ireg p_shl(ireg a) {
    return p_imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n); });
}
template <int n> DRIFTMAX_INLINE ireg p_shr(ireg a) {
    return p_imap([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> n); });
}
DRIFTMAX_INLINE reg p_cvt(ireg a) {
    return p_map([&](int i) { return static_cast<float>(a.v[i]); });
}
DRIFTMAX_INLINE reg p_cast(ireg a) {
    reg r;
    std::memcpy(&r, &a, 16);
    return r;
}
DRIFTMAX_INLINE ireg p_icast(reg a) {
    ireg r;
    std::memcpy(&r, &a, 16);
    return r;
}
DRIFTMAX_INLINE uint32_t p_ge(reg a, reg b) {
    uint32_t m = 0;
    for (int i = 0; i < 4; ++i) m |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
    return m;
}
struct dreg {
    double v[2];
};
DRIFTMAX_INLINE dreg p_load(const double* p) { return {{p[0], p[1]}}; }
DRIFTMAX_INLINE reg p_narrow(dreg low, dreg high, double c, double r) {
    return p_map([&](int i) { return static_cast<float>((i < 2 ? low.v[i] : high.v[i - 2]) * c - r); });
}
DRIFTMAX_INLINE reg p_keep_ge(reg x, reg a, reg b) {
    return p_map([&](int i) { return a.v[i] >= b.v[i] ? x.v[i] : 0.0f; });
}
DRIFTMAX_INLINE float p_half(uint16_t h) {
    uint32_t magnitude = h & 0x7fffu, bits = magnitude << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
    bits |= (magnitude > 0x7bffu ? 0x7f800000u : 0u) | static_cast<uint32_t>(h & 0x8000u) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}
DRIFTMAX_INLINE reg p_load(const uint16_t* p, bool half) {
    return p_map([&](int i) {
        uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return half ? p_half(p[i]) : value;
    });
}
DRIFTMAX_INLINE ireg p_iand(ireg a, ireg b) {
    return p_imap([&](int i) { return a.v[i] & b.v[i]; });
}
DRIFTMAX_INLINE ireg p_load16(const uint16_t* p) {
    ireg r;
    std::memcpy(&r, p, 16);
    return r;
}
DRIFTMAX_INLINE void p_store16(uint16_t* p, ireg a) { std::memcpy(p, &a, 16); }
template <typename T, typename F> DRIFTMAX_INLINE ireg p_map16(ireg a, ireg b, F f) {
    T x[8], y[8];
    std::memcpy(x, &a, 16);
    std::memcpy(y, &b, 16);
    for (int i = 0; i < 8; ++i) x[i] = f(x[i], y[i]);
    std::memcpy(&a, x, 16);
    return a;
}
DRIFTMAX_INLINE ireg p_set16(int16_t x) {
    return p_map16<int16_t>({}, {}, [&](int16_t, int16_t) { return x; });
}
DRIFTMAX_INLINE ireg p_max_signed(ireg a, ireg b) {
    return p_map16<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y ? x : y; });
}
DRIFTMAX_INLINE ireg p_min_signed(ireg a, ireg b) {
    return p_map16<int16_t>(a, b, [](int16_t x, int16_t y) { return x < y ? x : y; });
}
DRIFTMAX_INLINE ireg p_max_unsigned(ireg a, ireg b) {
    return p_map16<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x > y ? x : y; });
}
DRIFTMAX_INLINE bool p_any_negative(ireg a) {
    int16_t x[8];
    std::memcpy(x, &a, 16);
    bool any = false;
    for (int i = 0; i < 8; ++i) any = any || x[i] < 0;
    return any;
}
#endif

// ---- sixteen lanes ---------------------------------------------------------------------------------------------------
constexpr int kWidth = sizeof(reg) / 4;  // lanes of a register
constexpr int kRegs = 16 / kWidth;       // registers of an f32x16

struct f32x16 {
    reg r[kRegs];
};
struct i32x16 {
    ireg r[kRegs];
};
struct f64x16 {
    dreg r[2 * kRegs];
};
struct i16x32 {
    ireg r[kRegs];
};

// Apply an expression in `i` to each register.
#define DRIFTMAX_EACH(Type, expression)                      \
    Type out;                                                \
    for (int i = 0; i < kRegs; ++i) out.r[i] = (expression); \
    return out

DRIFTMAX_INLINE f32x16 splat(float x) { DRIFTMAX_EACH(f32x16, p_set(x)); }
DRIFTMAX_INLINE i32x16 isplat(int32_t x) { DRIFTMAX_EACH(i32x16, p_iset(x)); }
DRIFTMAX_INLINE f32x16 load16(const float* p) { DRIFTMAX_EACH(f32x16, p_load(p + i * kWidth)); }
DRIFTMAX_INLINE i32x16 iload16(const uint32_t* p) { DRIFTMAX_EACH(i32x16, p_iload(p + i * kWidth)); }
DRIFTMAX_INLINE f64x16 load16(const double* p) {
    f64x16 out;
    for (int i = 0; i < 2 * kRegs; ++i) out.r[i] = p_load(p + i * (kWidth / 2));
    return out;
}
DRIFTMAX_INLINE f32x16 narrow16(const f64x16& a, double c, double r) {
    DRIFTMAX_EACH(f32x16, p_narrow(a.r[2 * i], a.r[2 * i + 1], c, r));
}
DRIFTMAX_INLINE f32x16 load_half16(const uint16_t* p, bool half) { DRIFTMAX_EACH(f32x16, p_load(p + i * kWidth, half)); }
DRIFTMAX_INLINE i16x32 splat16(int16_t x) { DRIFTMAX_EACH(i16x32, p_set16(x)); }
DRIFTMAX_INLINE i16x32 load32(const uint16_t* p) { DRIFTMAX_EACH(i16x32, p_load16(p + i * 2 * kWidth)); }
DRIFTMAX_INLINE void store32(uint16_t* p, i16x32 a) {
    for (int i = 0; i < kRegs; ++i) p_store16(p + i * 2 * kWidth, a.r[i]);
}
DRIFTMAX_INLINE i16x32 max_signed(i16x32 a, i16x32 b) { DRIFTMAX_EACH(i16x32, p_max_signed(a.r[i], b.r[i])); }
DRIFTMAX_INLINE i16x32 min_signed(i16x32 a, i16x32 b) { DRIFTMAX_EACH(i16x32, p_min_signed(a.r[i], b.r[i])); }
DRIFTMAX_INLINE i16x32 max_unsigned(i16x32 a, i16x32 b) { DRIFTMAX_EACH(i16x32, p_max_unsigned(a.r[i], b.r[i])); }
DRIFTMAX_INLINE bool any_negative(i16x32 a) {
    bool any = false;
    for (int i = 0; i < kRegs; ++i) any = any || p_any_negative(a.r[i]);
    return any;
}
// bfloat16 at even and at odd places.
DRIFTMAX_INLINE f32x16 even_bf16(i16x32 a) { DRIFTMAX_EACH(f32x16, p_cast(p_shl<16>(a.r[i]))); }
DRIFTMAX_INLINE f32x16 odd_bf16(i16x32 a) { DRIFTMAX_EACH(f32x16, p_cast(p_iand(a.r[i], p_iset(-65536)))); }
DRIFTMAX_INLINE void store16(float* p, f32x16 a) {
    for (int i = 0; i < kRegs; ++i) p_store(p + i * kWidth, a.r[i]);
}
DRIFTMAX_INLINE f32x16 operator+(f32x16 a, f32x16 b) { DRIFTMAX_EACH(f32x16, p_add(a.r[i], b.r[i])); }
DRIFTMAX_INLINE f32x16 operator-(f32x16 a, f32x16 b) { DRIFTMAX_EACH(f32x16, p_sub(a.r[i], b.r[i])); }
DRIFTMAX_INLINE f32x16 operator*(f32x16 a, f32x16 b) { DRIFTMAX_EACH(f32x16, p_mul(a.r[i], b.r[i])); }
DRIFTMAX_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { DRIFTMAX_EACH(f32x16, p_fma(a.r[i], b.r[i], c.r[i])); }
// b where either is NaN
DRIFTMAX_INLINE f32x16 max(f32x16 a, f32x16 b) { DRIFTMAX_EACH(f32x16, p_max(a.r[i], b.r[i])); }
DRIFTMAX_INLINE f32x16 min(f32x16 a, f32x16 b) { DRIFTMAX_EACH(f32x16, p_min(a.r[i], b.r[i])); }
DRIFTMAX_INLINE i32x16 operator+(i32x16 a, i32x16 b) { DRIFTMAX_EACH(i32x16, p_iadd(a.r[i], b.r[i])); }
template <int n> DRIFTMAX_INLINE i32x16 shl(i32x16 a) { DRIFTMAX_EACH(i32x16, p_shl<n>(a.r[i])); }
template <int n> DRIFTMAX_INLINE i32x16 shr(i32x16 a) { DRIFTMAX_EACH(i32x16, p_shr<n>(a.r[i])); }
DRIFTMAX_INLINE f32x16 to_float(i32x16 a) { DRIFTMAX_EACH(f32x16, p_cvt(a.r[i])); }
DRIFTMAX_INLINE f32x16 as_float(i32x16 a) { DRIFTMAX_EACH(f32x16, p_cast(a.r[i])); }
DRIFTMAX_INLINE i32x16 as_int(f32x16 a) { DRIFTMAX_EACH(i32x16, p_icast(a.r[i])); }
// Bit j is set where a[j] >= b[j]; false with NaN.
DRIFTMAX_INLINE uint32_t ge(f32x16 a, f32x16 b) {
    uint32_t mask = 0;
    for (int i = 0; i < kRegs; ++i) mask |= p_ge(a.r[i], b.r[i]) << (i * kWidth);
    return mask;
}
// x where a >= b, else 0
DRIFTMAX_INLINE f32x16 keep_ge(f32x16 x, f32x16 a, f32x16 b) { DRIFTMAX_EACH(f32x16, p_keep_ge(x.r[i], a.r[i], b.r[i])); }

// Folds in a fixed order: lane j with lane j + 8, then 4, 2, 1.
#if DRIFTMAX_AVX512
#define DRIFTMAX_FOLD8(op, a) _mm256_##op##_ps(_mm512_castps512_ps256(a.r[0]), _mm512_extractf32x8_ps(a.r[0], 1))
#elif DRIFTMAX_AVX2
#define DRIFTMAX_FOLD8(op, a) _mm256_##op##_ps(a.r[0], a.r[1])
#endif
#if DRIFTMAX_AVX512 || DRIFTMAX_AVX2
#define DRIFTMAX_FOLD(op, a)                                                                     \
    __m256 eight = DRIFTMAX_FOLD8(op, a);                                                        \
    __m128 four = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    __m128 two = _mm_##op##_ps(four, _mm_movehl_ps(four, four));                                 \
    return _mm_cvtss_f32(_mm_##op##_ss(two, _mm_shuffle_ps(two, two, 1)))
DRIFTMAX_INLINE float sum16(f32x16 a) { DRIFTMAX_FOLD(add, a); }
DRIFTMAX_INLINE float max16(f32x16 a) { DRIFTMAX_FOLD(max, a); }
#else
DRIFTMAX_INLINE float sum16(f32x16 a) {
    float x[4];
    p_store(x, p_add(p_add(a.r[0], a.r[2]), p_add(a.r[1], a.r[3])));
    return (x[0] + x[2]) + (x[1] + x[3]);
}
DRIFTMAX_INLINE float max16(f32x16 a) {
    float x[4];
    p_store(x, p_max(p_max(a.r[0], a.r[2]), p_max(a.r[1], a.r[3])));
    float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
    return even > odd ? even : odd;
}
#endif

DRIFTMAX_END
