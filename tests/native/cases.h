// Random and hostile arguments for the ops that read logits.
#pragma once

#include <algorithm>

#include "support.h"

namespace fuzz {

using driftmax::Logits;
using driftmax::Options;
using driftmax::PerDraw;
using driftmax::Streams;

// Values per row: what breaks samplers.
enum Flavour {
    kMild,
    kWide,
    kConstant,
    kTies,
    kMostlyImpossible,
    kDenormal,
    kHuge,
    kSingle,
    kLateMaximum,
    kHeavyTail,
    kBelowZero,
    kDeepStretches,
    kBannedStretches,
    kImpossible,
    kHasNaN,
    kHasInfinite,
    kFlavours
};

struct Case {
    int64_t n0 = 0, n1 = 1, s0 = 0, s1 = 0, vocab = 0;
    Buffer logits;
    std::vector<int64_t> seeds, row_ids, positions;
    uint64_t seed = 0;
    uint32_t step = 0;
    std::vector<double> temperatures, top_ps, min_ps;
    std::vector<int64_t> top_ks;
    double temperature = 1.0, top_p = 1.0, min_p = 0.0;
    int64_t top_k = 0;

    int64_t draws() const { return n0 * n1; }
    double value(int64_t draw, int64_t v) const { return logits.get(draw / n1 * s0 + draw % n1 * s1 + v); }
    double temperature_of(int64_t i) const { return temperatures.empty() ? temperature : temperatures[i]; }
    double top_p_of(int64_t i) const { return top_ps.empty() ? top_p : top_ps[i]; }
    double min_p_of(int64_t i) const { return min_ps.empty() ? min_p : min_ps[i]; }
    int64_t top_k_of(int64_t i) const { return top_ks.empty() ? top_k : top_ks[i]; }

