#include "transfer.h"

#include <algorithm>
#include <limits>

#include "parallel.h"

DRIFTMAX_BEGIN
namespace {

struct Candidate {
    double score;
    int64_t position;
    // Better first.
    bool operator<(const Candidate& other) const {
        return score > other.score || (score == other.score && position < other.position);
    }
};

// NaN ranks with -inf.
template <typename F> double rank_of(F score) {
    return score == score ? static_cast<double>(score) : -std::numeric_limits<double>::infinity();
}

// The positions of a row that may be written, in order. Here and below nothing branches on what is random.
template <typename F> int64_t gather(const TransferArgs& args, int64_t row, Candidate* out) {
    const int64_t* tokens = args.tokens + row * args.length;
    const F* scores = static_cast<const F*>(args.scores) + row * args.length;
    const uint8_t* eligible = args.eligible ? args.eligible + row * args.length : nullptr;
    int64_t count = 0;
    for (int64_t j = args.begin; j < args.end; ++j) {
        out[count] = {rank_of(scores[j]), j};
        count += (tokens[j] == args.mask_id) & (!eligible || eligible[j]);
    }
    return count;
}

// Moves the candidates to be written to the front; their number.
int64_t select(const TransferArgs& args, int64_t row, Candidate* candidates, int64_t count) {
    const int64_t least = std::clamp<int64_t>(args.count[row], 0, count);
    if (args.rule == TransferRule::threshold) {
        const double threshold = args.threshold[row];
        int64_t above = 0;
        for (int64_t i = 0; i < count; ++i) above += candidates[i].score >= threshold;
        if (above >= least) {
            int64_t kept = 0;
            for (int64_t i = 0; i < count; ++i) {
                const Candidate c = candidates[i];
                candidates[kept] = c;
                kept += c.score >= threshold;
            }
            return kept;
        }
    }
    if (least > 0 && least < count) std::nth_element(candidates, candidates + least, candidates + count);
    return least;
}

template <typename F> void transfer_row(const TransferArgs& args, int64_t row) {
    const int64_t length = args.length;
    uint8_t* moved = args.moved + row * length;
    std::fill(moved, moved + length, uint8_t{0});
    auto* candidates = static_cast<Candidate*>(scratch(6, static_cast<size_t>(length) * sizeof(Candidate)));
    const int64_t many = select(args, row, candidates, gather<F>(args, row, candidates));
    for (int64_t i = 0; i < many; ++i) {
        const int64_t at = candidates[i].position;
        args.tokens[row * length + at] = args.drawn[row * length + at];
        moved[at] = 1;
    }
}

}  // namespace

void transfer(const TransferArgs& args) {
    if (args.rows <= 0 || args.length <= 0) return;
    parallel_for(args.rows, std::max<int64_t>(1, 8192 / args.length), args.threads, [&](int64_t row, int64_t end, int) {
        for (; row < end; ++row) {
            if (args.dtype == DType::f64) transfer_row<double>(args, row);
            else transfer_row<float>(args, row);
        }
    });
}

DRIFTMAX_END
