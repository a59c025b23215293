// The four logit types: how sixteen of them become floats, and one becomes a double.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "vector_math.h"

DRIFTMAX_BEGIN

constexpr double kLog2e = 0x1.71547652b82fep+0, kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kInfF = std::numeric_limits<float>::infinity(), kNaNF = std::numeric_limits<float>::quiet_NaN();

// y = l * scale - reference, monotone in l. The reference is an integer, so that changing it is an exact power of two.
struct Scale {
    float c;
    double wide;  // the same factor for float64 logits
    float reference = 0.0f;
    explicit Scale(double temperature) : wide(kLog2e / temperature) {
        if (!(wide < 0x1p100)) wide = 0x1p100;  // T below 2^-99 acts as 2^-99 on block sums; races use T itself
        c = static_cast<float>(wide);
    }
};

// E::scaled(double) is y of one value, rounded so that no larger value has a smaller y. E::each(p, body) gives body the kStep
// values from p, sixteen at a time, in an order of its own.

// A score to beat, in units of logits, rounded down so that screening never loses a token. E::gap is (l - threshold) * slope,
// rounded up likewise: by the logit for float64, by `offset` for the others.
struct Threshold {
    float offset;
    double wide;
    Threshold(double value, float slope) {
        wide = value - (value < 0 ? -value : value) * 0x1p-50;
        double scaled = -value * static_cast<double>(slope);
        offset = static_cast<float>(scaled + (scaled < 0 ? -scaled : scaled) * 0x1p-22) + 1e-37f;
        // Nothing to beat, or out of a float's range: screen nothing out.
        if (!(wide > -kInf) || !(offset > -0x1p120f)) offset = kInfF;
    }
};

template <typename Raw> struct Float32Like {
    using raw = Raw;
    using value = float;
    static DRIFTMAX_INLINE f32x16 scaled(f32x16 l, const Scale& s) { return fma(l, splat(s.c), splat(-s.reference)); }
    static float scaled(double l, const Scale& s) {
        float f = static_cast<float>(l), lanes[16];
        if (f > l) f = std::nextafter(f, -kInfF);
        store16(lanes, scaled(splat(f), s));
        return lanes[0];
    }
    static DRIFTMAX_INLINE f32x16 gap(f32x16 l, const Threshold& t, float slope) { return fma(l, splat(slope), splat(t.offset)); }
    static DRIFTMAX_INLINE f32x16 narrow(f32x16 l) { return l; }
};

struct F32 : Float32Like<float> {
    static constexpr int64_t kStep = 16;
    static DRIFTMAX_INLINE f32x16 load(const float* p) { return load16(p); }
    template <typename Body> static DRIFTMAX_INLINE void each(const float* p, Body&& body) { body(load(p)); }
    static float get(const float* p) { return *p; }
};

template <bool half> struct Half : Float32Like<uint16_t> {
    static constexpr int64_t kStep = 32;
    static DRIFTMAX_INLINE f32x16 load(const uint16_t* p) { return load_half16(p, half); }
    template <typename Body> static DRIFTMAX_INLINE void each(const uint16_t* p, Body&& body) {
        if constexpr (half) {
            body(load(p));
            body(load(p + 16));
        } else {  // two operations for 32 values instead of four
            i16x32 raw = load32(p);
            body(even_bf16(raw));
            body(odd_bf16(raw));
        }
    }
    static float get(const uint16_t* p) {
        if (!half) return bit_cast_to<float>(static_cast<uint32_t>(*p) << 16);
        uint32_t magnitude = *p & 0x7fffu;
        float v = bit_cast_to<float>(magnitude << 13) * 0x1p112f;
        uint32_t bits = bit_cast_to<uint32_t>(v) | (magnitude > 0x7bffu ? 0x7f800000u : 0u);
        return bit_cast_to<float>(bits | static_cast<uint32_t>(*p & 0x8000u) << 16);
    }
};
using F16 = Half<true>;
using BF16 = Half<false>;

struct F64 {
    using raw = double;
    using value = double;
    static constexpr int64_t kStep = 16;
    static DRIFTMAX_INLINE f64x16 load(const double* p) { return load16(p); }
    template <typename Body> static DRIFTMAX_INLINE void each(const double* p, Body&& body) { body(load(p)); }
    static double get(const double* p) { return *p; }
    static DRIFTMAX_INLINE f32x16 scaled(const f64x16& l, const Scale& s) { return narrow16(l, s.wide, s.reference); }
    static float scaled(double l, const Scale& s) { return static_cast<float>(l * s.wide - s.reference); }
    static DRIFTMAX_INLINE f32x16 gap(const f64x16& l, const Threshold& t, float slope) {
        return narrow16(l, 1.0, t.wide) * splat(slope);
    }
    static DRIFTMAX_INLINE f32x16 narrow(const f64x16& l) { return narrow16(l, 1.0, 0.0); }
};

template <typename E> constexpr typename E::raw minus_infinity() {
    if constexpr (sizeof(typename E::raw) == 2) return std::is_same_v<E, F16> ? 0xfc00u : 0xff80u;
    else return -std::numeric_limits<typename E::raw>::infinity();
}

// Sixteen values from p, of which n exist; the rest read as -inf.
template <typename E> DRIFTMAX_INLINE auto load_part(const typename E::raw* p, int64_t n) {
    typename E::raw part[16];
    for (int64_t j = 0; j < 16; ++j) part[j] = j < n ? p[j] : minus_infinity<E>();
    return E::load(part);
}

// The kept set of top-k, top-p and min-p: values above tau, and those equal to it up to the index `last`.
struct Kept {
    static constexpr int64_t no_last = std::numeric_limits<int64_t>::max();
    double tau = -kInf;
    int64_t last = no_last;
    bool operator()(double value, int64_t index) const { return value > tau || (value == tau && index <= last); }
    bool all() const { return tau == -kInf; }
    // The intersection of two such sets is one of the two.
    void intersect(const Kept& other) {
        if (other.tau > tau || (other.tau == tau && other.last < last)) *this = other;
    }
};

template <typename Body> auto with_element(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::f64: return body(F64{});
        case DType::f16: return body(F16{});
        case DType::bf16: return body(BF16{});
        default: return body(F32{});
    }
}

// Row of draw i.
template <typename E> const typename E::raw* row_of(const Logits& l, int64_t i) {
    return static_cast<const typename E::raw*>(l.data) + (i / l.n1) * l.s0 + (i % l.n1) * l.s1;
}

DRIFTMAX_END
