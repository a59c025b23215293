// Temperature 0: the lowest index of a row's largest value.
#pragma once

#include "race.h"

DRIFTMAX_BEGIN

// Offers the first of the largest values of p[0, n); `at` is the index of p[0] in the row.
template <typename E> void offer_largest(Best& best, const typename E::raw* p, int64_t n, int64_t at) {
    if constexpr (std::is_same_v<typename E::value, float>) {
        constexpr float lowest = std::numeric_limits<float>::lowest();
        f32x16 top = splat(lowest), bad = splat(0);
        auto add = [&](f32x16 l) {
            f32x16 kept = max(splat(lowest), l);  // keeps NaN
            bad = fma(kept, splat(0), bad);       // NaN where one is NaN or +inf
            top = max(top, kept);
        };
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) add(E::load(p + i));
        if (i < n) add(load_part<E>(p + i, n - i));
        if (float sum = sum16(bad); sum != sum && best.code != kNaN) best.code = check_values<E>(p, n);
        const float largest = max16(top);
        if (best.token >= 0 && !(static_cast<double>(largest) > best.score)) return;
        for (i = 0; i < n; i += 16)
            if (uint32_t found = ge(n - i >= 16 ? E::load(p + i) : load_part<E>(p + i, n - i), splat(largest))) {
                best = {static_cast<double>(largest), at + i + __builtin_ctz(found), best.code};
                return;
            }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            double v = E::get(p + i);
            if (v != v) best.code = kNaN;
            else if (v == kInf && best.code == kOk) best.code = kInfinite;
            if (v > best.score) best = {v, at + i, best.code};
        }
    }
}

template <typename E> Best greedy(const typename E::raw* row, int64_t vocab) {
    Best best;
    for (int64_t i = 0; i < vocab; i += kBlock) offer_largest<E>(best, row + i, std::min(kBlock, vocab - i), i);
    return best;
}

// Of a row whose scan met nothing but finite values and -inf, and `top` as the largest of its tops: y is monotone, so that a block
// of that top has the token.
template <typename E> Best greedy(const typename E::raw* row, int64_t vocab, const Scan& scan, float top) {
    Best best;
    for (int64_t b = 0; b < scan.count; ++b)
        if (scan.blocks[b].top == top) offer_largest<E>(best, row + b * kBlock, std::min(kBlock, vocab - b * kBlock), b * kBlock);
    return best;
}

DRIFTMAX_END
