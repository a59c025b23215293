// The by-products: log-probability of the token, log Z, entropy, top-2 margin.
#pragma once

#include <algorithm>

#include "blocks.h"

DRIFTMAX_BEGIN

struct Stats {
    double log_prob = 0, log_z = 0, entropy = 0, margin = 0;
};

template <typename F> void store_stats(F* out, int64_t stride, int64_t i, const Stats& s) {
    out[i] = static_cast<F>(s.log_prob);
    out[i + stride] = static_cast<F>(s.log_z);
    out[i + 2 * stride] = static_cast<F>(s.entropy);
    out[i + 3 * stride] = static_cast<F>(s.margin);
}

struct TopTwo {
    double first = -kInf, second = -kInf;
    void offer(double v) {
        if (v > first) {
            second = first;
            first = v;
        } else if (v > second) {
            second = v;
        }
    }
};

// Of values without NaN.
template <typename E> TopTwo top_two(const typename E::raw* p, int64_t n) {
    TopTwo t;
    if constexpr (std::is_same_v<typename E::value, float>) {
        constexpr int chains = 2;
        f32x16 first[chains], second[chains];
        for (int k = 0; k < chains; ++k) first[k] = second[k] = splat(-kInfF);
        auto add = [&](int k, f32x16 l) {
            second[k] = max(second[k], min(first[k], l));
            first[k] = max(first[k], l);
        };
        int64_t i = 0;
        for (; i + 16 * chains <= n; i += 16 * chains)
            for (int k = 0; k < chains; ++k) add(k, E::load(p + i + 16 * k));
        for (; i < n; i += 16) add(0, n - i >= 16 ? E::load(p + i) : load_part<E>(p + i, n - i));
        add(0, first[1]);
        second[0] = max(second[0], second[1]);
        const float top = max16(first[0]);
        // Of the lane that holds the largest value its second counts, of the others their first.
        alignas(64) float firsts[16], seconds[16];
        store16(firsts, first[0]);
        store16(seconds, second[0]);
        const uint32_t at = ge(first[0], splat(top));
        if (at) firsts[__builtin_ctz(at)] = seconds[__builtin_ctz(at)];
        t.first = static_cast<double>(top);
        t.second = static_cast<double>(max16(load16(firsts)));
    } else {
        for (int64_t i = 0; i < n; ++i) t.offer(E::get(p + i));
    }
    return t;
}

// The two largest values of the row: they lie in the two blocks of largest top (equal tops may hide a better block only
// within the rounding of y).
template <typename E> TopTwo row_top_two(const typename E::raw* row, int64_t vocab, const Scan& scan, const Total& total) {
    const int64_t first = scan.with_top(total.top), second = scan.with_top(total.second, first);
    TopTwo best;
    for (int64_t b : {first, second}) {
        if (b < 0) continue;
        TopTwo t = top_two<E>(row + b * kBlock, std::min(kBlock, vocab - b * kBlock));
        best.offer(t.first);
        best.offer(t.second);
    }
    return best;
}

// From sums relative to some 2^reference; top_y is y of top.first as those sums saw it. Only its difference from log2(sum) enters,
// so that neither the rounded scale of y nor a far reference shows in log Z - top / T (small temperatures).
inline Stats make_stats(double chosen, const TopTwo& top, double temperature, double top_y, double sum, double weighted) {
    Stats s;
    double log2_sum = log_pos(sum) * kLog2e;
    double relative = std::max(0.0, kLn2 * (log2_sum - top_y));  // log Z - top / T
    s.log_z = top.first / temperature + relative;
    s.log_prob = std::min(0.0, (chosen - top.first) / temperature - relative);
    s.entropy = std::max(0.0, kLn2 * (log2_sum - weighted / sum));
    s.margin = top.second == -kInf ? 1.0 : std::exp(-relative) * -std::expm1((top.second - top.first) / temperature);
    return s;
}

// Sums over the kept tokens of a scanned row. y is monotone: above y of the threshold a token is kept, below it is not, and on
// it the value and the index decide.
template <typename E> struct KeptSums {
    float top;  // the sums are relative to this y
    double sum = 0, weighted = 0, count = 0;

    KeptSums(const typename E::raw* row, int64_t vocab, const Scan& scan, const Total& total, const Kept& kept, float cutoff) {
        top = std::nearbyint(total.top);
        const float above = std::nextafter(cutoff, kInfF);
        for (int64_t b = 0; b < scan.count; ++b)
            if (scan.blocks[b].top >= cutoff)
                add(row, b * kBlock, std::min(vocab, (b + 1) * kBlock), scan.scale, kept, cutoff, above);
    }

private:
    void add(const typename E::raw* row, int64_t begin, int64_t end, const Scale& scale, const Kept& kept, float cutoff,
             float above) {
        f32x16 s = splat(0), w = splat(0), n = splat(0);
        for (int64_t i = begin; i < end; i += 16) {
            f32x16 y = E::scaled(end - i >= 16 ? E::load(row + i) : load_part<E>(row + i, end - i), scale);
            f32x16 shifted = max(splat(-126.0f), y - splat(top)), e = exp2_16(shifted), in = keep_ge(e, y, splat(above));
            s = s + in;
            w = fma(shifted, in, w);
            n = n + keep_ge(splat(1.0f), y, splat(above));
            uint32_t on = ge(y, splat(cutoff)) & ~ge(y, splat(above));
            for (; on; on &= on - 1) {
                int64_t j = i + __builtin_ctz(on);
                if (!kept(static_cast<double>(E::get(row + j)), j)) continue;
                float weights[16], ys[16];
                store16(weights, e);
                store16(ys, shifted);
                sum += static_cast<double>(weights[j - i]);
                weighted += static_cast<double>(weights[j - i]) * ys[j - i];
                count += 1;
            }
        }
        sum += static_cast<double>(sum16(s));
        weighted += static_cast<double>(sum16(w));
        count += static_cast<double>(sum16(n));
    }
};

template <typename E>
Stats kept_stats(const typename E::raw* row, int64_t vocab, double temperature, const Kept& kept, const Scan& scan,
                 const Total& total, float cutoff, double chosen) {
    KeptSums<E> sums(row, vocab, scan, total, kept, cutoff);
    TopTwo top = row_top_two<E>(row, vocab, scan, total);
    if (sums.count < 1.5) top.second = -kInf;
    return make_stats(chosen, top, temperature, E::scaled(top.first, scan.scale) - sums.top, sums.sum, sums.weighted);
}

// The same in double over the whole row, for rows whose y overflow.
template <typename E>
Stats careful_stats(const typename E::raw* row, int64_t vocab, double temperature, const Kept& kept, double chosen) {
    TopTwo top;
    auto visit = [&](auto&& body) {
        for (int64_t i = 0; i < vocab; ++i) {
            double v = static_cast<double>(E::get(row + i));
            if (v > -kInf && kept(v, i)) body(v);
        }
    };
    visit([&](double v) { top.offer(v); });
    double sum = 0, weighted = 0;
    visit([&](double v) {
        double y = (v - top.first) / temperature, e = std::exp(y);
        sum += e;
        if (e > 0) weighted += y * e;
    });
    Stats s;
    double log_sum = std::log(sum);
    s.log_z = top.first / temperature + log_sum;
    s.log_prob = (chosen - top.first) / temperature - log_sum;
    s.entropy = std::max(0.0, log_sum - weighted / sum);
    s.margin = top.second == -kInf ? 1.0 : -std::expm1((top.second - top.first) / temperature) / sum;
    return s;
}

DRIFTMAX_END
