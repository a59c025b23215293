// Elementary functions: exp2 on sixteen lanes (block sums), and the logarithms and Box-Muller of docs/numerics.md as
// scalar templates that compilers vectorise over arrays. Coefficients are minimax fits made for this project.
#pragma once

#include "simd.h"

DRIFTMAX_BEGIN

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits

// Coefficients of 2^r for |r| <= 1/2, highest power first: relative error 2^-23.4, exactly 1 at 0.
struct alignas(64) Exp2Table {
    float row[6][16];
    constexpr explicit Exp2Table(float factor) : row{} {
        const float coefficients[6] = {0x1.5bba18p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
        for (int i = 0; i < 6; ++i)
            for (float& lane : row[i]) lane = factor * coefficients[i];
    }
};

// factor * 2^r for n registers, step by step side by side. The first coefficient is a constant; the others come from a table
// whose contents a compiler may not know (blocks.h, exp2_table).
template <int n> DRIFTMAX_INLINE void exp2_poly(const reg (&r)[n], reg (&p)[n], float first, const Exp2Table& table) {
    for (int k = 0; k < n; ++k) p[k] = p_set(first);
    for (int i = 1; i < 6; ++i)
        for (int k = 0; k < n; ++k) p[k] = p_fma(p[k], r[k], p_load(table.row[i]));
}
static constexpr Exp2Table kExp2(1.0f);
DRIFTMAX_INLINE f32x16 exp2_poly(const f32x16& r) {
    f32x16 p;
    exp2_poly(r.r, p.r, kExp2.row[0][0], kExp2);
    return p;
}

// 2^y for y in [-126, 127]. NaN gives garbage or NaN: callers watch y itself.
DRIFTMAX_INLINE f32x16 exp2_16(f32x16 y) {
    f32x16 t = y + splat(kMagic);
    return as_float(as_int(exp2_poly(y - (t - splat(kMagic)))) + shl<23>(as_int(t)));
}

// 2^y as kExp2ToScale's polynomial of a rest, at most 1/2, scaled by the power of an integer n, for y in [-125, 126]. AVX-512 has
// instructions for the rest and for scaling by n. Elsewhere n comes to stand in the low bits of a float and is shifted to its
// exponent, as a factor 2^(n - 1), so the polynomial is doubled: an odd offset instead, 127, would round ties the other way.
#if DRIFTMAX_AVX512
static constexpr Exp2Table kExp2ToScale(1.0f);
DRIFTMAX_INLINE void split_nearest(reg y, reg& power, reg& rest) {
    rest = _mm512_reduce_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // exact, as is the difference
    power = p_sub(y, rest);
}
DRIFTMAX_INLINE reg p_scale(reg a, reg power) { return _mm512_scalef_ps(a, power); }
#else
static constexpr Exp2Table kExp2ToScale(2.0f);
DRIFTMAX_INLINE void split_nearest(reg y, reg& power, reg& rest) {
    constexpr float offset = kMagic + 126.0f;
    reg t = p_add(y, p_set(offset));
    power = p_cast(p_shl<23>(p_icast(t)));
    rest = p_add(y, p_sub(p_set(offset), t));
}
DRIFTMAX_INLINE reg p_scale(reg a, reg power) { return p_mul(a, power); }
#endif
// a * 2^n + c. The product is exact, so that there is one rounding, fused or not.
DRIFTMAX_INLINE reg p_add_scaled(reg a, reg power, reg c) {
#if DRIFTMAX_AVX2 || DRIFTMAX_NEON
    return p_fma(a, power, c);
#else
    return p_add(p_scale(a, power), c);
#endif
}

template <typename F> struct Real;

template <> struct Real<float> {
    using bits = uint32_t;
    using sint = int32_t;
    static constexpr bits one = 0x3f800000u, sqrt_half = 0x3f3504f3u, mask = 0x7fffffu;
    static constexpr int mantissa = 23;
    static constexpr float ln2_hi = 0x1.62e3p-1f, ln2_lo = 0x1.2fefa2p-17f;
    static DRIFTMAX_INLINE float log_poly(float z) { return z * (0x1.55557ap-1f + z * (0x1.995eacp-2f + z * 0x1.31e4a4p-2f)); }
    static DRIFTMAX_INLINE float sin_poly(float z) {
        return 0x1.921fb6p+2f + z * (-0x1.4abbb8p+5f + z * (0x1.465e92p+6f + z * -0x1.2d92ep+6f));
    }
    static DRIFTMAX_INLINE float cos_poly(float z) {
        return 1.0f + z * (-0x1.3bd3ccp+4f + z * (0x1.03c1dep+6f + z * (-0x1.55c664p+6f + z * 0x1.d9f79ep+5f)));
    }
};

template <> struct Real<double> {
    using bits = uint64_t;
    using sint = int64_t;
    static constexpr bits one = 0x3ff0000000000000ull, sqrt_half = 0x3fe6a09e667f3bcdull, mask = 0xfffffffffffffull;
    static constexpr int mantissa = 52;
    static constexpr double ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33;
    static DRIFTMAX_INLINE double log_poly(double z) {
        double p = 0x1.39a15d908163fp-3 + z * 0x1.2f0943ff040d9p-3;
        p = 0x1.7466424c7c745p-3 + z * p;
        p = 0x1.c71c51f9fb432p-3 + z * p;
        p = 0x1.2492494202889p-2 + z * p;
        p = 0x1.999999997fc9cp-2 + z * p;
        return z * (0x1.5555555555593p-1 + z * p);
    }
    static DRIFTMAX_INLINE double sin_poly(double z) {
        double p = 0x1.e8eec754eeb76p+1 + z * -0x1.6c58b65f3a064p-1;
        p = -0x1.e3074b4268892p+3 + z * p;
        p = 0x1.50783485c29cbp+5 + z * p;
        p = -0x1.32d2cce62abbbp+6 + z * p;
        p = 0x1.466bc6775aad9p+6 + z * p;
        p = -0x1.4abbce625be53p+5 + z * p;
        return 0x1.921fb54442d18p+2 + z * p;
    }
    static DRIFTMAX_INLINE double cos_poly(double z) {
        double p = -0x1.b6dd8290056ccp+0 + z * 0x1.1e2f8121ee82cp-2;
        p = 0x1.f9d3856db9818p+2 + z * p;
        p = -0x1.a6d1f29f3f4c2p+4 + z * p;
        p = 0x1.e1f5068919cd3p+5 + z * p;
        p = -0x1.55d3c7e3cbfefp+6 + z * p;
        p = 0x1.03c1f081b5ac4p+6 + z * p;
        p = -0x1.3bd3cc9be45dep+4 + z * p;
        return 1.0 + z * p;
    }
};

template <typename To, typename From> DRIFTMAX_INLINE To bit_cast_to(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// Correctly rounded u32 -> F, in forms that vectorise without an unsigned conversion instruction.
template <typename F> F from_u32(uint32_t x);
template <> DRIFTMAX_INLINE float from_u32<float>(uint32_t x) {
    return static_cast<float>(static_cast<int32_t>(x >> 16)) * 65536.0f + static_cast<float>(static_cast<int32_t>(x & 0xffffu));
}
template <> DRIFTMAX_INLINE double from_u32<double>(uint32_t x) {
    return bit_cast_to<double>(0x4330000000000000ull | x) - 0x1p52;
}

// Biased exponent -> F
DRIFTMAX_INLINE float exponent(uint32_t e, float) { return static_cast<float>(static_cast<int32_t>(e) - 127); }
DRIFTMAX_INLINE double exponent(uint64_t e, double) { return bit_cast_to<double>(0x4330000000000000ull | e) - (0x1p52 + 1023.0); }

// log(1 + f) + k ln 2
template <typename F> DRIFTMAX_INLINE F log_core(F f, F k) {
    F s = f / (F(2) + f);
    F z = s * s;
    F h = (F(0.5) * f) * f;
    return k * Real<F>::ln2_hi - ((h - (s * (h + Real<F>::log_poly(z)) + k * Real<F>::ln2_lo)) - f);
}

// x = (1 + f) 2^k with 1 + f in [sqrt(1/2), sqrt(2))
template <typename F> DRIFTMAX_INLINE void split(F x, F& f, F& k) {
    using R = Real<F>;
    typename R::bits t = bit_cast_to<typename R::bits>(x) + (R::one - R::sqrt_half);
    k = exponent(t >> R::mantissa, F());
    f = bit_cast_to<F>((t & R::mask) + R::sqrt_half) - F(1);
}

template <typename F> DRIFTMAX_INLINE F log_pos(F x) {
    F f, k;
    split(x, f, k);
    return log_core(f, k);
}

// U' in (0, 1) with full relative precision near 0
template <typename F> DRIFTMAX_INLINE F unit(uint32_t hi, uint32_t lo) {
    return from_u32<F>(hi) * F(0x1p-32) + (from_u32<F>(lo) * F(0x1p-64) + F(0x1p-65));
}

constexpr uint32_t kLog1pBelow = 0x4AFB0CCCu;  // (1 - sqrt(1/2)) 2^32

// Exp(1), resolved at both ends, is -log_core of these. One select between two inputs and a single logarithm, so that loops
// vectorise.
template <typename F> DRIFTMAX_INLINE void exponential_parts(uint32_t hi, uint32_t lo, F& f, F& k) {
    bool small = hi < kLog1pBelow;
    uint32_t flip = small ? 0u : 0xffffffffu;
    F u = unit<F>(hi ^ flip, lo ^ flip);
    split(u, f, k);
    f = small ? -u : f;
    k = small ? F(0) : k;
}

template <typename F> DRIFTMAX_INLINE F exponential(uint32_t hi, uint32_t lo) {
    F f, k;
    exponential_parts(hi, lo, f, k);
    return -log_core(f, k);
}

template <typename F> DRIFTMAX_INLINE F gumbel(uint32_t hi, uint32_t lo) { return -log_pos(exponential<F>(hi, lo)); }

DRIFTMAX_INLINE float uniform(uint32_t hi, uint32_t, float) {
    return (static_cast<float>(static_cast<int32_t>(hi >> 9)) + 0.5f) * 0x1p-23f;
}
DRIFTMAX_INLINE double uniform(uint32_t hi, uint32_t lo, double) {
    // 52 bits, exact: hi * 2^20 + (lo >> 12) < 2^52
    return ((from_u32<double>(hi) * 0x1p20 + from_u32<double>(lo >> 12)) + 0.5) * 0x1p-52;
}

// Turns in [-1/8, 1/8] around the quadrant q.
DRIFTMAX_INLINE float turns(int32_t d, uint32_t, float) { return static_cast<float>(d) * 0x1p-32f + 0x1p-33f; }
DRIFTMAX_INLINE double turns(int32_t d, uint32_t lo, double) {
    return static_cast<double>(d) * 0x1p-32 + (from_u32<double>(lo) * 0x1p-64 + 0x1p-65);
}

// Cosine and sine of the turn that a word says: of its distance from the nearest quadrant, then swapped and negated by it.
template <typename F> DRIFTMAX_INLINE void turn(uint32_t hi, uint32_t lo, F& cosine, F& sine) {
    using bits = typename Real<F>::bits;
    constexpr uint32_t top = 0x80000000u;
    const uint32_t at = hi + 0x20000000u;  // its two highest bits are the quadrant
    F x = turns(static_cast<int32_t>(hi - (at & 0xc0000000u)), lo, F());
    F z = x * x;
    bits s = bit_cast_to<bits>(x * Real<F>::sin_poly(z)), c = bit_cast_to<bits>(Real<F>::cos_poly(z));
    bool swap = static_cast<int32_t>(at << 1) < 0;
    auto sign = [](uint32_t word) { return static_cast<bits>(word & top) << (8 * (sizeof(bits) - 4)); };
    cosine = bit_cast_to<F>((swap ? s : c) ^ sign(at ^ (at << 1)));
    sine = bit_cast_to<F>((swap ? c : s) ^ sign(at));
}

DRIFTMAX_END
