// One pass over a row: per block of 1024 tokens, the maximum, sum of exponentials and sum of y * exponential.
//
// Every element is loaded once. All tokens of a row are shifted by one reference, taken from its first finite values, so
// that no second pass waits for a maximum; a block more than 60 octaves away from it is redone with its own.
#pragma once

#include "elements.h"
#include "parallel.h"

DRIFTMAX_BEGIN

constexpr int64_t kBlock = 1024;
constexpr float kFar = 60.0f;  // octaves from the reference beyond which a block is summed with its own
inline int64_t blocks_of(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

struct Block {
    float sum;        // of 2^(y - (reference - row reference))
    float weighted;   // of y * that, y relative to `reference` as well
    float top;        // max of y relative to the row's reference; -inf where the block is empty
    float reference;  // an integer
};

struct Scan {
    Scale scale;  // its reference is the row's
    Block* blocks;
    float* lane_tops = nullptr;  // [blocks, 16] maxima of the lanes, relative to the row's reference; optional
    int64_t count;
    bool weighted = true;  // are sums of y * exponential wanted?
};

// ln sum, entropy and maximum of the tokens scanned.
struct Total {
    float reference;  // base 2 exponent, an integer
    double sum;       // of 2^(l * scale - reference)
    double weighted;
    float top;  // max y relative to the row's reference
};

template <typename E> float first_finite(const typename E::raw* row, int64_t vocab, const Scale& scale) {
    for (int64_t i = 0; i < vocab; i += 16) {
        f32x16 y = E::scaled(vocab - i >= 16 ? E::load(row + i) : load_part<E>(row + i, vocab - i), scale);
        float top = max16(y);
        if (top > -kInfF) return top;
    }
    return -kInfF;
}

// The row's reference: the integer nearest to y of the first tokens that are not -inf. NaN and infinities give 0: the scan
// finds and reports them.
template <typename E> Scale row_scale(const typename E::raw* row, int64_t vocab, double temperature) {
    Scale scale(temperature);
    float y = first_finite<E>(row, vocab, scale);
    if (y > -0x1p127f && y < 0x1p127f) scale.reference = std::nearbyint(y);
    return scale;
}

// How many registers take each step together. AVX2's sixteen do not hold more of them beside the sums, whose way through memory,
// one turn after another, costs more than the arithmetic; for the same reason the coefficients stay in memory. Elsewhere
// registers are plenty, or a step is long.
#if DRIFTMAX_AVX2
constexpr int kTogether = 1;
#else
constexpr int kTogether = kRegs;
#endif

// A logit's y as n + r, an integer and a rest of at most 1/2, so that its exponential is 2^n * exp2_poly(r).
struct Parts {
    reg power[kTogether];  // 2^n
    reg r[kTogether];
    reg value[kTogether];  // what the weighted sum weighs, raised so that -inf and everything far below give (almost) nothing
};
constexpr float kLowest = -125.0f, kRounder = kMagic + 127.0f;  // y, in octaves

// The usual case: n and r straight from the logit, which is also what the weighted sum weighs. y = l * c - reference enters at a
// block's end only, where a difference of two sums loses what the reference exceeds y by: hence the bound on it.
struct NearForm {
    float c, reference, rounder, lowest;
    explicit NearForm(const Scale& s)
        : c(s.c),
          reference(s.reference),
          rounder(kRounder - s.reference),
          lowest((s.reference + kLowest) / s.c) {}
    bool usable() const { return std::fabs(reference) <= 16.0f && std::fabs(lowest) < 0x1p60f; }
    DRIFTMAX_INLINE f32x16 values(const f32x16& l) const { return l; }
    DRIFTMAX_INLINE Parts operator()(const reg* l) const {
        Parts x;
        reg t[kTogether];
        for (int k = 0; k < kTogether; ++k) x.value[k] = p_max(p_set(lowest), l[k]);  // keeps NaN
        for (int k = 0; k < kTogether; ++k) t[k] = p_fma(x.value[k], p_set(c), p_set(rounder));
        for (int k = 0; k < kTogether; ++k) x.r[k] = p_fma(x.value[k], p_set(c), p_sub(p_set(rounder), t[k]));
        for (int k = 0; k < kTogether; ++k) x.power[k] = power_of(t[k]);
        return x;
    }
    DRIFTMAX_INLINE f32x16 top(f32x16 seen) const { return fma(seen, splat(c), splat(-reference)); }
    DRIFTMAX_INLINE f32x16 weighted(f32x16 seen, f32x16 sum) const { return fma(seen, splat(c), splat(-reference) * sum); }
};

// By way of y, for float64 logits and far references.
template <typename E> struct FarForm {
    Scale scale;
    explicit FarForm(const Scale& s) : scale(s) {}
    template <typename L> DRIFTMAX_INLINE f32x16 values(const L& l) const { return E::scaled(l, scale); }
    DRIFTMAX_INLINE Parts operator()(const reg* y) const {
        Parts x;
        for (int k = 0; k < kTogether; ++k) {
            reg kept = p_max(p_set(kLowest), y[k]), t = p_add(kept, p_set(kRounder));
            x.power[k] = power_of(t);
            x.r[k] = p_add(kept, p_sub(p_set(kRounder), t));
            x.value[k] = kept;
        }
        return x;
    }
    DRIFTMAX_INLINE f32x16 top(f32x16 seen) const { return seen; }
    DRIFTMAX_INLINE f32x16 weighted(f32x16 seen, f32x16) const { return seen; }
};

struct Sums {
    f32x16 sum, weighted, top;  // while they are made, weights and top are of what the form calls values
};

template <bool weighted, typename Form> DRIFTMAX_INLINE void accumulate(Sums& s, const Form& form, const f32x16& values) {
    const float* table = opaque(kExp2.row[0]);
    for (int first = 0; first < kRegs; first += kTogether) {
        for (int k = first; k < first + kTogether; ++k) s.top.r[k] = p_max(s.top.r[k], values.r[k]);
        const Parts x = form(values.r + first);
        reg p[kTogether];
        exp2_poly(x.r, p, table);
        for (int k = 0; k < kTogether; ++k) {
            reg &sum = s.sum.r[first + k], &moment = s.weighted.r[first + k];
            if constexpr (weighted) {
                reg e = p_mul(p[k], x.power[k]);
                sum = p_add(sum, e);
                moment = p_fma(x.value[k], e, moment);
            } else {
                sum = p_add_product(p[k], x.power[k], sum);
            }
        }
    }
}

// Sums of 256 elements are added up apart, so that rounding grows with 16 + 4 terms a lane instead of 64.
template <typename E, bool weighted, typename Form> Sums form_sums(const typename E::raw* p, int64_t n, const Form& form) {
    Sums total{splat(0), splat(0), splat(-kInfF)};
    int64_t i = 0;
    for (; i + 256 <= n; i += 256) {
        Sums s{splat(0), splat(0), total.top};
        for (int64_t j = i; j < i + 256; j += 16) {
            const char* ahead = reinterpret_cast<const char*>(p + j);
            __builtin_prefetch(ahead + 1024);
            __builtin_prefetch(ahead + 8192, 0, 2);  // over the page's end, where the hardware's prefetcher stops
            accumulate<weighted>(s, form, form.values(E::load(p + j)));
        }
        total.sum = total.sum + s.sum;
        total.weighted = total.weighted + s.weighted;
        total.top = s.top;
    }
    Sums s{splat(0), splat(0), total.top};
    for (; i + 16 <= n; i += 16) accumulate<weighted>(s, form, form.values(E::load(p + i)));
    if (i < n) accumulate<weighted>(s, form, form.values(load_part<E>(p + i, n - i)));
    total.sum = total.sum + s.sum;
    return {total.sum, form.weighted(total.weighted + s.weighted, total.sum), form.top(s.top)};
}

template <typename E, bool weighted> Sums block_sums(const typename E::raw* p, int64_t n, const Scale& scale) {
    if constexpr (std::is_same_v<typename E::value, float>) {
        NearForm near(scale);
        if (near.usable()) return form_sums<E, weighted>(p, n, near);
    }
    return form_sums<E, weighted>(p, n, FarForm<E>(scale));
}

// Without `weighted` (a fifth of the arithmetic) that sum is 0, or NaN where the other one is not finite.
template <typename E, bool weighted = true> Block scan_block(const typename E::raw* p, int64_t n, Scale scale, float* lane_tops) {
    Sums s = block_sums<E, weighted>(p, n, scale);
    auto weighted_sum = [&] { return weighted ? sum16(s.weighted) : sum16(s.sum) - sum16(s.sum); };
    Block b{sum16(s.sum), weighted_sum(), max16(s.top), scale.reference};
    if (lane_tops) store16(lane_tops, s.top);
    if (b.top == -kInfF && b.weighted == b.weighted) b.sum = b.weighted = 0.0f;
    else if ((b.top > kFar || b.top < -kFar) && b.top < kInfF) {
        scale.reference = b.reference = scale.reference + std::nearbyint(b.top);
        s = block_sums<E, weighted>(p, n, scale);
        b.sum = sum16(s.sum);
        b.weighted = weighted_sum();
    }
    return b;
}

// Scan of a whole row; `threads` > 1 splits it over the pool.
template <typename E> void scan_row(const typename E::raw* row, int64_t vocab, const Scan& scan, int threads) {
    auto body = [&](int64_t b, int64_t end, int) {
        for (; b < end; ++b) {
            int64_t begin = b * kBlock, n = vocab - begin < kBlock ? vocab - begin : kBlock;
            float* tops = scan.lane_tops ? scan.lane_tops + 16 * b : nullptr;
            scan.blocks[b] = scan.weighted ? scan_block<E, true>(row + begin, n, scan.scale, tops)
                                           : scan_block<E, false>(row + begin, n, scan.scale, tops);
        }
    };
    if (threads <= 1) body(0, scan.count, 0);
    else parallel_for(scan.count, 8, threads, body);
}

inline float top_of(const Scan& scan) {
    float top = -kInfF;
    for (int64_t b = 0; b < scan.count; ++b)
        if (scan.blocks[b].top > top) top = scan.blocks[b].top;
    return top;
}

// Blocks more than 2^11 octaves below the row's maximum weigh nothing (the noise spans 2^7) and may lie too far for a float.
inline void drop_hopeless(const Scan& scan) {
    for (int64_t b = 0; b < scan.count; ++b)
        if (scan.blocks[b].top < -2048.0f &&
            scan.blocks[b].weighted == scan.blocks[b].weighted)  // a NaN is for the caller to see
            scan.blocks[b].sum = scan.blocks[b].weighted = 0.0f, scan.blocks[b].reference = scan.scale.reference;
}

// 2^k exactly, 0 below the range of double.
inline double pow2(float k) {
    if (k < -1022.0f) return 0.0;
    if (k > 1023.0f) return kInf;
    return bit_cast_to<double>(static_cast<uint64_t>(static_cast<int64_t>(k) + 1023) << 52);
}

inline double block_mass(const Block& b, float reference) { return static_cast<double>(b.sum) * pow2(b.reference - reference); }

// Totals relative to the largest reference, so that nothing overflows.
inline Total total_of(const Scan& scan) {
    Total t{-kInfF, 0.0, 0.0, -kInfF};
    for (int64_t b = 0; b < scan.count; ++b) {
        const Block& x = scan.blocks[b];
        if (x.top > t.top) t.top = x.top;
        if (x.sum > 0 && x.reference > t.reference) t.reference = x.reference;
    }
    for (int64_t b = 0; b < scan.count; ++b) {
        const Block& x = scan.blocks[b];
        if (!(x.sum > 0)) continue;
        double scale = pow2(x.reference - t.reference), gap = static_cast<double>(x.reference) - t.reference;
        t.sum += static_cast<double>(x.sum) * scale;
        t.weighted += (static_cast<double>(x.weighted) + gap * x.sum) * scale;
    }
    return t;
}

// Did the block meet what it cannot handle: NaN, +inf, or finite values whose y overflows, or is so large that a float cannot
// hold its difference from the reference (beyond 2^30 rounding leaves the range of exp2_16)?
inline bool block_is_finite(const Block& x) {
    return x.top < kInfF && x.weighted - x.weighted == 0.0f && x.sum - x.sum == 0.0f && std::fabs(x.reference) < 0x1p29f;
}

inline bool scan_is_finite(const Scan& scan) {
    bool any = false;  // none: all are -inf, or finite with y below the range of a float
    for (int64_t b = 0; b < scan.count; ++b) {
        if (!block_is_finite(scan.blocks[b])) return false;
        any = any || scan.blocks[b].top > -kInfF;
    }
    return any;
}

// NaN or +inf in the row itself; NaN goes first.
template <typename E> StatusCode check_values(const typename E::raw* row, int64_t vocab) {
    StatusCode code = kOk;
    for (int64_t i = 0; i < vocab; ++i) {
        auto v = E::get(row + i);
        if (v != v) return kNaN;
        if (v == std::numeric_limits<typename E::value>::infinity()) code = kInfinite;
    }
    return code;
}

DRIFTMAX_END
