// The contract of docs/numerics.md for one draw, written as plainly as it reads: sorting, long double sums, every noise
// formed. Answers "unknown" where rounding may decide.
#pragma once

#include "cases.h"
#include "philox.h"
#include "vector_math.h"

namespace fuzz {

using driftmax::StatusCode;

struct Row {
    std::vector<double> logit, scaled;
    double temperature = 1.0;
    StatusCode fault = driftmax::kOk, other_fault = driftmax::kOk;  // a row may hold a NaN and an infinity
    bool overflows = false;  // l / T leaves the range of double: only the order of the logits is left
    bool extreme = false;    // y has no bits left below 1 in float: no block sums; the fused head may refuse it
};

inline Row read_row(const Case& c, int64_t draw) {
    Row row;
    row.temperature = c.temperature_of(draw);
    bool nan = false, infinite = false, possible = false;
    for (int64_t v = 0; v < c.vocab; ++v) {
        double x = c.value(draw, v);
        double y = row.temperature > 0 ? x / row.temperature : x;
        nan |= std::isnan(x);
        infinite |= x == kInf;
        possible |= x > -kInf;
        row.overflows |= std::isfinite(x) && std::fabs(y) > 1e300;
        row.extreme |= std::isfinite(x) && std::fabs(y) > 0x1p28;
        row.logit.push_back(x);
        row.scaled.push_back(y);
    }
    if (nan) row.fault = driftmax::kNaN, row.other_fault = infinite ? driftmax::kInfinite : driftmax::kNaN;
    else if (infinite) row.fault = row.other_fault = driftmax::kInfinite;
    else if (!possible) row.fault = row.other_fault = driftmax::kEmpty;
    return row;
}

struct Kept {
    std::vector<char> in;
    int64_t count = 0;
    bool known = true;
};

// The kept set, by sorting the whole row. Unknown where the mass at the cut is within rounding of top_p.
inline Kept kept_set(const Case& c, int64_t draw, const Row& row) {
    Kept kept;
    if (row.temperature == 0) {  // greedy draws ignore the filters
        for (double x : row.logit) kept.in.push_back(x > -kInf), kept.count += x > -kInf;
        return kept;
    }
    std::vector<int64_t> order;
    for (int64_t v = 0; v < c.vocab; ++v)
        if (row.logit[v] > -kInf) order.push_back(v);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row.logit[a] > row.logit[b]; });
    size_t n = order.size();
    if (int64_t k = c.top_k_of(draw); k > 0) n = std::min<size_t>(n, static_cast<size_t>(k));
    double best = row.scaled[order[0]];
    long double total = 0, mass = 0;
    for (size_t i = 0; i < n; ++i) total += std::exp(static_cast<long double>(row.scaled[order[i]] - best));
    size_t prefix = n;
    if (double p = c.top_p_of(draw); p < 1.0) {
        for (size_t i = 0; i < n; ++i) {
            mass += std::exp(static_cast<long double>(row.scaled[order[i]] - best)) / total;
            if (std::fabs(static_cast<double>(mass - p)) < 2e-6) kept.known = false;  // the bound on block sums
            if (mass >= p) {
                prefix = i + 1;
                break;
            }
        }
    }
    double threshold = c.min_p_of(draw) > 0 ? best + std::log(c.min_p_of(draw)) : -kInf;
    kept.in.assign(c.vocab, 0);
    for (size_t i = 0; i < prefix; ++i) {
        double y = row.scaled[order[i]];
        if (threshold > -kInf && row.logit[order[i]] < row.logit[order[0]] &&
            std::fabs(y - threshold) < 1e-9 * (1 + std::fabs(threshold)))
            kept.known = false;
        // Probabilities that underflow a double are zero to any implementation that forms them: not checked.
        if (y - best < -700) kept.known = kept.known && c.top_p_of(draw) >= 1.0 && threshold == -kInf;
        if (y >= threshold) kept.in[order[i]] = 1, ++kept.count;
    }
    if (row.overflows) kept.known = false;
    return kept;
}

