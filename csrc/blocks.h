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
// one turn after another, costs more than the arithmetic; for the same reason coefficients stay in memory, where the compiler
// does not see them. Elsewhere registers are plenty, or a step is long.
#if DRIFTMAX_AVX2
constexpr int kTogether = 1;
DRIFTMAX_INLINE const Exp2Table& exp2_table() { return *opaque(&kExp2ToScale); }
#else
constexpr int kTogether = kRegs;
DRIFTMAX_INLINE const Exp2Table& exp2_table() { return kExp2ToScale; }
#endif

// A y below it, in octaves, is raised to it, so that -inf and everything far below give (almost) nothing: a block's largest is
// above -kFar, or the block is summed with a reference of its own.
constexpr float kLowest = -125.0f;

struct Sums {
    f32x16 sum, weighted, top;
};

// `whole`: tops as well, and a y that may have to be raised.
template <bool weighted, bool whole> DRIFTMAX_INLINE void accumulate(Sums& s, f32x16 y) {
    for (int first = 0; first < kRegs; first += kTogether) {
        reg power[kTogether], rest[kTogether], p[kTogether];
        for (int k = 0; k < kTogether; ++k) {
            if constexpr (whole) {
                s.top.r[first + k] = p_max(s.top.r[first + k], y.r[first + k]);
                y.r[first + k] = p_max(p_set(kLowest), y.r[first + k]);  // keeps NaN
            }
            split_nearest(y.r[first + k], power[k], rest[k]);
        }
        exp2_poly(rest, p, kExp2ToScale.row[0][0], exp2_table());
        for (int k = 0; k < kTogether; ++k) {
            reg &sum = s.sum.r[first + k], &moment = s.weighted.r[first + k];
            if constexpr (weighted) {
                reg e = p_scale(p[k], power[k]);
                sum = p_add(sum, e);
                moment = p_fma(y.r[first + k], e, moment);
            } else {
                sum = p_add_scaled(p[k], power[k], sum);
            }
        }
    }
}

// How many blocks are summed side by side, and how many blocks apart: in pages of their own, since the hardware's prefetcher
// maintains one stream a page (Intel's optimization manual) and stops at its end. Their sums need the registers of AVX-512.
#if DRIFTMAX_AVX512
template <typename E> constexpr int kAbreast = sizeof(typename E::raw) == 2 ? 2 : 6;
#else
template <typename E> constexpr int kAbreast = 1;
#endif
template <typename E> constexpr int kApart = sizeof(typename E::raw) == 2 ? 2 : 1;

// What 16-bit logits span, by their bits as integers, of which an operation takes 32. They are a sign and a magnitude: among
// themselves negative values are in reverse.
struct Span {
    i16x32 most = splat16(-32768);  // as signed numbers: of a lane with a value from zero up its largest
    i16x32 far = splat16(0);        // as unsigned numbers: of a lane with a value below zero its smallest

    DRIFTMAX_INLINE void add(const uint16_t* p) {
        i16x32 raw = load32(p);
        most = max_signed(most, raw);
        far = max_unsigned(far, raw);
    }
};

template <typename E, typename Body> DRIFTMAX_INLINE void each_lane(const i16x32& raw, Body&& body) {
    alignas(64) uint16_t lanes[32];
    store32(lanes, raw);
    E::each(lanes, body);
}

// Lanes' largest values of p[0, n), n a multiple of 32, where lanes of `most` without a value from zero up do not hold them.
inline i16x32 most_of(const uint16_t* p, int64_t n, const i16x32& most) {
    alignas(64) int16_t lanes[32], below[32];
    i16x32 least = splat16(32767);
    for (int64_t i = 0; i < n; i += 32) least = min_signed(least, load32(p + i));
    store32(reinterpret_cast<uint16_t*>(lanes), most);
    store32(reinterpret_cast<uint16_t*>(below), least);
    for (int k = 0; k < 32; ++k) lanes[k] = lanes[k] < 0 ? below[k] : lanes[k];
    return load32(reinterpret_cast<const uint16_t*>(lanes));
}

// Tops of blocks. False if a y of theirs must be raised.
template <typename E, int blocks>
bool find_tops(const uint16_t* p, int64_t n, const Scale& scale, Span (&span)[blocks], Sums (&total)[blocks]) {
    Span all = span[0];
    for (int b = 1; b < blocks; ++b) all = {min_signed(all.most, span[b].most), max_unsigned(all.far, span[b].far)};
    bool within = true;
    i16x32 smallest = min_signed(all.far, splat16(0));  // a lane without a value below zero has none below 0
    each_lane<E>(smallest, [&](const f32x16& l) { within = within && ge(E::scaled(l, scale), splat(kLowest)) == 0xffffu; });
    if (!within) return false;
    const bool below = any_negative(all.most);
    for (int b = 0; b < blocks; ++b) {
        if (below) span[b].most = most_of(p + b * kApart<E> * kBlock, n, span[b].most);
        each_lane<E>(span[b].most, [&](const f32x16& l) { total[b].top = max(total[b].top, E::scaled(l, scale)); });
    }
    return true;
}

