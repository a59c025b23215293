#include "lm_head_categorical.h"

#include "greedy.h"
#include "stats.h"

DRIFTMAX_BEGIN
namespace {

// Running state of one draw, zero at the start; kept by the caller between tiles.
struct State {
    double inverse_best;   // 1 / (best E_b / S_b) of the block race; 0 before the first block
    double score;          // of the token race (gumbel method, or inside the best block)
    double chosen;         // the token's logit
    double sum, weighted;  // relative to 2^reference
    double first, second;  // largest logits
    double first_y;        // y of `first`, relative to base
    int64_t token_plus_1;
    float reference;  // the first block's, an integer: tokens are shifted by it
    float base;       // masses and sums are relative to 2^base, an integer
    uint32_t started;
};

// Moves `base` up where a block would overflow it: one row may span far more octaves than a double (small temperatures).
void rebase(State& s, float reference) {
    if (!(reference > s.base + 512.0f)) return;
    double scale = pow2(s.base - reference);
    s.weighted = (s.weighted + (static_cast<double>(s.base) - reference) * s.sum) * scale;
    s.sum *= scale;
    s.inverse_best *= scale;
    s.first_y += static_cast<double>(s.base) - reference;
    s.base = reference;
}

void add_sums(State& s, const Block& b) {
    rebase(s, b.reference);
    double scale = pow2(b.reference - s.base), gap = static_cast<double>(b.reference) - s.base;
    s.sum += static_cast<double>(b.sum) * scale;
    s.weighted += (static_cast<double>(b.weighted) + gap * b.sum) * scale;
}

void add_top(State& s, const float* p, int64_t n, const Block& b, Scale scale) {
    // A block whose top is below the second best cannot change either.
    if (s.started > 1 && !(static_cast<double>(b.top) + 1e-3 >= F32::scaled(s.second, scale))) return;
    TopTwo t = top_two<F32>(p, n);
    if (s.started > 1) {
        t.offer(s.first);
        t.offer(s.second);
    }
    if (s.started == 1 || t.first > s.first) {
        scale.reference = b.reference;
        s.first_y = F32::scaled(t.first, scale) + (static_cast<double>(b.reference) - s.base);
    }
    s.first = t.first;
    s.second = t.second;
    s.started = 2;
}

class TileSampler {
public:
    explicit TileSampler(const LmHeadTileArgs& args) : args_(args) {}

    Status operator()(int64_t i) const {
        const int64_t draw = args_.first + i;
        const double temperature = args_.temperature[draw];
        const bool greedily = temperature == 0.0, by_token = args_.method == Method::gumbel || args_.vocab <= kBlock;
        const float* row = args_.tile + i * args_.row_stride;
        State& s = static_cast<State*>(args_.state)[i];
        BlockNoise noise(Stream(args_.streams, args_.n1, draw, kBlockNoise));
        int64_t winner = -1;  // the tile's block that leads the block race; its tokens race once, at the end
        for (int64_t at = 0; at < args_.columns; at += kBlock) {
            int64_t n = std::min(kBlock, args_.columns - at);
            const float* p = row + at;
            StatusCode code = kOk;
            if (greedily) code = take_largest(s, p, n, at);
            else if (by_token) code = race_tokens(s, p, n, at, draw, temperature);
            if (code == kOk && (args_.stats || !(greedily || by_token))) {
                Scale scale = scale_of(s, p, n, greedily ? 1.0 : temperature);
                Block b;
                bool low = false;
                if (args_.stats) scan_blocks<F32, true>(p, n, scale, &b, nullptr, low);
                else scan_blocks<F32, false>(p, n, scale, &b, nullptr, low);
                if (!block_is_finite(b)) code = refuse(p, n);
                else if (b.sum > 0 && add_block(s, p, n, b, scale, noise, at)) winner = at;
            }
            if (code != kOk) return status(code, draw);
        }
        if (winner < 0 || greedily || by_token) return kOk;
        s.token_plus_1 = 0;
        int64_t n = std::min(kBlock, args_.columns - winner);
        return status_or_ok(race_tokens(s, row + winner, n, winner, draw, temperature), draw);
    }

private:
    Scale scale_of(State& s, const float* p, int64_t n, double temperature) const {
        Scale scale = row_scale<F32>(p, n, temperature);
        if (!s.started && first_finite<F32>(p, n, Scale(temperature)) > -kInfF) {
            s.started = 1;
            s.reference = s.base = scale.reference;
        }
        scale.reference = s.started ? s.reference : scale.reference;
        return scale;
    }