inline driftmax::oracle::Stream stream_of(const Case& c, int64_t draw, uint32_t purpose) {
    return driftmax::oracle::Stream(c.streams(), c.n1, draw, purpose);
}

inline double race_score(const Case& c, const Row& row, int64_t draw, int64_t v, uint32_t purpose) {
    driftmax::oracle::Stream s = stream_of(c, draw, purpose);
    return row.scaled[v] + driftmax::oracle::gumbel<double>(s.word(v), s.plane1().word(v));
}

// argmax of y + G over [begin, end) and the kept set, lowest index on ties; -1 if there is none.
inline int64_t token_race(const Case& c, const Row& row, const Kept& kept, int64_t draw, int64_t begin, int64_t end) {
    int64_t winner = -1;
    double best = -kInf;
    for (int64_t v = begin; v < end; ++v) {
        if (!kept.in[v]) continue;
        double score = race_score(c, row, draw, v, driftmax::oracle::kTokenNoise);
        if (winner < 0 || score > best) winner = v, best = score;
    }
    return winner;
}

inline int64_t argmax(const Row& row) { return std::max_element(row.logit.begin(), row.logit.end()) - row.logit.begin(); }

// The block race; -1 where the two best lie within the stated 2^-18 (and a little more).
inline int64_t block_race(const Case& c, const Row& row, int64_t draw) {
    double reference = row.scaled[argmax(row)];
    double best = kInf, second = kInf;
    int64_t winner = -1;
    driftmax::oracle::Stream s = stream_of(c, draw, driftmax::oracle::kBlockNoise);
    for (int64_t b = 0; b * 1024 < c.vocab; ++b) {
        long double sum = 0;
        for (int64_t v = b * 1024; v < std::min(c.vocab, b * 1024 + 1024); ++v)
            sum += std::exp(static_cast<long double>(row.scaled[v]) - reference);
        if (sum == 0) continue;
        double noise = driftmax::oracle::exponential<double>(s.word(b), s.plane1().word(b));
        double score = static_cast<double>(noise / sum);
        if (score < best) second = best, best = score, winner = b;
        else second = std::min(second, score);
    }
    return second <= best * (1 + 0x1p-17) ? -1 : winner;
}

// The token that must come out, or -1 where rounding may decide.
inline int64_t expected_token(const Case& c, const Row& row, const Kept& kept, int64_t draw, driftmax::Method method) {
    if (row.temperature == 0) return argmax(row);
    if (!kept.known) return -1;
    bool filtered = c.options().filtered();
    if (method == driftmax::Method::gumbel || filtered || c.vocab <= 1024) return token_race(c, row, kept, draw, 0, c.vocab);
    if (row.extreme) return -1;  // no float block sums: the kernel may run the token race on the row, the same law
    int64_t b = block_race(c, row, draw);
    return b < 0 ? -1 : token_race(c, row, kept, draw, b * 1024, std::min(c.vocab, b * 1024 + 1024));
}

struct ExpectedStats {
    double log_prob, log_z, entropy, margin;
};

inline ExpectedStats expected_stats(const Row& row, const Kept& kept, int64_t token) {
    double best = -kInf;
    for (size_t v = 0; v < kept.in.size(); ++v)
        if (kept.in[v]) best = std::max(best, row.scaled[v]);
    long double sum = 0, weighted = 0;
    double first = -kInf, second = -kInf;
    for (size_t v = 0; v < kept.in.size(); ++v) {
        if (!kept.in[v]) continue;
        double y = row.scaled[v] - best;
        long double e = std::exp(static_cast<long double>(y));
        sum += e;
        if (e > 0) weighted += e * y;
        if (y > first) second = first, first = y;
        else second = std::max(second, y);
    }
    double log_sum = static_cast<double>(std::log(sum));
    ExpectedStats s;
    s.log_z = best + log_sum;
    s.log_prob = row.scaled[token] - best - log_sum;
    s.entropy = log_sum - static_cast<double>(weighted / sum);
    s.margin = static_cast<double>((1.0L - std::exp(static_cast<long double>(second))) / sum);
    return s;
}

}  // namespace fuzz
