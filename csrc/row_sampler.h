// One draw from one row: block race, token race or greedy, and the by-products. What `categorical` and `unmask` share.
#pragma once

#include "greedy.h"
#include "row.h"
#include "stats.h"

DRIFTMAX_BEGIN

// Choose a block with probability proportional to its mass: argmin of E_b / S_b. E_b >= U'_b >= hi 2^-32 screens as in race.h.
inline int64_t race_blocks(const Scan& scan, const Total& total, const Stream& noise) {
    uint32_t* hi = static_cast<uint32_t*>(scratch(4, static_cast<size_t>(scan.count + 128) * 4));
    philox_words(hi, noise, 0, (scan.count + 3) / 4);
    const Stream low = noise.plane1();
    double best = kInf;
    int64_t winner = -1;
    auto offer = [&](int64_t b) {
        double mass = block_mass(scan.blocks[b], total.reference);
        if (!(mass > 0) || hi[b] * 0x1p-32 > mass * best) return;
        double t = exponential<double>(hi[b], low.word(static_cast<uint64_t>(b))) / mass;
        if (t < best || (t == best && b < winner)) {
            best = t;
            winner = b;
        }
    };
    offer(scan.with_top(total.top));  // a good one first makes the screen sharp
    for (int64_t b = 0; b < scan.count; ++b) offer(b);
    return winner;
}

// The same in double, for rows whose y overflow a float.
template <typename E> int64_t race_blocks_carefully(const RowContext<E>& ctx, double temperature, const Stream& noise) {
    double top = -kInf, best = kInf;
    for (int64_t i = 0; i < ctx.vocab; ++i) top = std::max(top, static_cast<double>(E::get(ctx.row + i)));
    const Stream low = noise.plane1();
    int64_t winner = -1;
    for (int64_t b = 0; top > -kInf && b < blocks_of(ctx.vocab); ++b) {
        double mass = 0.0;
        for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, ctx.vocab); ++i)
            mass += std::exp((static_cast<double>(E::get(ctx.row + i)) - top) / temperature);
        if (!(mass > 0)) continue;
        double t = exponential<double>(noise.word(static_cast<uint64_t>(b)), low.word(static_cast<uint64_t>(b))) / mass;
        if (t < best) {
            best = t;
            winner = b;
        }
    }
    return winner;
}

