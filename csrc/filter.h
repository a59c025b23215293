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
    bool operator<(const Candidate& other) const { return value > other.value || (value == other.value && index < other.index); }
};

template <typename E> class Filter {
public:
    using Value = typename E::value;
    using Item = Candidate<Value>;

    // `scan` needs lane_tops where top_k is used.
    Filter(const typename E::raw* row, int64_t vocab, double temperature, const Scan& scan, const Total& total)
        : row_(row),
          vocab_(vocab),
          temperature_(temperature),
          scan_(scan),
          total_(total),
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
            mass = above_.mass + sum(0, count_);
        }
        if (top_p < 1.0) {
            // The order is the same, so the crossing lies within the top k; but they may not all have been collected.
            if (!narrowed || above_.count > 0) collect_around<Measure::mass>(top_p * mass);
            keep_top_p(top_p * mass - above_.mass, kept);
        }
        if (min_p > 0.0) kept.intersect({maximum() + temperature_ * std::log(min_p), kept.no_last});
        return kept;
    }

private:
    enum class Measure { count, mass };
    static constexpr float kLowest = -0x1.fffffep127f;
    static constexpr int kPivots = 4;
    static constexpr int64_t kFew = 4096;  // tokens that are cheaper to select among than to narrow down further

    float weight_reference() const { return scan_.scale.reference + std::nearbyint(total_.top); }

    DRIFTMAX_INLINE f32x16 y_at(int64_t i, int64_t n) const {
        return E::scaled(n >= 16 ? E::load(row_ + i) : load_part<E>(row_ + i, n), scan_.scale);
    }
    DRIFTMAX_INLINE f32x16 weight_of(f32x16 y, f32x16 shift) const { return exp2_16(max(splat(-126.0f), y + shift)); }

    // Calls body(first, end) for the blocks that hold a token with y >= cutoff.
    template <typename Body> void for_blocks(float cutoff, Body&& body) const {
        for (int64_t b = 0; b < scan_.count; ++b)
            if (scan_.blocks[b].top >= cutoff) body(b * kBlock, std::min(vocab_, (b + 1) * kBlock));
    }

    // Tokens with from <= y < below, with their weights, into items_. y is relative to the row's reference.
    void collect(float from, float below) {
        count_ = 0;
        const f32x16 shift = splat(-std::nearbyint(total_.top));
        for_blocks(from, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i += 16) {
                f32x16 y = y_at(i, end - i);
                uint32_t take = ge(y, splat(from)) & ~ge(y, splat(below)) & (end - i >= 16 ? 0xffffu : (1u << (end - i)) - 1u);
                if (!take) continue;
                float weight[16];
                store16(weight, weight_of(y, shift));
                for (; take; take &= take - 1) {
                    int64_t j = __builtin_ctz(take);
                    items_[count_++] = {E::get(row_ + i + j), weight[j], static_cast<uint32_t>(i + j)};
                }
            }
        });
    }

    struct Measured {
        double count[kPivots] = {}, mass[kPivots] = {};
    };

    // How many tokens, and how much weight, lie at or above each pivot. Float sums of 64 terms a lane, then double.
    Measured measure(const float* pivots) const {
        Measured m;
        const f32x16 shift = splat(-std::nearbyint(total_.top)), one = splat(1.0f);
        for_blocks(pivots[kPivots - 1], [&](int64_t begin, int64_t end) {
            f32x16 count[kPivots], mass[kPivots];
            for (int j = 0; j < kPivots; ++j) count[j] = mass[j] = splat(0);
            for (int64_t i = begin; i < end; i += 16) {
                f32x16 y = y_at(i, end - i), e = weight_of(y, shift);
                for (int j = 0; j < kPivots; ++j) {
                    count[j] = count[j] + keep_ge(one, y, splat(pivots[j]));
                    mass[j] = mass[j] + keep_ge(e, y, splat(pivots[j]));
                }
            }
            for (int j = 0; j < kPivots; ++j) {
                m.count[j] += static_cast<double>(sum16(count[j]));
                m.mass[j] += static_cast<double>(sum16(mass[j]));
            }
        });
        return m;
    }

    // Collects the tokens around the one at which `target` is reached; above_ is what lies above them. Rounds of four pivots
    // narrow the range of y until few tokens are left in it (or they are ties).
    template <Measure what> void collect_around(double target) {
        float top = total_.top, from = kLowest, below = kInfF;
        float pivots[kPivots] = {top - 1.5f, top - 4.0f, top - 8.0f, top - 14.0f};
        above_ = {};
        for (int round = 0; round < 8; ++round) {
            Measured m = measure(pivots);
            const double* reached = what == Measure::mass ? m.mass : m.count;
            int j = 0;
            while (j < kPivots && reached[j] < target) ++j;
            double count_to = j < kPivots ? m.count[j] : static_cast<double>(vocab_);
            if (j > 0) {
                below = pivots[j - 1];
                above_ = {m.count[j - 1], m.mass[j - 1]};
            }
            if (j < kPivots) from = pivots[j];
            if (count_to - above_.count <= kFew) break;
            float high = below < kInfF ? below : top + 1.0f;
            float low = from > kLowest ? from : std::max(kLowest, top - 32.0f * static_cast<float>(1 << (2 * round)));
            if (!(low < high)) break;
            for (int i = 0; i < kPivots; ++i) {
                float part = static_cast<float>(i + 1) / (kPivots + 1);
                pivots[i] = std::max(kLowest, high * (1.0f - part) + low * part);  // high - low may overflow
            }
            if (!(pivots[0] < high) || !(pivots[kPivots - 1] > low)) break;
        }
        collect(from, below);
    }

    double sum(int64_t begin, int64_t end) const {
        double s = 0;
        for (int64_t i = begin; i < end; ++i) s += static_cast<double>(items_[i].weight);
        return s;
    }

    static void cut_after(const Item& last, Kept& kept) {
        kept.intersect({static_cast<double>(last.value), static_cast<int64_t>(last.index)});
    }

    // Leaves the last of the kept tokens in items_, and what lies above those in above_. At least k tokens are not below the k-th largest lane maximum.
    void keep_top_k(int64_t k, Kept& kept) {
        int64_t lanes = scan_.count * 16;
        if (k > lanes) {
            collect_around<Measure::count>(static_cast<double>(k));
            k -= static_cast<int64_t>(above_.count);
        } else {
            float* tops = static_cast<float*>(scratch(3, static_cast<size_t>(lanes) * sizeof(float)));
            std::copy(scan_.lane_tops, scan_.lane_tops + lanes, tops);
            std::nth_element(tops, tops + (k - 1), tops + lanes, [](float a, float b) { return a > b; });
            collect(std::max(kLowest, tops[k - 1]), kInfF);
        }
        if (count_ < k) return;
        std::nth_element(items_, items_ + (k - 1), items_ + count_);
        count_ = k;
        cut_after(items_[k - 1], kept);
    }

    // Weighted selection among items_: the shortest prefix, in order, with at least the target mass.
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
            if (before >= target || i + 1 == hi) return cut_after(items_[i], kept);
        }
    }

    // The row's largest value: y is monotone, so it lies in a block of the largest top.
    double maximum() const {
        Value best = -std::numeric_limits<Value>::infinity();
        for_blocks(total_.top, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) best = std::max(best, E::get(row_ + i));
        });
        return static_cast<double>(best);
    }

    const typename E::raw* row_;
    int64_t vocab_;
    double temperature_;
    const Scan& scan_;
    Total total_;
    Item* items_;
    int64_t count_ = 0;
    struct {
        double count = 0, mass = 0;
    } above_;
};

DRIFTMAX_END
