// Random and hostile arguments for every kernel, checked against oracle.h and against themselves on every instruction
// set, thread count and split of the batch. Any crash, out-of-range token, wrong status or differing bit aborts with the
// seed and case number to replay.
#include "isa.h"
#include "oracle.h"

namespace fuzz {
namespace {

using driftmax::CategoricalArgs;
using driftmax::Kernels;
using driftmax::Method;
using driftmax::Status;

struct Result {
    Status status = 0;
    std::vector<int64_t> tokens;
    Buffer stats;
    std::vector<double> scores;
    bool operator==(const Result& o) const {
        return status == o.status && (status != 0 || (tokens == o.tokens && stats.same_bytes(o.stats) && same_scores(o)));
    }
    bool same_scores(const Result& o) const {
        return scores.size() == o.scores.size() &&
               (scores.empty() || std::memcmp(scores.data(), o.scores.data(), scores.size() * 8) == 0);
    }
};

// Where two runs part, for the report.
std::string first_difference(const Result& a, const Result& b) {
    if (a.status != b.status) return ": status " + std::to_string(b.status) + " for " + std::to_string(a.status);
    for (size_t i = 0; i < a.tokens.size(); ++i)
        if (a.tokens[i] != b.tokens[i])
            return ": token " + std::to_string(i) + " is " + std::to_string(b.tokens[i]) + " for " + std::to_string(a.tokens[i]);
    char text[120];
    for (int64_t i = 0; i < a.stats.count(); ++i) {
        std::snprintf(text, sizeof text, ": statistic %lld is %.17g for %.17g", static_cast<long long>(i), b.stats.get(i),
                      a.stats.get(i));
        double x = a.stats.get(i), y = b.stats.get(i);
        if (std::memcmp(&x, &y, 8) != 0) return text;
    }
    return ": scores";
}

std::string draw_text(int64_t draw, int64_t token) { return "draw " + std::to_string(draw) + ", token " + std::to_string(token); }

void check_status(const Case& c, const std::vector<Row>& rows, Status status) {
    bool any = false;
    for (const Row& row : rows) any |= row.fault != driftmax::kOk;
    if (!any) return require(status == 0, "status " + std::to_string(status) + " without a fault");
    require(status != 0, "a fault went unnoticed");
    int64_t draw = status >> 8, code = status & 255;
    require(draw >= 0 && draw < c.draws(), "status names row " + std::to_string(draw));
    require(code == rows[draw].fault || code == rows[draw].other_fault,
            "code " + std::to_string(code) + " for row " + std::to_string(draw));
}

std::vector<Row> read_rows(const Case& c) {
    std::vector<Row> rows;
    for (int64_t i = 0; i < c.draws(); ++i) rows.push_back(read_row(c, i));
    return rows;
}

// ---- categorical -----------------------------------------------------------------------------------------------------

Result run_categorical(const Kernels& kernels, const Case& c, Method method, bool stats, int threads) {
    Result r;
    r.tokens.assign(c.draws(), -7);
    if (stats) r.stats = Buffer(c.logits.dtype() == DType::f64 ? DType::f64 : DType::f32, 4 * c.draws());
    CategoricalArgs a;
    a.logits = c.view();
    a.streams = c.streams();
    a.options = c.options();
    a.method = method;
    a.tokens = r.tokens.data();
    a.stats = stats ? r.stats.data() : nullptr;
    a.threads = threads;
    r.status = kernels.categorical(a);
    return r;
}

// One draw of a case as a batch of its own.
Case single(const Case& c, int64_t draw) {
    Case s;
    int64_t lead = draw / c.n1;
    s.n0 = s.n1 = 1;
    s.s0 = s.s1 = s.vocab = c.vocab;
    s.logits = Buffer(c.logits.dtype(), c.vocab);
    std::memcpy(s.logits.data(),
                static_cast<const unsigned char*>(c.logits.data()) +
                    (lead * c.s0 + draw % c.n1 * c.s1) * static_cast<int64_t>(size_of(c.logits.dtype())),
                s.logits.nbytes());
    s.seed = c.seeds.empty() ? c.seed : static_cast<uint64_t>(c.seeds[lead]);
    s.step = c.step;
    s.row_ids = {c.row_ids.empty() ? lead : c.row_ids[lead]};
    s.positions = {c.positions.empty() ? draw % c.n1 : c.positions[draw]};
    s.temperature = c.temperature_of(draw);
    s.top_k = c.top_k;
    s.top_p = c.top_p;
    s.min_p = c.min_p;
    // A filter given per draw makes a draw filtered (a token race) whatever its value: keep the form.
    if (!c.top_ks.empty()) s.top_ks = {c.top_ks[draw]};
    if (!c.top_ps.empty()) s.top_ps = {c.top_ps[draw]};
    if (!c.min_ps.empty()) s.min_ps = {c.min_ps[draw]};
    return s;
}

void check_stat(double got, double want, const char* name, int64_t draw) {
    if (std::fabs(got - want) <= 1e-5 + 1e-5 * std::fabs(want)) return;
    char text[160];
    std::snprintf(text, sizeof text, "%s of draw %lld is %.9g, should be %.9g", name, static_cast<long long>(draw), got, want);
    fail(text);
}

void check_stats(const Case& c, const Row& row, const Kept& kept, int64_t draw, const Result& r) {
    if (!kept.known) return;
    ExpectedStats want = expected_stats(row, kept, r.tokens[draw]);
    if (std::fabs(want.log_z) > 1e9 || std::fabs(want.log_prob) > 1e30) return;  // doubles near log Z are 1e-7 apart
    check_stat(r.stats.get(draw), want.log_prob, "log_prob", draw);
    check_stat(r.stats.get(c.draws() + draw), want.log_z, "log_z", draw);
    check_stat(r.stats.get(2 * c.draws() + draw), want.entropy, "entropy", draw);
    check_stat(r.stats.get(3 * c.draws() + draw), want.margin, "margin", draw);
}

void check_draw(const Case& c, const Row& row, int64_t draw, Method method, const Result& r) {
    int64_t token = r.tokens[draw];
    require(token >= 0 && token < c.vocab, "out of range: " + draw_text(draw, token));
    require(row.logit[token] > -kInf, "impossible token: " + draw_text(draw, token));
    Kept kept = kept_set(c, draw, row);
    require(!kept.known || kept.in[token], "filtered token: " + draw_text(draw, token));
    int64_t want = expected_token(c, row, kept, draw, method);
    require(want < 0 || want == token, "expected " + std::to_string(want) + ": " + draw_text(draw, token));
    if (r.stats.count()) check_stats(c, row, kept, draw, r);
}

void fuzz_categorical(Random& r) {
    Case c = random_case(r, r.chance(4), r.chance(2));
    Method method = r.chance(2) ? Method::block : Method::gumbel;
    bool stats = r.chance(2);
    context().what = "categorical, " + describe(c) + (method == Method::block ? " block" : " gumbel");
    const Kernels* all = driftmax::available_kernels();
    Result first = run_categorical(all[0], c, method, stats, 1);
    std::vector<Row> rows = read_rows(c);
    check_status(c, rows, first.status);
    for (const Kernels* k = all; k->name; ++k) {
        int threads = static_cast<int>(1 + r.below(9));
        Result again = run_categorical(*k, c, method, stats, threads);
        if (first.status != 0) require(again.status != 0, std::string("no fault seen on ") + k->name);
        else
            require(again == first, std::string("differs on ") + k->name + " with threads " + std::to_string(threads) +
                                        first_difference(first, again));
    }
    if (first.status != 0) return;
    for (int64_t i = 0; i < c.draws(); ++i) check_draw(c, rows[i], i, method, first);
    if (c.draws() == 0) return;
    int64_t draw = r.below(c.draws());
    Result alone = run_categorical(all[0], single(c, draw), method, stats, static_cast<int>(1 + r.below(4)));
    require(alone.tokens[0] == first.tokens[draw],
            "alone " + std::to_string(alone.tokens[0]) + ", in its batch " + draw_text(draw, first.tokens[draw]));
    for (int64_t j = 0; stats && j < 4; ++j)
        require(alone.stats.get(j) == first.stats.get(j * c.draws() + draw), "a statistic depends on the batch");
}

// ---- gumbel_topk -----------------------------------------------------------------------------------------------------

Result run_topk(const Kernels& kernels, const Case& c, int64_t k, bool scores, int threads) {
    Result r;
    r.tokens.assign(c.draws() * k, -7);
    if (scores) r.scores.assign(c.draws() * k, -7.0);
    driftmax::GumbelTopkArgs a;
    a.logits = c.view();
    a.streams = c.streams();
    a.options = c.options();
    a.k = k;
    a.tokens = r.tokens.data();
    a.scores = scores ? r.scores.data() : nullptr;
    a.threads = threads;
    r.status = kernels.gumbel_topk(a);
    return r;
}

void check_ranking(const Case& c, const Row& row, const Kept& kept, int64_t draw, int64_t k, const Result& r) {
    std::vector<std::pair<double, int64_t>> order;  // minus the score, token: sorts as the contract says
    for (int64_t v = 0; v < c.vocab; ++v)
        if (kept.in[v])
            order.emplace_back(-(row.temperature > 0 ? race_score(c, row, draw, v, driftmax::oracle::kTopkNoise) : row.logit[v]),
                               v);
    std::partial_sort(order.begin(), order.begin() + k, order.end());
    for (int64_t j = 0; j < k; ++j) {
        int64_t token = r.tokens[draw * k + j];
        require(token == order[j].second,
                "rank " + std::to_string(j) + " should be " + std::to_string(order[j].second) + ": " + draw_text(draw, token));
        if (!r.scores.empty()) require(r.scores[draw * k + j] == -order[j].first, "score: " + draw_text(draw, token));
    }
}

void check_topk(const Case& c, const std::vector<Row>& rows, const std::vector<Kept>& kept, int64_t k, const Result& r) {
    for (int64_t i = 0; i < c.draws(); ++i) {
        std::vector<int64_t> seen(r.tokens.begin() + i * k, r.tokens.begin() + (i + 1) * k);
        for (int64_t token : seen) {
            require(token >= 0 && token < c.vocab, "out of range: " + draw_text(i, token));
            require(rows[i].logit[token] > -kInf, "impossible token: " + draw_text(i, token));
        }
        std::sort(seen.begin(), seen.end());
        require(std::adjacent_find(seen.begin(), seen.end()) == seen.end(), "a token twice in draw " + std::to_string(i));
        if (kept[i].known) check_ranking(c, rows[i], kept[i], i, k, r);
    }
}

void fuzz_topk(Random& r) {
    Case c = random_case(r, r.chance(6), r.chance(3));
    int64_t k = std::min(c.vocab, r.chance(4) ? c.vocab : 1 + r.below(20));
    context().what = "gumbel_topk k " + std::to_string(k) + ", " + describe(c);
    std::vector<Row> rows = read_rows(c);
    std::vector<Kept> kept;
    bool fault = false, few = false, sure = true;
    for (int64_t i = 0; i < c.draws(); ++i) {
        fault |= rows[i].fault != driftmax::kOk;
        kept.push_back(rows[i].fault == driftmax::kOk ? kept_set(c, i, rows[i]) : Kept{});
        sure = sure && (kept[i].known || c.vocab == 1);
        few |= rows[i].fault == driftmax::kOk && kept[i].count < k;
    }
    const Kernels* all = driftmax::available_kernels();
    bool scores = r.chance(2);
    Result first = run_topk(all[0], c, k, scores, 1);
    if (fault || few) require(first.status != 0 || !sure, "a fault went unnoticed");
    else if (sure) require(first.status == 0, "status " + std::to_string(first.status) + " without a fault");
    if (few && !fault && sure) require((first.status & 255) == driftmax::kTooFew, "not reported as too few");
    for (const Kernels* kernels = all; kernels->name; ++kernels) {
        Result again = run_topk(*kernels, c, k, scores, static_cast<int>(1 + r.below(9)));
        if (first.status != 0) require(again.status != 0, std::string("no fault seen on ") + kernels->name);
        else require(again == first, std::string("differs on ") + kernels->name);
    }
    if (first.status == 0) check_topk(c, rows, kept, k, first);
}

// ---- lm_head ---------------------------------------------------------------------------------------------------------

Result run_lm_head(const Kernels& kernels, const Case& c, Method method, bool stats, int64_t tile, int threads) {
    Result r;
    r.tokens.assign(c.draws(), -7);
    if (stats) r.stats = Buffer(DType::f32, 4 * c.draws());
    std::vector<unsigned char> state(c.draws() * kernels.lm_head_state_bytes(), 0);
    PerDraw<double> temperature = c.options().temperature;
    for (int64_t begin = 0; begin < c.vocab && r.status == 0; begin += tile) {
        driftmax::LmHeadTileArgs a;
        a.draws = c.draws();
        a.begin = begin;
        a.columns = std::min(tile, c.vocab - begin);
        a.row_stride = a.columns + 3;
        Buffer columns(DType::f32, a.draws ? (a.draws - 1) * a.row_stride + a.columns : 0);
        for (int64_t i = 0; i < a.draws; ++i)
            for (int64_t v = 0; v < a.columns; ++v) columns.set(i * a.row_stride + v, c.value(i, begin + v));
        a.tile = static_cast<const float*>(columns.data());
        a.vocab = c.vocab;
        a.n1 = c.n1;
        a.streams = c.streams();
        a.temperature = temperature;
        a.method = method;
        a.stats = stats;
        a.state = state.data();
        a.threads = threads;
        r.status = kernels.lm_head_tile(a);
    }
    driftmax::LmHeadFinishArgs f;
    f.state = state.data();
    f.draws = c.draws();
    f.temperature = temperature;
    f.tokens = r.tokens.data();
    f.stats = stats ? static_cast<float*>(r.stats.data()) : nullptr;
    f.stats_stride = c.draws();
    if (r.status != 0) return r;
    r.status = kernels.lm_head_finish(f);
    return r;
}

void fuzz_lm_head(Random& r) {
    Case c = random_case(r, r.chance(6), false, true);
    Method method = r.chance(2) ? Method::block : Method::gumbel;
    bool stats = r.chance(2);
    int64_t tile = 1024 * (1 + r.below(4));
    context().what =
        "lm_head tile " + std::to_string(tile) + ", " + describe(c) + (method == Method::block ? " block" : " gumbel");
    const Kernels* all = driftmax::available_kernels();
    Result first = run_lm_head(all[0], c, method, stats, tile, 1);
    std::vector<Row> rows = read_rows(c);
    if (first.status != 0 && rows[first.status >> 8].extreme) return;
    check_status(c, rows, first.status);
    for (const Kernels* k = all; k->name; ++k) {
        Result again = run_lm_head(*k, c, method, stats, 1024 * (1 + r.below(4)), static_cast<int>(1 + r.below(9)));
        if (first.status != 0) require(again.status != 0, std::string("no fault seen on ") + k->name);
        else require(again.tokens == first.tokens, std::string("differs on ") + k->name);
    }
    if (first.status != 0) return;
    for (int64_t i = 0; i < c.draws(); ++i) check_draw(c, rows[i], i, method, first);
}

// ---- steps of masked diffusion ---------------------------------------------------------------------------------------

struct Step {
    std::vector<int64_t> tokens, forbidden;
    std::vector<double> probabilities;
    int64_t mask_id = 0;
    bool is_forbidden(int64_t token) const {
        return token == mask_id || std::find(forbidden.begin(), forbidden.end(), token) != forbidden.end();
    }
};

Step random_step(Random& r, const Case& c) {
    Step s;
    s.mask_id = r.chance(2) ? r.below(c.vocab) : r.pick<int64_t>({-1, c.vocab, INT64_MAX, INT64_MIN});
    for (int64_t i = 0; i < c.draws(); ++i) s.tokens.push_back(r.chance(3) ? r.below(c.vocab) : s.mask_id);
    for (int64_t i = 0; i < c.n0; ++i) s.probabilities.push_back(r.pick({0.0, 1.0, 0.5, r.uniform()}));
    for (int64_t i = r.chance(2) ? 0 : r.below(5); i > 0; --i) s.forbidden.push_back(r.below(c.vocab + 4) - 2);
    return s;
}

struct Stepped {
    Status status = 0;
    std::vector<int64_t> tokens, revealed;
};

Stepped run_unmask(const Kernels& kernels, const Case& c, const Step& s, int threads) {
    Stepped out{0, s.tokens, std::vector<int64_t>(c.n0, -7)};
    driftmax::UnmaskArgs a;
    a.logits = c.view();
    a.streams = c.streams();
    a.temperature = c.options().temperature;
    a.probability = PerDraw<double>{0.0, Case::pointer(s.probabilities)};
    a.tokens = out.tokens.data();
    a.revealed = out.revealed.data();
    a.mask_id = s.mask_id;
    a.forbidden = Case::pointer(s.forbidden);
    a.forbidden_count = static_cast<int64_t>(s.forbidden.size());
    a.threads = threads;
    out.status = kernels.unmask(a);
    return out;
}

bool is_revealed(const Case& c, const Step& s, int64_t draw) {
    driftmax::oracle::Stream clock = stream_of(c, draw, driftmax::oracle::kUniform);
    uint64_t element = clock.position;
    clock.position = 0;
    double u = driftmax::oracle::uniform(clock.word(element), clock.plane1().word(element), double());
    return s.tokens[draw] == s.mask_id && u < s.probabilities[draw / c.n1];
}

// The step from its parts: each revealed draw as a batch of its own, forbidden columns set by hand.
Stepped expected_step(const Kernels& kernels, const Case& c, const Step& s) {
    Stepped want{0, s.tokens, std::vector<int64_t>(c.n0, 0)};
    for (int64_t i = 0; i < c.draws(); ++i) {
        if (!is_revealed(c, s, i)) continue;
        Case one = single(c, i);
        for (int64_t v = 0; v < c.vocab; ++v)
            if (s.is_forbidden(v)) one.logits.set(v, -kInf);
        Result drawn = run_categorical(kernels, one, Method::block, false, 1);
        if (drawn.status != 0 && want.status == 0)
            want.status = driftmax::status(static_cast<driftmax::StatusCode>(drawn.status & 255), i);
        want.tokens[i] = drawn.tokens[0];
        ++want.revealed[i / c.n1];
    }
    if (want.status != 0) want.tokens = s.tokens;
    return want;
}

void fuzz_unmask(Random& r) {
    Case c = random_case(r, r.chance(4), false);
    Step s = random_step(r, c);
    context().what = "unmask mask " + std::to_string(s.mask_id) + ", " + describe(c);
    const Kernels* all = driftmax::available_kernels();
    Stepped want = expected_step(all[0], c, s);
    for (const Kernels* k = all; k->name; ++k) {
        Stepped got = run_unmask(*k, c, s, static_cast<int>(1 + r.below(9)));
        bool same = (got.status == 0) == (want.status == 0) && got.status >> 8 == want.status >> 8;
        require(same, "status " + std::to_string(got.status) + " for " + std::to_string(want.status) + " on " + k->name);
        require(got.tokens == want.tokens, std::string("tokens differ on ") + k->name);
        require(want.status != 0 || got.revealed == want.revealed, std::string("counts differ on ") + k->name);
    }
}

void fuzz_transfer(Random& r) {
    driftmax::TransferArgs a;
    a.rows = r.chance(10) ? 0 : 1 + r.below(6);
    a.length = r.chance(10) ? 0 : 1 + r.below(r.chance(4) ? 3000 : 60);
    a.dtype = r.chance(2) ? DType::f32 : DType::f64;
    a.mask_id = 5;
    a.end = a.length - (r.chance(2) ? 0 : r.below(a.length + 1));
    a.begin = r.chance(2) ? 0 : r.below(a.length + 1);
    a.rule = r.chance(2) ? driftmax::TransferRule::count : driftmax::TransferRule::threshold;
    a.threshold.scalar = r.pick({0.0, -kInf, kInf, 1.0});
    const int64_t size = a.rows * a.length;
    context().what = "transfer rows " + std::to_string(a.rows) + " length " + std::to_string(a.length);
    Buffer scores(a.dtype, size);
    std::vector<int64_t> start, drawn, counts;
    std::vector<uint8_t> eligible;
    for (int64_t i = 0; i < size; ++i) {
        scores.set(i, r.pick({0.0, -0.0, r.normal(), r.normal(), kInf, -kInf, std::numeric_limits<double>::quiet_NaN()}));
        start.push_back(r.chance(3) ? 1 : a.mask_id);
        drawn.push_back(10 + i);
        eligible.push_back(r.chance(3) ? 0 : 1);
    }
    for (int64_t b = 0; b < a.rows; ++b) counts.push_back(r.pick<int64_t>({0, 1, a.length, INT64_MAX, r.below(a.length + 1)}));
    a.scores = scores.data();
    a.drawn = drawn.data();
    a.count.values = counts.data();
    if (r.chance(2)) a.eligible = eligible.data();
    std::vector<int64_t> want = start;
    for (int64_t b = 0; b < a.rows; ++b) {
        std::vector<int64_t> order;
        for (int64_t j = a.begin; j < a.end; ++j)
            if (int64_t i = b * a.length + j; start[i] == a.mask_id && (!a.eligible || eligible[i])) order.push_back(i);
        auto score = [&](int64_t i) { return std::isnan(scores.get(i)) ? -kInf : scores.get(i); };
        std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return score(i) > score(j); });
        int64_t many = counts[b];
        if (a.rule == driftmax::TransferRule::threshold)
            many = std::max(many,
                            std::count_if(order.begin(), order.end(), [&](int64_t i) { return score(i) >= a.threshold.scalar; }));
        for (int64_t i = 0; i < std::min(many, static_cast<int64_t>(order.size())); ++i) want[order[i]] = drawn[order[i]];
    }
    for (const Kernels* k = driftmax::available_kernels(); k->name; ++k) {
        std::vector<int64_t> tokens = start;
        std::vector<uint8_t> moved(size, 7);
        a.tokens = tokens.data();
        a.moved = moved.data();
        a.threads = static_cast<int>(1 + r.below(9));
        k->transfer(a);
        require(tokens == want, std::string("tokens differ on ") + k->name);
        for (int64_t i = 0; i < size; ++i) require(moved[i] == (want[i] != start[i]), "wrong flag at " + std::to_string(i));
    }
}