// Draws of a batch, one at a time: its arguments say how, and which threads may share a row.
template <typename E> class RowSampler {
public:
    using element = E;
    RowSampler(const CategoricalArgs& args, int threads) : args_(args), threads_(threads), filtered_(args.options.filtered()) {}

    Status operator()(int64_t draw) const { return (*this)(draw, row_of<E>(args_.logits, draw), args_.tokens[draw]); }

    // The same for a row that need not be the batch's own; `token` is written unless the row is bad.
    Status operator()(int64_t draw, const typename E::raw* row, int64_t& token) const {
        RowContext<E> ctx{row, args_.logits.vocab, threads_};
        double temperature = args_.options.temperature[draw];
        Best best = temperature == 0.0 ? most_probable(ctx) : sample(ctx, draw, temperature);
        if (best.code != kOk) return status(best.code, draw);
        if (best.token < 0) return status(kEmpty, draw);
        token = best.token;
        if (args_.stats) write_stats(ctx, draw, best.token, temperature == 0.0 ? 1.0 : temperature);
        return kOk;
    }

private:
    // With by-products the scan that they need finds the token as well.
    Best most_probable(RowContext<E>& ctx) const {
        if (!args_.stats) return greedy<E>(ctx.row, ctx.vocab);
        StatusCode code = ctx.make_scan(1.0, false);
        if (code != kOk) return {-kInf, -1, code};
        return ctx.scanned ? greedy<E>(ctx.row, ctx.vocab, ctx.scan, ctx.total.top) : greedy<E>(ctx.row, ctx.vocab);
    }

    Best sample(RowContext<E>& ctx, int64_t draw, double temperature) const {
        const Options& o = args_.options;
        const Stream noise(args_.streams, args_.logits.n1, draw, kTokenNoise);
        StatusCode code = kOk;
        bool blocks = args_.method == Method::block && !filtered_ && ctx.vocab > kBlock;
        if (filtered_) code = ctx.make_kept(temperature, o.top_k[draw], o.top_p[draw], o.min_p[draw], args_.stats != nullptr);
        else if (blocks) code = ctx.make_scan(temperature, false, args_.stats != nullptr);
        if (code != kOk) return {-kInf, -1, code};
        if (!blocks)
            return race_row<E>(ctx.row, ctx.vocab, noise, temperature, ctx.kept, ctx.scan_or_null(), ctx.cutoff(), threads_);
        const Stream clock(args_.streams, args_.logits.n1, draw, kBlockNoise);
        int64_t b = ctx.scanned ? race_blocks(ctx.scan, ctx.total, clock) : race_blocks_carefully<E>(ctx, temperature, clock);
        if (b < 0) return {-kInf, -1, kEmpty};
        const int64_t n = std::min(kBlock, ctx.vocab - b * kBlock);
        // The best score is a Gumbel variable around the logarithm of the block's mass: below that by 2 once in 1600 races. Who
        // starts from there has a sharp screen at once; where no token is above, the race is run again.
        const Block& block = ctx.scan.blocks[b];
        const double middle = ctx.scanned ? log_pos(static_cast<double>(block.sum)) + kLn2 * block.reference : -kInf;
        for (double bound : {middle - 2.0, -kInf}) {
            TokenRace<Best> race(noise, temperature, ctx.kept, Best{bound});
            race.template run<E>(ctx.row, b * kBlock, n, false);
            if (race.sink.token >= 0) return race.sink;
        }
        return {-kInf, -1, kEmpty};
    }

    void write_stats(RowContext<E>& ctx, int64_t draw, int64_t token, double temperature) const {
        if (!ctx.scanned && ctx.kept.all()) ctx.make_scan(temperature, false);
        double chosen = static_cast<double>(E::get(ctx.row + token));
        Stats s;
        if (!ctx.scanned) {
            s = careful_stats<E>(ctx.row, ctx.vocab, temperature, ctx.kept, chosen);
        } else if (ctx.kept.all()) {
            const Total& t = ctx.total;
            TopTwo top = row_top_two<E>(ctx.row, ctx.vocab, ctx.scan, t);
            Scale scale = ctx.scan.scale;
            scale.reference = t.reference;  // of the block with the row's maximum: references grow with the tops
            s = make_stats(chosen, top, temperature, E::scaled(top.first, scale), t.sum, t.weighted);
        } else {
            s = kept_stats<E>(ctx.row, ctx.vocab, temperature, ctx.kept, ctx.scan, ctx.total, ctx.cutoff(), chosen);
        }
        int64_t draws = args_.logits.n0 * args_.logits.n1;
        if (args_.logits.dtype == DType::f64) store_stats(static_cast<double*>(args_.stats), draws, draw, s);
        else store_stats(static_cast<float*>(args_.stats), draws, draw, s);
    }

    const CategoricalArgs& args_;
    int threads_;
    bool filtered_;
};

// Runs body(sampler, i), which returns a status, for i in [0, count); the status of the lowest failing draw.
template <typename Body> Status sample_rows(const CategoricalArgs& args, int64_t count, Body&& body) {
    const int64_t vocab = args.logits.vocab;
    if (count <= 0 || vocab <= 0) return kOk;
    // Many rows: a thread each. Few: all threads share a row, if it is long enough to pay for waking them.
    bool by_row = count >= 2 * args.threads || vocab < (1 << 16);
    // A thread takes some rows in turn, so that what it prefetches behind one is the next; few enough to share the work evenly.
    int64_t grain =
        std::max<int64_t>(1, std::min({int64_t(16), (int64_t(1) << 19) / vocab, count / (32 * std::max(1, args.threads))}));
    FirstError error;
    with_element(args.logits.dtype, [&](auto element) {
        parallel_for(count, grain, by_row ? args.threads : 1, [&](int64_t i, int64_t end, int) {
            const RowSampler<decltype(element)> sampler(args, by_row ? 1 : args.threads);
            for (; i < end; ++i) error.report(body(sampler, i));
        });
    });
    return error.get();
}

DRIFTMAX_END
