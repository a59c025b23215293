// The token race: argmax of l / T + Gumbel over kept tokens, exactly, with almost no logarithm.
//
// Token v beats the best score b only if its exponential E_v = exp(-G_v) < exp(l_v / T - b), and E >= U' >= hi 2^-32. So the
// high noise word and a lower bound of log2(hi) reject nearly every token; survivors get the low word and two logarithms
// in double. The winner is the plain formula's, bit for bit (tests/ops/test_categorical.py).
#pragma once

#include "blocks.h"
#include "philox.h"

DRIFTMAX_BEGIN

// Keeps the best token; ties to the lower index.
struct Best {
    static constexpr bool kSingle = true;  // one token wins: each score sharpens the screen, and none minds being offered twice
    double score = -kInf;
    int64_t token = -1;
    StatusCode code = kOk;

    void offer(double s, int64_t t) {
        if (s > score || (s == score && (token < 0 || t < token))) {
            score = s;
            token = t;
        }
    }
    // A token needs at least this score to matter.
    double bound() const { return score; }
    void merge(const Best& other) {
        if (other.code != kOk && (code == kOk || other.code < code)) code = other.code;
        if (other.token >= 0) offer(other.score, other.token);
    }
};

// Lower bound of log2(hi * 2^-32), from the exponent and mantissa bits: log2(1 + m) >= m. Slack 1e-4 covers all roundings.
DRIFTMAX_INLINE f32x16 log2_below(i32x16 hi) {
    f32x16 x = to_float(shr<8>(hi));  // exact
    return fma(to_float(as_int(x)), splat(0x1p-23f), splat(-151.0001f));
}

struct Nothing {};

// Tokens that a screen let through, and the scores they have when enough of them have come together for vectors.
class Survivors {
public:
    static constexpr int64_t kRoom = 64;

    // The high half of its block's number must be that of the others.
    void add(uint32_t hi, double logit, int64_t token) {
        hi_[count_] = hi;
        logits_[count_] = logit;
        tokens_[count_] = token;
        ++count_;
    }
    bool full() const { return count_ == kRoom; }
    bool takes(int64_t token) const { return count_ == 0 || block_of(token) >> 32 == block_of(tokens_[0]) >> 32; }

    // Offers l / T + Gumbel of each and forgets them.
    template <typename Sink> void score(Sink& sink, const Stream& low, double temperature) {
        alignas(64) uint32_t numbers[kRoom] = {}, words[4 * kRoom];
        for (int64_t i = 0; i < count_; ++i) numbers[i] = static_cast<uint32_t>(block_of(tokens_[i]));
        philox_words_of(words, low, static_cast<uint32_t>(block_of(tokens_[0]) >> 32), numbers, count_);
        for (int64_t i = 0; i < count_; ++i) lo_[i] = words[4 * i + tokens_[i] % 4];
        for (int64_t i = 0; i < count_; ++i) exponential_parts(hi_[i], lo_[i], f_[i], k_[i]);
        for (int64_t i = 0; i < count_; ++i) f_[i] = -log_core(f_[i], k_[i]);
        for (int64_t i = 0; i < count_; ++i) f_[i] = logits_[i] / temperature - log_pos(f_[i]);
        for (int64_t i = 0; i < count_; ++i) sink.offer(f_[i], tokens_[i]);
        count_ = 0;
    }

private:
    static uint64_t block_of(int64_t token) { return static_cast<uint64_t>(token) / 4; }

    alignas(64) uint32_t hi_[kRoom], lo_[kRoom];
    alignas(64) double logits_[kRoom], f_[kRoom], k_[kRoom];
    int64_t tokens_[kRoom];
    int64_t count_ = 0;
};