    Logits view() const { return {logits.data(), logits.dtype(), n0, n1, s0, s1, vocab}; }
    Streams streams() const { return {seed, pointer(seeds), pointer(row_ids), pointer(positions), step}; }
    Options options() const {
        Options o;
        o.temperature = PerDraw<double>{temperature, pointer(temperatures)};
        o.top_k = PerDraw<int64_t>{top_k, pointer(top_ks)};
        o.top_p = PerDraw<double>{top_p, pointer(top_ps)};
        o.min_p = PerDraw<double>{min_p, pointer(min_ps)};
        return o;
    }
    template <typename T> static const T* pointer(const std::vector<T>& v) { return v.empty() ? nullptr : v.data(); }
};

inline int64_t random_vocab(Random& r) {
    switch (r.below(8)) {
        case 0: return 1 + r.below(3);
        case 1: return 1 + r.below(70);
        case 2: return 1024 * (1 + r.below(4)) + r.below(3) - 1;  // the seams of blocks
        case 3: return 1024 + r.below(64);
        case 4: return 1 + r.below(30000);
        default: return 1 + r.below(3000);
    }
}

inline double random_value(Random& r, Flavour flavour, DType dtype, int64_t v, int64_t vocab) {
    double top = largest(dtype);
    switch (flavour) {
        case kWide: return 300.0 * r.normal();
        case kConstant: return 1.25;
        case kTies: return static_cast<double>(r.below(3));
        case kMostlyImpossible: return r.chance(50) || v == vocab / 2 ? r.normal() : -kInf;
        case kDenormal: return (r.chance(2) ? 1.0 : -1.0) * smallest(dtype) * static_cast<double>(r.below(3));
        case kHuge: return r.pick({top, -top, top / 2, 0.0, -0.0, 1.0});
        case kLateMaximum: return 200.0 * static_cast<double>(v) / static_cast<double>(vocab) + r.normal();
        case kHeavyTail: return v == 0 ? 18.0 : 0.0;
        case kBelowZero: return v % 5 == 0 && v > vocab / 2 ? 0.0 : -std::fabs(4.0 * r.normal()) - (r.chance(40) ? 60.0 : 0.0);
        case kDeepStretches: return r.normal() - (v / 700 % 3 == 1 ? r.pick({70.0, 90.0, 500.0}) : 0.0);
        case kBannedStretches: return v / 1100 % 2 ? -r.pick({1e9, 1e9, 1e10, 1e12}) * (1.0 + 0.25 * r.below(2)) : r.normal();
        case kSingle:
        case kImpossible: return -kInf;
        default: return 3.0 * r.normal();
    }
}

inline void fill_row(Random& r, Case& c, int64_t offset, Flavour flavour) {
    for (int64_t v = 0; v < c.vocab; ++v) c.logits.set(offset + v, random_value(r, flavour, c.logits.dtype(), v, c.vocab));
    int64_t at = offset + r.below(c.vocab);
    if (flavour == kSingle) c.logits.set(at, r.normal());
    if (flavour == kHasNaN) c.logits.set(at, std::numeric_limits<double>::quiet_NaN());
    if (flavour == kHasInfinite) c.logits.set(at, kInf);
}

inline void random_shape(Random& r, Case& c, bool only_float32) {
    c.vocab = random_vocab(r);
    c.n0 = r.chance(20) ? 0 : 1 + r.below(c.vocab > 5000 ? 3 : 12);
    c.n1 = r.chance(2) ? 1 : 1 + r.below(3);
    c.s1 = r.chance(12) ? 0 : c.vocab + (r.chance(2) ? 0 : r.below(9));
    c.s0 = r.chance(12) ? 0 : c.n1 * c.s1 + (r.chance(2) ? c.vocab : r.below(9));
    if (c.s0 == 0 && c.s1 == 0) c.s0 = c.vocab;
    DType dtype = only_float32 ? DType::f32 : r.pick({DType::f32, DType::f32, DType::f64, DType::f16, DType::bf16});
    int64_t count = c.draws() == 0 ? 0 : (c.n0 - 1) * c.s0 + (c.n1 - 1) * c.s1 + c.vocab;
    c.logits = Buffer(dtype, count, r.below(2));
    for (int64_t i = 0; i < count; ++i) c.logits.set(i, 0.0);
}

// `faults` allows rows that must be refused.
inline void random_values(Random& r, Case& c, bool faults) {
    bool mixed = r.chance(2);
    Flavour common = static_cast<Flavour>(r.below(kImpossible));
    for (int64_t i = 0; i < c.draws(); ++i) {
        Flavour flavour = mixed ? static_cast<Flavour>(r.below(kImpossible)) : common;
        if (faults && r.chance(8)) flavour = static_cast<Flavour>(kImpossible + r.below(kFlavours - kImpossible));
        fill_row(r, c, i / c.n1 * c.s0 + i % c.n1 * c.s1, flavour);
    }
}

inline void random_streams(Random& r, Case& c) {
    c.seed = r.chance(4) ? r.pick<uint64_t>({0, 1, ~uint64_t{0}, uint64_t{1} << 63}) : r.bits();
    c.step = static_cast<uint32_t>(r.below(1 << 24));
    if (r.chance(3))
        for (int64_t i = 0; i < c.n0; ++i) c.seeds.push_back(static_cast<int64_t>(r.bits()));
    if (r.chance(2))
        for (int64_t i = 0; i < c.n0; ++i) c.row_ids.push_back(r.below(int64_t{1} << 32));
    if (r.chance(2))
        for (int64_t i = 0; i < c.draws(); ++i) c.positions.push_back(r.below(int64_t{1} << 32));
}

inline double random_temperature(Random& r) {
    return r.chance(2) ? 1.0 : r.pick({0.0, 0.0, 1e-3, 0.7, 1.3, 50.0, 1e-30, 1e30, 2.0 * r.uniform()});
}

inline void random_options(Random& r, Case& c, bool filters) {
    auto top_k = [&] { return r.pick<int64_t>({0, 1, 2, c.vocab / 2, c.vocab, c.vocab + 1, INT64_MAX, 1 + r.below(60)}); };
    auto top_p = [&] { return r.pick({1.0, 0.5, 0.9, 0.999999, 1e-9, 5e-324, r.uniform()}); };
    auto min_p = [&] { return r.pick({0.0, 0.05, 1.0, 1e-300, r.uniform()}); };
    c.temperature = random_temperature(r);
    if (r.chance(4))
        for (int64_t i = 0; i < c.draws(); ++i) c.temperatures.push_back(random_temperature(r));
    if (!filters) return;
    if (r.chance(2)) c.top_k = top_k();
    if (r.chance(2)) c.top_p = top_p();
    if (r.chance(3)) c.min_p = min_p();
    for (int64_t i = 0, each = r.below(8); i < c.draws(); ++i) {
        if (each & 1) c.top_ks.push_back(top_k());
        if (each == 2 || each == 3) c.top_ps.push_back(top_p());
        if (each == 4 || each == 5) c.min_ps.push_back(min_p());
    }
}

inline Case random_case(Random& r, bool faults, bool filters, bool only_float32 = false) {
    Case c;
    random_shape(r, c, only_float32);
    random_values(r, c, faults);
    random_streams(r, c);
    random_options(r, c, filters);
    return c;
}

inline std::string describe(const Case& c) {
    char text[200];
    std::snprintf(text, sizeof text, "n0 %lld n1 %lld s0 %lld s1 %lld V %lld dtype %d T %g k %lld p %g min_p %g",
                  static_cast<long long>(c.n0), static_cast<long long>(c.n1), static_cast<long long>(c.s0),
                  static_cast<long long>(c.s1), static_cast<long long>(c.vocab), static_cast<int>(c.logits.dtype()),
                  c.temperature, static_cast<long long>(c.top_k), c.top_p, c.min_p);
    return text;
}

}  // namespace fuzz
