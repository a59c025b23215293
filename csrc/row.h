// What the row samplers share: the scan of a row, its kept set, and where neither can hold a kept token.
#pragma once

#include "filter.h"

DRIFTMAX_BEGIN

template <typename E> struct RowContext {
    const typename E::raw* row;
    int64_t vocab;
    int threads;
    Kept kept{};
    bool scanned = false;
    Scan scan{Scale(1.0), nullptr, nullptr, 0};

    // Fills `scan`; `weighted` where its by-products will be asked for. Where y overflows for finite logits `scanned` stays false: then the careful paths serve.
    StatusCode make_scan(double temperature, bool lanes, bool weighted = true) {
        int64_t count = blocks_of(vocab);
        char* memory = static_cast<char*>(scratch(0, static_cast<size_t>(count) * (sizeof(Block) + 16 * sizeof(float))));
        scan = {row_scale<E>(row, vocab, temperature), reinterpret_cast<Block*>(memory), nullptr, count};
        scan.weighted = weighted;
        if (lanes) scan.lane_tops = reinterpret_cast<float*>(memory + static_cast<size_t>(count) * sizeof(Block));
        scan_row<E>(row, vocab, scan, threads);
        scanned = scan_is_finite(scan);
        return scanned ? kOk : check_values<E>(row, vocab);
    }

    StatusCode make_kept(double temperature, int64_t top_k, double top_p, double min_p, bool weighted) {
        StatusCode code = make_scan(temperature, true, weighted);
        if (code != kOk) return code;
        if (scanned) near_top();
        kept = scanned ? Filter<E>(row, vocab, temperature, scan).find(top_k, top_p, min_p)
                       : Filter<E>::sorted(row, vocab, temperature, top_k, top_p, min_p);
        return kOk;
    }

    // Filters compare y across blocks: where the first tokens are far from the best ones, scan again with a reference near
    // the top, so that rounding of y there stays small.
    void near_top() {
        float top = -kInfF;
        for (int64_t b = 0; b < scan.count; ++b) top = std::max(top, scan.blocks[b].top);
        if (!(std::fabs(top) > 60.0f) || top == -kInfF) return;
        scan.scale.reference += std::nearbyint(top);
        scan_row<E>(row, vocab, scan, threads);
        scanned = scan_is_finite(scan);
    }

    const Scan* scan_or_null() const { return scanned ? &scan : nullptr; }
    // y of the kept set's threshold: no kept token lies below it, since y is monotone.
    float cutoff() const { return scanned && !kept.all() ? E::scaled(kept.tau, scan.scale) : -kInfF; }
};

DRIFTMAX_END