// Of `blocks` blocks of n elements, kApart<E> apart. Sums of 256 elements are added up apart, so that
// rounding grows with 16 + 4 terms a lane instead of 64. False if a y had to be raised and was not, the sums not being `whole`.
template <typename E, bool weighted, bool whole, int blocks>
bool sum_blocks(const typename E::raw* p, int64_t n, const Scale& scale, Sums (&total)[blocks]) {
    constexpr int64_t near = blocks > 1 ? 512 : 1024;
    constexpr int64_t far = blocks > 1 ? blocks * kApart<E> * kBlock * static_cast<int64_t>(sizeof *p) : 8192;
    constexpr int64_t line = 64 / sizeof *p;  // elements
    for (Sums& t : total) t = {splat(0), splat(0), splat(-kInfF)};
    auto add = [&](int b, const Sums& s) {
        total[b].sum = total[b].sum + s.sum;
        total[b].weighted = total[b].weighted + s.weighted;
        total[b].top = s.top;
    };
    [[maybe_unused]] Span span[whole ? 1 : blocks];
    int64_t i = 0;
    for (; i + 256 <= n; i += 256) {
        Sums s[blocks];
        for (int b = 0; b < blocks; ++b) s[b] = {splat(0), splat(0), total[b].top};
        for (int64_t j = i; j < i + 256; j += E::kStep)
            for (int b = 0; b < blocks; ++b) {
                const typename E::raw* q = p + b * kApart<E> * kBlock + j;
                for (int64_t k = 0; k < E::kStep; k += line) {
                    const char* ahead = reinterpret_cast<const char*>(q + k);
                    __builtin_prefetch(ahead + near);
                    __builtin_prefetch(ahead + far, 0, 2);  // over the page's end, where the hardware's prefetcher stops
                }
                if constexpr (!whole) span[b].add(q);
                E::each(q, [&](const auto& l) { accumulate<weighted, whole>(s[b], E::scaled(l, scale)); });
            }
        for (int b = 0; b < blocks; ++b) add(b, s[b]);
    }
    if constexpr (!whole)
        if (!find_tops<E>(p, i, scale, span, total)) return false;
    if (i < n) {
        Sums s{splat(0), splat(0), total[0].top};
        for (; i + 16 <= n; i += 16) accumulate<weighted, true>(s, E::scaled(E::load(p + i), scale));
        if (i < n) accumulate<weighted, true>(s, E::scaled(load_part<E>(p + i, n - i), scale));
        add(0, s);
    }
    return true;
}

// n < kBlock for a single block only. `low`: has a y been met that must be raised?
template <typename E, bool weighted, int blocks>
void block_sums(const typename E::raw* p, int64_t n, const Scale& scale, Sums (&total)[blocks], bool& low) {
    if constexpr (sizeof(typename E::raw) == 2)
        if (!low && n >= 256) {
            if (sum_blocks<E, weighted, false>(p, n, scale, total)) return;
            low = true;
        }
    sum_blocks<E, weighted, true>(p, n, scale, total);
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

// Without `weighted` (a fifth of the arithmetic) that sum is 0, or NaN where the other one is not finite.
template <typename E, bool weighted, int blocks = 1>
void scan_blocks(const typename E::raw* p, int64_t n, const Scale& scale, Block* out, float* lane_tops, bool& low) {
    Sums sums[blocks];
    block_sums<E, weighted>(p, n, scale, sums, low);
    auto weighted_sum = [](const Sums& s) { return weighted ? sum16(s.weighted) : sum16(s.sum) - sum16(s.sum); };
    for (int k = 0; k < blocks; ++k) {
        const Sums& s = sums[k];
        Block& b = out[k * kApart<E>];
        b = {sum16(s.sum), weighted_sum(s), max16(s.top), scale.reference};
        if (lane_tops) store16(lane_tops + 16 * k * kApart<E>, s.top);
        if (b.top == -kInfF && b.weighted == b.weighted) b.sum = b.weighted = 0.0f;
        else if ((b.top > kFar || b.top < -kFar) && b.top < kInfF) {
            Scale own = scale;
            own.reference = b.reference = scale.reference + std::nearbyint(b.top);
            Sums again[1];
            block_sums<E, weighted>(p + k * kApart<E> * kBlock, n, own, again, low);
            b.sum = sum16(again[0].sum);
            b.weighted = weighted_sum(again[0]);
            // So far away that floats step over the block's top: no sum holds it. Beside a top that is nearer it weighs nothing.
            if (!(std::fabs(max16(again[0].top)) <= -kLowest))
                b.sum = b.weighted = check_values<E>(p + k * kApart<E> * kBlock, n) == kNaN ? kNaNF : kInfF;
        }
    }
}

template <typename E, bool weighted> void scan_range(const typename E::raw* row, int64_t vocab, const Scan& scan, int64_t b,
                                                     int64_t end) {
    auto tops = [&](int64_t at) { return scan.lane_tops ? scan.lane_tops + 16 * at : nullptr; };
    bool low = false;
    constexpr int abreast = kAbreast<E>, apart = kApart<E>, group = abreast * apart;
    if constexpr (abreast > 1)
        for (; b + group <= end && (b + group) * kBlock <= vocab; b += group)
            for (int64_t k = b; k < b + apart; ++k)
                scan_blocks<E, weighted, abreast>(row + k * kBlock, kBlock, scan.scale, scan.blocks + k, tops(k), low);
    for (; b < end; ++b)
        scan_blocks<E, weighted>(row + b * kBlock, std::min(kBlock, vocab - b * kBlock), scan.scale, scan.blocks + b, tops(b),
                                 low);
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

DRIFTMAX_END