    StatusCode take_largest(State& s, const float* p, int64_t n, int64_t at) const {
        const Best best = greedy<F32>(p, n);
        if (best.token >= 0 && (!s.token_plus_1 || best.score > s.chosen)) take(s, best.score, p, best.token, at);
        return best.code;
    }

    void take(State& s, double score, const float* p, int64_t i, int64_t at) const {
        s.score = score;
        s.chosen = static_cast<double>(p[i]);
        s.token_plus_1 = args_.begin + at + i + 1;
    }

    // A block without sums: the tile is gone with the call, so there is no careful path to fall back to, as whole rows have.
    static StatusCode refuse(const float* p, int64_t n) {
        StatusCode code = check_values<F32>(p, n);
        return code == kOk ? kInfinite : code;
    }

    // Words of the block race, four blocks to a Philox call.
    struct BlockNoise {
        Stream high, low;
        Words words{};
        int64_t group = -1;
        explicit BlockNoise(const Stream& stream) : high(stream), low(stream.plane1()) {}
        uint32_t hi(int64_t block) {
            if (block / 4 != group) {
                group = block / 4;
                words = high.block(static_cast<uint64_t>(group));
            }
            return words.w[block % 4];
        }
    };

    // Adds the block to the sums and the race; true if it takes the lead.
    bool add_block(State& s, const float* p, int64_t n, const Block& b, const Scale& scale, BlockNoise& noise, int64_t at) const {
        rebase(s, b.reference);
        if (args_.stats) {
            add_sums(s, b);
            add_top(s, p, n, b, scale);
        }
        double mass = static_cast<double>(b.sum) * pow2(b.reference - s.base);
        int64_t number = (args_.begin + at) / kBlock;
        uint32_t hi = noise.hi(number);
        if (!(mass > 0) || hi * 0x1p-32 * s.inverse_best > mass) return false;
        double rate = mass / exponential<double>(hi, noise.low.word(static_cast<uint64_t>(number)));
        if (!(rate > s.inverse_best)) return false;
        s.inverse_best = rate;
        return true;
    }

    // Tokens of a block join the row's race: alone after the block race, with all before them in the gumbel method.
    StatusCode race_tokens(State& s, const float* p, int64_t n, int64_t at, int64_t draw, double temperature) const {
        Best start{s.token_plus_1 ? s.score : -kInf, s.token_plus_1 - 1};
        TokenRace<Best> race(Stream(args_.streams, args_.n1, draw, kTokenNoise), temperature, Kept{}, start);
        int64_t begin = args_.begin + at;
        race.template run<F32>(p - begin, begin, n, false);
        if (race.code == kOk && race.sink.token >= begin) take(s, race.sink.score, p, race.sink.token - begin, at);
        return race.code;
    }

    static Status status_or_ok(StatusCode code, int64_t draw) { return code == kOk ? kOk : status(code, draw); }

    const LmHeadTileArgs& args_;
};

}  // namespace

Status lm_head_tile(const LmHeadTileArgs& args) {
    if (args.draws <= 0 || args.columns <= 0) return kOk;
    FirstError error;
    const TileSampler sample(args);
    parallel_for(args.draws, 4, args.threads, [&](int64_t i, int64_t end, int) {
        for (; i < end; ++i) error.report(sample(i));
    });
    return error.get();
}

int64_t lm_head_state_bytes() { return sizeof(State); }

// Tokens (-1 where no token was possible: the status is of the first of these) and by-products.
Status lm_head_finish(const LmHeadFinishArgs& args) {
    const State* states = static_cast<const State*>(args.state);
    Status found = kOk;
    for (int64_t i = 0; i < args.draws; ++i) {
        const State& s = states[i];
        args.tokens[i] = s.token_plus_1 - 1;
        if (!s.token_plus_1 && found == kOk) found = status(kEmpty, args.first + i);
        if (!args.stats || !s.token_plus_1) continue;
        double temperature = args.temperature[args.first + i];
        if (temperature == 0.0) temperature = 1.0;
        TopTwo top{s.first, s.second};
        Stats out = make_stats(s.chosen, top, temperature, s.first_y, s.sum, s.weighted);
        store_stats(args.stats, args.stats_stride, i, out);
    }
    return found;
}

DRIFTMAX_END
