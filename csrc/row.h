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
    Total total{};  // of the scan

    // Fills `scan` and `total`; `weighted` where its by-products will be asked for. Where y overflows for finite logits `scanned`
    // stays false: then the careful paths serve.
    StatusCode make_scan(double temperature, bool lanes, bool weighted = true) {
        int64_t count = blocks_of(vocab);
        char* memory = static_cast<char*>(scratch(0, static_cast<size_t>(count) * (sizeof(Block) + 16 * sizeof(float))));
        scan = {row_scale<E>(row, vocab, temperature), reinterpret_cast<Block*>(memory), nullptr, count};
        scan.weighted = weighted;
        if (lanes) scan.lane_tops = reinterpret_cast<float*>(memory + static_cast<size_t>(count) * sizeof(Block));
        scan_centred();
        scanned = total.finite;
        return scanned ? kOk : check_values<E>(row, vocab);
    }

    // Filters and the sums of kept tokens use y relative to the row's reference, exact only near it: a row that begins far below
    // its maximum (tokens banned by -1e9, say) is scanned again. A far reference is coarse itself, hence the turns.
    void scan_centred() {
        for (int turn = 0; turn < 8; ++turn) {
            scan_row<E>(row, vocab, scan, threads);
            total = total_of(scan);
            if (!(std::fabs(total.top) > kFar && std::fabs(total.top) < kInfF)) break;
            scan.scale.reference += std::nearbyint(total.top);
        }
        if (std::fabs(total.top) <= kFar && total.bottom < -2048.0f && drop_hopeless(scan)) total = total_of(scan);
    }

    StatusCode make_kept(double temperature, int64_t top_k, double top_p, double min_p, bool weighted) {
        StatusCode code = make_scan(temperature, true, weighted);
        if (code != kOk) return code;
        // Beyond 2^23 a float no longer holds every integer that references differ by: the careful paths serve.
        scanned = scanned && std::fabs(scan.scale.reference) < 0x1p23f;
        kept = scanned ? Filter<E>(row, vocab, temperature, scan, total).find(top_k, top_p, min_p)
                       : Filter<E>::sorted(row, vocab, temperature, top_k, top_p, min_p);
        return kOk;
    }

    const Scan* scan_or_null() const { return scanned ? &scan : nullptr; }
    // y of the kept set's threshold: no kept token lies below it, since y is monotone.
    float cutoff() const { return scanned && !kept.all() ? E::scaled(kept.tau, scan.scale) : -kInfF; }
};

DRIFTMAX_END