// `Sink` receives the scores of tokens that its bound() does not rule out (and of some that it does): one by one where
// the first may be the last, otherwise many at a time, the last of them when the race is finished.
template <typename Sink> class TokenRace {
public:
    TokenRace(const Stream& noise, double temperature, const Kept& kept, Sink sink = {})
        : sink(sink),
          noise_(noise),
          low_(noise.plane1()),
          temperature_(temperature),
          // towards zero, so that rounding never rejects
          slope_(static_cast<float>(kLog2e / temperature * (1.0 - 0x1p-20))),
          kept_(kept),
          threshold_(-kInf, slope_) {
        if (!(slope_ < 0x1p126f)) slope_ = 0x1p126f;
        sharpen();
    }

    Sink sink;
    StatusCode code = kOk;

    // Gives the sink what it has not seen yet.
    void finish() {
        if constexpr (!Sink::kSingle) {
            survivors_.score(sink, low_, temperature_);
            sharpen();
        }
    }

    // Tokens [begin, begin + n), n <= 1024, begin a multiple of 4; row points to token 0. `sweeps`: those after them are next.
    template <typename E> void run(const typename E::raw* row, int64_t begin, int64_t n, bool sweeps) {
        alignas(64) uint32_t hi[kBlock];
        const typename E::raw* p = row + begin;
        // Logits that are next are on their way while the words are made, a few lines at a time: many at once would wait for
        // each other, and the words for them.
        const char* next = reinterpret_cast<const char*>(p + kBlock);
        constexpr int64_t step = 4 * kGroup * static_cast<int64_t>(sizeof *p);
        philox_words(hi, noise_, static_cast<uint64_t>(begin) / 4, (n + 3) / 4, [&]() DRIFTMAX_LAMBDA_INLINE {
            if (!sweeps) return;
            for (int64_t byte = 0; byte < step; byte += 64) __builtin_prefetch(next + byte, 0, 2);
            next += step;
        });
        bool blunt = Sink::kSingle;  // could a better score of this block still sharpen the screen?
        for (int64_t i = 0; i < n; i += 32) {
            auto survivors = [&] { return screen<E>(p, i, n, hi) | (n - i > 16 ? screen<E>(p, i + 16, n, hi) << 16 : 0u); };
            uint32_t alive = survivors();
            if (__builtin_expect(alive == 0, 1)) continue;
            if (blunt && __builtin_popcount(alive) > kMany) {
                blunt = false;
                int64_t favourite = largest<E>(p, n);
                if (favourite >= 0) evaluate<E>(p, begin, favourite, hi);
                alive = survivors();
            }
            for (; alive; alive &= alive - 1) evaluate<E>(p, begin, i + __builtin_ctz(alive), hi);
        }
    }

private:
    static constexpr int kMany = 4;  // survivors among 32 tokens that are worth a look for the block's largest logit

    // Which of the sixteen tokens from i may still win, NaNs among them.
    template <typename E> DRIFTMAX_INLINE uint32_t screen(const typename E::raw* p, int64_t i, int64_t n,
                                                          const uint32_t* hi) const {
        bool whole = n - i >= 16;
        auto l = whole ? E::load(p + i) : load_part<E>(p + i, n - i);
        f32x16 gap = E::gap(l, threshold_, slope_);
        return ~ge(log2_below(iload16(hi + i)), gap) & (whole ? 0xffffu : (1u << (n - i)) - 1u);
    }

    // Index of the block's largest value if that beats the largest seen so far: a good first score makes the screen sharp.
    template <typename E> int64_t largest(const typename E::raw* p, int64_t n) {
        constexpr int chains = 4;
        f32x16 tops[chains];
        for (f32x16& top : tops) top = splat(-kInfF);
        int64_t i = 0;
        for (; i + 16 * chains <= n; i += 16 * chains)
            for (int k = 0; k < chains; ++k) tops[k] = max(tops[k], E::narrow(E::load(p + i + 16 * k)));
        for (; i < n; i += 16) tops[0] = max(tops[0], E::narrow(n - i >= 16 ? E::load(p + i) : load_part<E>(p + i, n - i)));
        float value = max16(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
        if (!(value > seen_)) return -1;
        seen_ = value;
        for (i = 0; i < n; i += 16) {
            uint32_t at = ge(E::narrow(n - i >= 16 ? E::load(p + i) : load_part<E>(p + i, n - i)), splat(value));
            if (at) return i + __builtin_ctz(at);
        }
        return -1;
    }

    template <typename E> void evaluate(const typename E::raw* p, int64_t begin, int64_t i, const uint32_t* hi) {
        double l = E::get(p + i);
        if (l != l) code = kNaN;
        else if (l == kInf && code != kNaN) code = kInfinite;
        if (!(l > -kInf) || !kept_(l, begin + i)) return;
        if constexpr (Sink::kSingle) {
            sink.offer(l / temperature_ + gumbel<double>(hi[i], low_.word(static_cast<uint64_t>(begin + i))), begin + i);
            sharpen();
        } else {
            if (!survivors_.takes(begin + i)) finish();
            survivors_.add(hi[i], l, begin + i);
            if (survivors_.full()) finish();
        }
    }

    void sharpen() { threshold_ = Threshold(sink.bound() * temperature_, slope_); }

    Stream noise_, low_;
    double temperature_;
    float slope_;
    Kept kept_;
    Threshold threshold_;
    float seen_ = -kInfF;
    [[no_unique_address]] std::conditional_t<Sink::kSingle, Nothing, Survivors> survivors_;
};

// Race over the row; blocks that cannot hold a kept token (y of their top below `cutoff`) are skipped where a scan is given.
template <typename E>
Best race_row(const typename E::raw* row, int64_t vocab, const Stream& noise, double temperature, const Kept& kept,
              const Scan* scan, float cutoff, int threads) {
    constexpr int64_t kGroup = 8;  // blocks that share one race when threads split the row
    int64_t count = blocks_of(vocab), groups = threads > 1 ? (count + kGroup - 1) / kGroup : 1;
    Best* bests = static_cast<Best*>(scratch(1, static_cast<size_t>(groups) * sizeof(Best)));
    int64_t per_group = groups == 1 ? count : kGroup;
    parallel_for(groups, 1, threads, [&](int64_t g, int64_t end, int) {
        for (; g < end; ++g) {
            TokenRace<Best> race(noise, temperature, kept);
            int64_t stop = (g + 1) * per_group < count ? (g + 1) * per_group : count;
            for (int64_t b = g * per_group; b < stop; ++b) {
                if (scan && !(scan->blocks[b].top >= cutoff)) continue;
                int64_t n = vocab - b * kBlock < kBlock ? vocab - b * kBlock : kBlock;
                race.run<E>(row, b * kBlock, n, true);
            }
            bests[g] = race.sink;
            bests[g].code = race.code;
        }
    });
    Best best;
    for (int64_t g = 0; g < groups; ++g) best.merge(bests[g]);
    return best;
}

DRIFTMAX_END
