// One pass over a row: per block of 1024 tokens, the maximum, sum of exponentials and sum of y * exponential.
//
// Every element is loaded once. All tokens of a row are shifted by one reference, taken from its first finite values, so
// that no second pass waits for a maximum; a block more than 60 octaves away from it is redone with its own.
#pragma once

#include <algorithm>

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

    // The first block of that top other than `but`; -1 if there is none.
    int64_t with_top(float top, int64_t but = -1) const {
        for (int64_t b = 0; b < count; ++b)
            if (blocks[b].top == top && b != but) return b;
        return -1;
    }
};

// What the blocks of a row say together.
struct Total {
    float reference = -kInfF;  // base 2 exponent, an integer
    double sum = 0.0;          // of 2^(l * scale - reference)
    double weighted = 0.0;
    // The two largest and the smallest of their tops, relative to the row's reference.
    float top = -kInfF, second = -kInfF, bottom = kInfF;
    bool finite = false;  // false: the sums met what they cannot hold, or nothing
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

// How many blocks are summed side by side. Blocks that lie in several pages keep the hardware's prefetchers, which stop at page
// ends, busy; their sums need the registers of AVX-512.
#if DRIFTMAX_AVX512
constexpr int kAbreast = 6;
#else
constexpr int kAbreast = 1;
#endif

// Of `blocks` blocks of n elements, one after another in memory. Sums of 256 elements are added up apart, so that rounding grows
// with 16 + 4 terms a lane instead of 64.
template <typename E, bool weighted, int blocks, typename Form>
DRIFTMAX_INLINE void form_sums(const typename E::raw* p, int64_t n, const Form& form, Sums (&total)[blocks]) {
    constexpr int64_t near = blocks > 1 ? 512 : 1024;
    constexpr int64_t far = blocks > 1 ? blocks * kBlock * static_cast<int64_t>(sizeof *p) : 8192;
    constexpr int64_t line = 64 / sizeof *p;  // elements
    for (Sums& t : total) t = {splat(0), splat(0), splat(-kInfF)};
    auto add = [&](int b, const Sums& s) {
        total[b].sum = total[b].sum + s.sum;
        total[b].weighted = total[b].weighted + s.weighted;
        total[b].top = s.top;
    };
    int64_t i = 0;
    for (; i + 256 <= n; i += 256) {
        Sums s[blocks];
        for (int b = 0; b < blocks; ++b) s[b] = {splat(0), splat(0), total[b].top};
        for (int64_t j = i; j < i + 256; j += 16)
            for (int b = 0; b < blocks; ++b) {
                const typename E::raw* q = p + b * kBlock + j;
                for (int64_t k = 0; k < 16; k += line) {
                    const char* ahead = reinterpret_cast<const char*>(q + k);
                    __builtin_prefetch(ahead + near);
                    __builtin_prefetch(ahead + far, 0, 2);  // over the page's end, where the hardware's prefetcher stops
                }
                accumulate<weighted>(s[b], form, form.values(E::load(q)));
            }
        for (int b = 0; b < blocks; ++b) add(b, s[b]);
    }
    if (i < n) {
        Sums s{splat(0), splat(0), total[0].top};
        for (; i + 16 <= n; i += 16) accumulate<weighted>(s, form, form.values(E::load(p + i)));
        if (i < n) accumulate<weighted>(s, form, form.values(load_part<E>(p + i, n - i)));
        add(0, s);
    }
    for (Sums& t : total) t = {t.sum, form.weighted(t.weighted, t.sum), form.top(t.top)};
}

// n < kBlock for a single block only.
template <typename E, bool weighted, int blocks>
void block_sums(const typename E::raw* p, int64_t n, const Scale& scale, Sums (&total)[blocks]) {
    if constexpr (std::is_same_v<typename E::value, float>) {
        NearForm near(scale);
        if (near.usable()) return form_sums<E, weighted>(p, n, near, total);
    }
    form_sums<E, weighted>(p, n, FarForm<E>(scale), total);
}

// Without `weighted` (a fifth of the arithmetic) that sum is 0, or NaN where the other one is not finite.
template <typename E, bool weighted, int blocks = 1>
void scan_blocks(const typename E::raw* p, int64_t n, const Scale& scale, Block* out, float* lane_tops) {
    Sums sums[blocks];
    block_sums<E, weighted>(p, n, scale, sums);
    auto weighted_sum = [](const Sums& s) { return weighted ? sum16(s.weighted) : sum16(s.sum) - sum16(s.sum); };
    for (int k = 0; k < blocks; ++k) {
        const Sums& s = sums[k];
        Block& b = out[k];
        b = {sum16(s.sum), weighted_sum(s), max16(s.top), scale.reference};
        if (lane_tops) store16(lane_tops + 16 * k, s.top);
        if (b.top == -kInfF && b.weighted == b.weighted) b.sum = b.weighted = 0.0f;
        else if ((b.top > kFar || b.top < -kFar) && b.top < kInfF) {
            Scale own = scale;
            own.reference = b.reference = scale.reference + std::nearbyint(b.top);
            Sums again[1];
            block_sums<E, weighted>(p + k * kBlock, n, own, again);
            b.sum = sum16(again[0].sum);
            b.weighted = weighted_sum(again[0]);
        }
    }
}

template <typename E, bool weighted> void scan_range(const typename E::raw* row, int64_t vocab, const Scan& scan, int64_t b,
                                                     int64_t end) {
    auto tops = [&] { return scan.lane_tops ? scan.lane_tops + 16 * b : nullptr; };
    if constexpr (kAbreast > 1)
        for (; b + kAbreast <= end && (b + kAbreast) * kBlock <= vocab; b += kAbreast)
            scan_blocks<E, weighted, kAbreast>(row + b * kBlock, kBlock, scan.scale, scan.blocks + b, tops());
    for (; b < end; ++b)
        scan_blocks<E, weighted>(row + b * kBlock, std::min(kBlock, vocab - b * kBlock), scan.scale, scan.blocks + b, tops());
}

// Scan of a whole row; `threads` > 1 splits it among them.
template <typename E> void scan_row(const typename E::raw* row, int64_t vocab, const Scan& scan, int threads) {
    auto body = [&](int64_t b, int64_t end, int) {
        if (scan.weighted) scan_range<E, true>(row, vocab, scan, b, end);
        else scan_range<E, false>(row, vocab, scan, b, end);
    };
    if (threads <= 1) body(0, scan.count, 0);
    else parallel_for(scan.count, 8, threads, body);
}

// Blocks more than 2^11 octaves below the row's maximum weigh nothing (the noise spans 2^7) and may lie too far for a float.
// True if there were any.
inline bool drop_hopeless(const Scan& scan) {
    bool any = false;
    for (int64_t b = 0; b < scan.count; ++b)
        if (scan.blocks[b].top < -2048.0f && scan.blocks[b].sum > 0.0f) {  // a NaN is for the caller to see
            any = true;
            scan.blocks[b].sum = scan.blocks[b].weighted = 0.0f, scan.blocks[b].reference = scan.scale.reference;
        }
    return any;
}

// 2^k exactly, 0 below the range of double.
inline double pow2(float k) {
    if (k < -1022.0f) return 0.0;
    if (k > 1023.0f) return kInf;
    return bit_cast_to<double>(static_cast<uint64_t>(static_cast<int64_t>(k) + 1023) << 52);
}

inline double block_mass(const Block& b, float reference) { return static_cast<double>(b.sum) * pow2(b.reference - reference); }

// Did the block meet what it cannot handle: NaN, +inf, or finite values whose y overflows, or is so large that a float cannot
// hold its difference from the reference (beyond 2^30 rounding leaves the range of exp2_16)?
inline bool block_is_finite(const Block& x) {
    return x.top < kInfF && x.weighted - x.weighted == 0.0f && x.sum - x.sum == 0.0f && std::fabs(x.reference) < 0x1p29f;
}

// Of blocks that share the row's reference. Chains of additions side by side: one alone would wait for each of its results.
inline void add_near_blocks(Total& t, const Scan& scan) {
    constexpr int chains = 4;
    double sum[chains] = {}, weighted[chains] = {};
    int64_t b = 0;
    for (; b + chains <= scan.count; b += chains)
        for (int k = 0; k < chains; ++k) {
            sum[k] += static_cast<double>(scan.blocks[b + k].sum);
            weighted[k] += static_cast<double>(scan.blocks[b + k].weighted);
        }
    for (; b < scan.count; ++b) {
        sum[0] += static_cast<double>(scan.blocks[b].sum);
        weighted[0] += static_cast<double>(scan.blocks[b].weighted);
    }
    t.sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    t.weighted = (weighted[0] + weighted[1]) + (weighted[2] + weighted[3]);
    t.reference = scan.scale.reference;
    t.finite = t.sum - t.sum == 0.0 && t.weighted - t.weighted == 0.0 && std::fabs(t.reference) < 0x1p29f;
}

// Relative to the largest reference, so that nothing overflows.
inline void add_far_blocks(Total& t, const Scan& scan) {
    t.finite = true;
    for (int64_t b = 0; b < scan.count; ++b) {
        const Block& x = scan.blocks[b];
        t.finite = t.finite && block_is_finite(x);
        if (x.sum > 0 && x.reference > t.reference) t.reference = x.reference;
    }
    for (int64_t b = 0; b < scan.count; ++b) {
        const Block& x = scan.blocks[b];
        if (!(x.sum > 0)) continue;
        double scale = pow2(x.reference - t.reference), gap = static_cast<double>(x.reference) - t.reference;
        t.sum += static_cast<double>(x.sum) * scale;
        t.weighted += (static_cast<double>(x.weighted) + gap * x.sum) * scale;
    }
}

inline Total total_of(const Scan& scan) {
    Total t;
    bool near = true;
    for (int64_t b = 0; b < scan.count; ++b) {
        const Block& x = scan.blocks[b];
        t.second = std::max(t.second, std::min(t.top, x.top));
        t.top = std::max(t.top, x.top);
        t.bottom = std::min(t.bottom, x.top);
        near = near && x.reference == scan.scale.reference;
    }
    if (near) add_near_blocks(t, scan);
    else add_far_blocks(t, scan);
    // Without a top all are -inf, or finite with y below the range of a float.
    t.finite = t.finite && t.top > -kInfF && t.top < kInfF;
    return t;
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
