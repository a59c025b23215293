#include "gumbel_topk.h"

#include "race.h"
#include "row.h"

DRIFTMAX_BEGIN
namespace {

struct Scored {
    double score;
    int64_t token;
    // Better first.
    bool operator<(const Scored& other) const { return score > other.score || (score == other.score && token < other.token); }
};

// The k best so far and some more: when there is no room left, a selection leaves the k best.
struct TopK {
    static constexpr bool kSingle = false;
    Scored* best;
    int64_t k, size = 0;
    double least = -kInf;  // of the k best of the last selection

    static int64_t room(int64_t k) { return k + std::max<int64_t>(k, Survivors::kRoom); }

    void offer(double score, int64_t token) {
        if (score < least) return;
        best[size++] = {score, token};
        if (size == room(k)) select();
    }
    void select() {
        if (size <= k) return;
        std::nth_element(best, best + k - 1, best + size);
        size = k;
        least = best[k - 1].score;
    }
    double bound() const { return least; }
};

template <typename E> Status draw_row(const GumbelTopkArgs& args, int64_t draw) {
    const Options& o = args.options;
    double temperature = o.temperature[draw];
    RowContext<E> ctx{row_of<E>(args.logits, draw), args.logits.vocab, 1};
    StatusCode code = kOk;
    if (o.filtered() && temperature > 0) code = ctx.make_kept(temperature, o.top_k[draw], o.top_p[draw], o.min_p[draw], false);
    if (code != kOk) return status(code, draw);
    TopK top{static_cast<Scored*>(scratch(5, static_cast<size_t>(TopK::room(args.k)) * sizeof(Scored))), args.k};
    if (temperature == 0.0) {
        code = check_values<E>(ctx.row, ctx.vocab);
        for (int64_t i = 0; i < ctx.vocab; ++i) {
            double v = static_cast<double>(E::get(ctx.row + i));
            if (v > -kInf) top.offer(v, i);
        }
    } else {
        TokenRace<TopK> race(Stream(args.streams, args.logits.n1, draw, kTopkNoise), temperature, ctx.kept, top);
        float cutoff = ctx.cutoff();
        for (int64_t b = 0; b < blocks_of(ctx.vocab); ++b) {
            if (ctx.scanned && !(ctx.scan.blocks[b].top >= cutoff)) continue;
            race.template run<E>(ctx.row, b * kBlock, std::min(kBlock, ctx.vocab - b * kBlock), true);
        }
        race.finish();
        top = race.sink;
        code = race.code;
    }
    if (code != kOk) return status(code, draw);
    top.select();
    if (top.size < args.k) return status(top.size == 0 ? kEmpty : kTooFew, draw);
    std::sort(top.best, top.best + args.k);
    for (int64_t j = 0; j < args.k; ++j) {
        args.tokens[draw * args.k + j] = top.best[j].token;
        if (args.scores) args.scores[draw * args.k + j] = top.best[j].score;
    }
    return kOk;
}

}  // namespace

Status gumbel_topk(const GumbelTopkArgs& args) {
    int64_t draws = args.logits.n0 * args.logits.n1;
    if (draws <= 0 || args.k <= 0) return kOk;
    FirstError error;
    with_element(args.logits.dtype, [&](auto element) {
        parallel_for(draws, 1, args.threads, [&](int64_t draw, int64_t end, int) {
            for (; draw < end; ++draw) error.report(draw_row<decltype(element)>(args, draw));
        });
    });
    return error.get();
}

DRIFTMAX_END
