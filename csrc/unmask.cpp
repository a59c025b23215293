#include "unmask.h"

#include "row_sampler.h"

DRIFTMAX_BEGIN
namespace {

constexpr int64_t kChunk = 1024;  // positions decided at a time

// The words of the decisions: element j of the row's stream of uniforms, where j is the position.
class Clock {
public:
    Clock(const UnmaskArgs& args, int64_t row)
        : high_(args.streams, args.logits.n1, row * args.logits.n1, kUniform),
          positions_(args.streams.positions) {
        if (positions_) positions_ += row * args.logits.n1;
        high_.position = 0;
    }
    // The uniforms of positions [begin, begin + n), n <= kChunk and begin a multiple of it.
    void uniforms(int64_t begin, int64_t n, double* out) const {
        alignas(64) uint32_t hi[kChunk], lo[kChunk];
        const Stream low = high_.plane1();
        if (positions_) {
            for (int64_t i = 0; i < n; ++i) {
                uint64_t element = static_cast<uint64_t>(positions_[begin + i]);
                hi[i] = high_.word(element);
                lo[i] = low.word(element);
            }
        } else {
            philox_words(hi, high_, static_cast<uint64_t>(begin) / 4, (n + 3) / 4);
            philox_words(lo, low, static_cast<uint64_t>(begin) / 4, (n + 3) / 4);
        }
        for (int64_t i = 0; i < n; ++i) out[i] = uniform(hi[i], lo[i], double());
    }

private:
    Stream high_;
    const int64_t* positions_;
};

// Writes the draws of one row that this step unmasks, in order; their number.
int64_t decide(const UnmaskArgs& args, int64_t row, int64_t* chosen) {
    const int64_t length = args.logits.n1;
    const int64_t* tokens = args.tokens + row * length;
    const double probability = args.probability[row];
    const Clock clock(args, row);
    double u[kChunk];
    int64_t count = 0;
    for (int64_t begin = 0; begin < length; begin += kChunk) {
        int64_t n = std::min(kChunk, length - begin);
        if (std::find(tokens + begin, tokens + begin + n, args.mask_id) == tokens + begin + n) continue;
        clock.uniforms(begin, n, u);
        for (int64_t i = 0; i < n; ++i)
            if (tokens[begin + i] == args.mask_id && u[i] < probability) chosen[count++] = row * length + begin + i;
    }
    return count;
}

bool is_column(const UnmaskArgs& args, int64_t token) { return token >= 0 && token < args.logits.vocab; }

// The logits of a draw with forbidden columns at -inf: a copy where there are any.
template <typename E> const typename E::raw* allowed_row(const UnmaskArgs& args, int64_t draw) {
    const typename E::raw* row = row_of<E>(args.logits, draw);
    const int64_t* end = args.forbidden + args.forbidden_count;
    bool any = is_column(args, args.mask_id);
    for (const int64_t* f = args.forbidden; f != end && !any; ++f) any = is_column(args, *f);
    if (!any) return row;
    const size_t size = static_cast<size_t>(args.logits.vocab);
    auto* copy = static_cast<typename E::raw*>(scratch(6, size * sizeof(typename E::raw)));
    std::copy(row, row + size, copy);
    if (is_column(args, args.mask_id)) copy[args.mask_id] = minus_infinity<E>();
    for (const int64_t* f = args.forbidden; f != end; ++f)
        if (is_column(args, *f)) copy[*f] = minus_infinity<E>();
    return copy;
}

// Draws to be made, of all rows, in order; `chosen` holds n0 * n1 numbers.
int64_t decide_all(const UnmaskArgs& args, int64_t* chosen) {
    const int64_t rows = args.logits.n0, length = args.logits.n1;
    parallel_for(rows, std::max<int64_t>(1, 4096 / length), args.threads, [&](int64_t row, int64_t end, int) {
        for (; row < end; ++row) args.revealed[row] = decide(args, row, chosen + row * length);
    });
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t* own = chosen + row * length;
        std::copy(own, own + args.revealed[row], chosen + count);
        count += args.revealed[row];
    }
    return count;
}

}  // namespace

Status unmask(const UnmaskArgs& args) {
    const int64_t draws = args.logits.n0 * args.logits.n1;
    if (draws <= 0) return kOk;
    int64_t* chosen = static_cast<int64_t*>(scratch(7, static_cast<size_t>(draws) * 2 * sizeof(int64_t)));
    int64_t* drawn = chosen + draws;
    const int64_t count = decide_all(args, chosen);
    CategoricalArgs law;
    law.logits = args.logits;
    law.streams = args.streams;
    law.options.temperature = args.temperature;
    law.threads = args.threads;
    Status status = sample_rows(law, count, [&](const auto& sampler, int64_t i) {
        using E = typename std::decay_t<decltype(sampler)>::element;
        return sampler(chosen[i], allowed_row<E>(args, chosen[i]), drawn[i]);
    });
    if (status == kOk)
        for (int64_t i = 0; i < count; ++i) args.tokens[chosen[i]] = drawn[i];
    return status;
}

DRIFTMAX_END