// ---- fills -----------------------------------------------------------------------------------------------------------

struct FillCase {
    driftmax::FillArgs args;
    std::vector<int64_t> seeds, row_ids, positions;
    int64_t count = 0;
};

FillCase random_fill(Random& r) {
    FillCase f;
    driftmax::FillArgs& a = f.args;
    a.kind = static_cast<int>(1 + r.below(5));
    a.dtype = a.kind == 1 ? DType::i32 : r.chance(2) ? DType::f32 : DType::f64;
    a.rows = r.chance(10) ? 0 : 1 + r.below(6);
    a.row_length = r.chance(20) ? 0 : r.chance(3) ? 1 + r.below(9) : 1 + r.below(6000);
    a.row_stride = a.row_length + (r.chance(2) ? 0 : r.below(5));
    f.count = a.rows && a.row_length ? (a.rows - 1) * a.row_stride + a.row_length : 0;
    a.streams.seed = r.bits();
    a.streams.step = static_cast<uint32_t>(r.below(1 << 24));
    for (int64_t i = 0, which = r.below(8); i < a.rows; ++i) {
        if (which & 1) f.seeds.push_back(static_cast<int64_t>(r.bits()));
        if (which & 2) f.row_ids.push_back(r.below(int64_t{1} << 32));
        if (which & 4) f.positions.push_back(r.below(int64_t{1} << 32));
    }
    a.streams.seeds = Case::pointer(f.seeds);
    a.streams.row_ids = Case::pointer(f.row_ids);
    a.streams.positions = Case::pointer(f.positions);
    return f;
}

