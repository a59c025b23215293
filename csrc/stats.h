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

template <typename E> TopTwo top_two(const typename E::raw* p, int64_t n) {
    TopTwo t;
    for (int64_t i = 0; i < n; ++i) t.offer(static_cast<double>(E::get(p + i)));
    return t;
}

// The two largest values of the row: they lie in the two blocks of largest top (equal tops may hide a better block only
// within the rounding of y).
template <typename E> TopTwo row_top_two(const typename E::raw* row, int64_t vocab, const Scan& scan) {
    int64_t first = -1, second = -1;
    for (int64_t b = 0; b < scan.count; ++b) {
        if (first < 0 || scan.blocks[b].top > scan.blocks[first].top) {
            second = first;
            first = b;
        } else if (second < 0 || scan.blocks[b].top > scan.blocks[second].top) {
            second = b;
        }
    }
    TopTwo best;
    for (int64_t b : {first, second}) {
        if (b < 0) continue;
        TopTwo t = top_two<E>(row + b * kBlock, std::min(kBlock, vocab - b * kBlock));
        best.offer(t.first);
        best.offer(t.second);
    }
    return best;
}

// From sums relative to 2^reference. The scale of the sums is a rounded log2(e)/T; the tokens that matter lie near the top, so
// shifting log Z by what the rounding does there removes it.
inline Stats make_stats(double chosen, const TopTwo& top, double temperature, double factor, double reference, double sum,
                        double weighted) {
    Stats s;
    double log2_sum = log_pos(sum) * kLog2e;
    double drift = top.first * (kLog2e / temperature - factor);
    s.log_z = kLn2 * (reference + log2_sum + drift);
    double relative = kLn2 * (reference + log2_sum + drift - top.first * (kLog2e / temperature));  // log Z - top / T
    s.log_prob = std::min(0.0, (chosen - top.first) / temperature - relative);
    s.entropy = std::max(0.0, kLn2 * (log2_sum - weighted / sum));
    double p1 = std::min(1.0, std::exp(-relative));
    s.margin = top.second == -kInf ? 1.0 : p1 * -std::expm1((top.second - top.first) / temperature);
    return s;
}

// Sums over the kept tokens alone, in double, for filtered draws and for rows whose y overflow.
template <typename E>
Stats careful_stats(const typename E::raw* row, int64_t vocab, double temperature, const Kept& kept, const Scan* scan,
                    float cutoff, double chosen) {
    TopTwo top;
    auto visit = [&](auto&& body) {
        for (int64_t b = 0; b < blocks_of(vocab); ++b) {
            if (scan && !(scan->blocks[b].top >= cutoff)) continue;
            int64_t stop = std::min(vocab, (b + 1) * kBlock);
            for (int64_t i = b * kBlock; i < stop; ++i) {
                double v = static_cast<double>(E::get(row + i));
                if (v > -kInf && kept(v, i)) body(v);
            }
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
