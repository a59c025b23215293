// Exact top-k, top-p and min-p without sorting the row: block maxima bound the threshold, the few tokens above the bound
// are collected, and a (weighted) selection among them finds the last kept one.
#pragma once

#include <algorithm>
#include <vector>

#include "blocks.h"

DRIFTMAX_BEGIN

template <typename Value> struct Candidate {
    Value value;
    float weight;  // 2^(y - reference)
    uint32_t index;
    // The order of the definition: larger first, ties by lower index.
    bool operator<(const Candidate& other) const {
        return value > other.value || (value == other.value && index < other.index);
    }
};

template <typename E> class Filter {
public:
    using Value = typename E::value;
    using Item = Candidate<Value>;

    // `scan` needs lane_tops where top_k is used.
    Filter(const typename E::raw* row, int64_t vocab, double temperature, const Scan& scan)
        : row_(row), vocab_(vocab), temperature_(temperature), scan_(scan), total_(total_of(scan)),
          items_(static_cast<Item*>(scratch(2, static_cast<size_t>(vocab) * sizeof(Item)))) {}

    // The definition itself, by sorting in double: for rows whose y overflow a float.
    static Kept sorted(const typename E::raw* row, int64_t vocab, double temperature, int64_t top_k, double top_p, double min_p) {
        std::vector<Candidate<double>> all;
        for (int64_t i = 0; i < vocab; ++i) {
            double v = static_cast<double>(E::get(row + i));
            if (v > -kInf) all.push_back({v, 0.0f, static_cast<uint32_t>(i)});
        }
        std::sort(all.begin(), all.end());
        size_t count = all.size();
        if (top_k > 0) count = std::min(count, static_cast<size_t>(top_k));
        auto weight = [&](size_t i) { return std::exp((all[i].value - all[0].value) / temperature); };
        if (top_p < 1.0) {
            double mass = 0, seen = 0;
            for (size_t i = 0; i < count; ++i) mass += weight(i);
            for (size_t i = 0; i < count; ++i) {
                seen += weight(i);
                if (seen >= top_p * mass) count = i + 1;
            }
        }
        Kept kept;
        if (count > 0 && count < all.size()) kept = {all[count - 1].value, all[count - 1].index};
        if (count > 0 && min_p > 0.0) kept.intersect({all[0].value + temperature * std::log(min_p), kept.no_last});
        return kept;
    }

    Kept find(int64_t top_k, double top_p, double min_p) {
        Kept kept;
        double mass = total_.sum * pow2(total_.reference - weight_reference());
        bool narrowed = top_k > 0 && top_k < vocab_;
        if (narrowed) {
            keep_top_k(top_k, kept);
            mass = sum(0, count_);
        }
        if (top_p < 1.0) {
            if (!narrowed) collect_mass(top_p * mass);
            keep_top_p(top_p * mass, kept);
        }
        if (min_p > 0.0) {
            kept.intersect({maximum() + temperature_ * std::log(min_p), kept.no_last});
        }
        return kept;
    }

private:
    float weight_reference() const { return scan_.scale.reference + std::nearbyint(total_.top); }

    // Tokens whose y (relative to the row's reference) is at least `cutoff`, with their weights.
    void collect(float cutoff) {
        count_ = 0;
        const f32x16 shift = splat(-std::nearbyint(total_.top));
        for (int64_t b = 0; b < scan_.count; ++b) {
            if (!(scan_.blocks[b].top >= cutoff)) continue;
            int64_t stop = (b + 1) * kBlock < vocab_ ? (b + 1) * kBlock : vocab_;
            for (int64_t i = b * kBlock; i < stop; i += 16) {
                bool whole = stop - i >= 16;
                f32x16 y = E::scaled(whole ? E::load(row_ + i) : load_part<E>(row_ + i, stop - i), scan_.scale);
                uint32_t take = ge(y, splat(cutoff)) & (whole ? 0xffffu : (1u << (stop - i)) - 1u);
                if (!take) continue;
                float weight[16];
                store16(weight, exp2_16(max(splat(-126.0f), y + shift)));
                for (; take; take &= take - 1) {
                    int64_t j = __builtin_ctz(take);
                    Value v = E::get(row_ + i + j);
                    if (v > -std::numeric_limits<Value>::infinity())
                        items_[count_++] = {v, weight[j], static_cast<uint32_t>(i + j)};
                }
            }
        }
    }

    double sum(int64_t begin, int64_t end) const {
        double s = 0;
        for (int64_t i = begin; i < end; ++i) s += static_cast<double>(items_[i].weight);
        return s;
    }

    static void cut_after(const Item& last, Kept& kept) {
        kept.intersect({static_cast<double>(last.value), last.index});
    }

    // At least k tokens are not below the k-th largest lane maximum. Leaves the kept ones in items_.
    void keep_top_k(int64_t k, Kept& kept) {
        int64_t lanes = scan_.count * 16;
        float cutoff = -0x1.fffffep127f;
        if (k <= lanes) {
            float* tops = static_cast<float*>(scratch(3, static_cast<size_t>(lanes) * sizeof(float)));
            std::copy(scan_.lane_tops, scan_.lane_tops + lanes, tops);
            std::nth_element(tops, tops + (k - 1), tops + lanes, [](float a, float b) { return a > b; });
            cutoff = std::max(cutoff, tops[k - 1]);
        }
        collect(cutoff);
        if (count_ >= k) {  // also where they are exactly k: the last kept one has to be in its place
            std::nth_element(items_, items_ + (k - 1), items_ + count_);
            count_ = k;
        }
        if (count_ == k) cut_after(items_[k - 1], kept);
    }

    // Lower the cutoff until what lies above it surely holds the mass.
    void collect_mass(double target) {
        for (float depth = 3.0f;; depth *= 2.0f) {
            collect(depth < 150.0f ? total_.top - depth : -0x1.fffffep127f);
            if (depth >= 150.0f || sum(0, count_) >= target * (1.0 + 0x1p-18)) return;
        }
    }

    // Weighted selection: the shortest prefix, in order, with at least the target mass.
    void keep_top_p(double target, Kept& kept) {
        int64_t lo = 0, hi = count_;
        double before = 0.0;
        while (hi - lo > 32) {
            int64_t mid = lo + (hi - lo) / 2;
            std::nth_element(items_ + lo, items_ + mid, items_ + hi);
            double left = sum(lo, mid);
            if (before + left >= target) {
                hi = mid;
            } else {
                before += left;
                lo = mid;
            }
        }
        std::sort(items_ + lo, items_ + hi);
        for (int64_t i = lo; i < hi; ++i) {
            before += static_cast<double>(items_[i].weight);
            if (before >= target || i + 1 == count_) return cut_after(items_[i], kept);
        }
    }

    // The row's largest value: y is monotone, so it lies in a block of the largest top.
    double maximum() const {
        Value best = -std::numeric_limits<Value>::infinity();
        for (int64_t b = 0; b < scan_.count; ++b) {
            if (!(scan_.blocks[b].top >= total_.top)) continue;
            int64_t stop = (b + 1) * kBlock < vocab_ ? (b + 1) * kBlock : vocab_;
            for (int64_t i = b * kBlock; i < stop; ++i) best = std::max(best, E::get(row_ + i));
        }
        return static_cast<double>(best);
    }

    const typename E::raw* row_;
    int64_t vocab_;
    double temperature_;
    const Scan& scan_;
    Total total_;
    Item* items_;
    int64_t count_ = 0;
};

DRIFTMAX_END