template <typename F>
F expected_noise(int kind, const driftmax::oracle::Stream& s, int64_t element) {
    namespace o = driftmax::oracle;
    uint32_t hi = s.word(element), lo = s.plane1().word(element);
    if (kind == 2) return o::uniform(hi, lo, F());
    if (kind == 3) return o::exponential<F>(hi, lo);
    if (kind == 4) return o::gumbel<F>(hi, lo);
    int64_t pair = element & ~int64_t{1};
    F cosine, sine, radius = std::sqrt(F(2) * o::exponential<F>(s.word(pair), s.plane1().word(pair)));
    o::turn(s.word(pair + 1), s.plane1().word(pair + 1), cosine, sine);
    return radius * (element & 1 ? sine : cosine);
}

void check_element(const driftmax::FillArgs& a, const Buffer& out, int64_t row, int64_t element) {
    // positions of a fill are one per row, 0 when absent, whatever n1: a stream of one draw a row says the same
    driftmax::Streams streams = a.streams;
    std::vector<int64_t> zeros(a.rows, 0);
    if (!streams.positions) streams.positions = zeros.data();
    driftmax::oracle::Stream s(streams, 1, row, static_cast<uint32_t>(a.kind));
    const unsigned char* p =
        static_cast<const unsigned char*>(out.data()) + (row * a.row_stride + element) * static_cast<int64_t>(size_of(a.dtype));
    bool same;
    if (a.kind == 1) {
        uint32_t want = s.word(element);
        same = std::memcmp(p, &want, 4) == 0;
    } else if (a.dtype == DType::f32) {
        float want = expected_noise<float>(a.kind, s, element);
        same = std::memcmp(p, &want, 4) == 0;
    } else {
        double want = expected_noise<double>(a.kind, s, element);
        same = std::memcmp(p, &want, 8) == 0;
    }
    require(same, "row " + std::to_string(row) + " element " + std::to_string(element) + " is " +
                      std::to_string(out.get(row * a.row_stride + element)));
}

void fuzz_fill(Random& r) {
    FillCase f = random_fill(r);
    driftmax::FillArgs& a = f.args;
    context().what = "fill kind " + std::to_string(a.kind) + " dtype " + std::to_string(static_cast<int>(a.dtype)) + " rows " +
                     std::to_string(a.rows) + " length " + std::to_string(a.row_length);
    int64_t skip = r.below(2);
    Buffer first(a.dtype, f.count, skip), untouched(a.dtype, f.count, skip);
    const Kernels* all = driftmax::available_kernels();
    for (const Kernels* k = all; k->name; ++k) {
        Buffer out(a.dtype, f.count, skip);
        a.out = k == all ? first.data() : out.data();
        a.threads = static_cast<int>(1 + r.below(9));
        k->fill(a);
        if (k != all) require(out.same_bytes(first), std::string("differs on ") + k->name);
    }
    if (f.count == 0) return;
    for (int i = 0; i < 64; ++i) check_element(a, first, r.below(a.rows), r.below(a.row_length));
    check_element(a, first, a.rows - 1, a.row_length - 1);
    for (int64_t row = 0; row + 1 < a.rows; ++row)  // the gaps between rows belong to somebody else
        for (int64_t i = row * a.row_stride + a.row_length; i < (row + 1) * a.row_stride; ++i)
            require(
                std::memcmp(static_cast<const unsigned char*>(first.data()) + i * size_of(a.dtype),
                            static_cast<const unsigned char*>(untouched.data()) + i * size_of(a.dtype), size_of(a.dtype)) == 0,
                "wrote between rows");
}

void run_case(uint64_t seed, uint64_t number) {
    context() = {seed, number, "shaping"};
    Random r(seed, number);
    switch (r.below(7)) {
        case 0: return fuzz_topk(r);
        case 1: return fuzz_lm_head(r);
        case 2: return fuzz_fill(r);
        case 3: return fuzz_unmask(r);
        case 4: return fuzz_transfer(r);
        default: return fuzz_categorical(r);
    }
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
    fuzz::Settings settings = fuzz::parse(argc, argv);
    if (settings.only >= 0) {
        fuzz::run_case(settings.seed, static_cast<uint64_t>(settings.only));
        std::printf("case %lld passed\n", static_cast<long long>(settings.only));
        return 0;
    }
    uint64_t number = 0;
    for (double end = fuzz::now() + settings.seconds; fuzz::now() < end; ++number) fuzz::run_case(settings.seed, number);
    std::printf("fuzz_core: %llu cases passed\n", static_cast<unsigned long long>(number));
    return 0;
}
