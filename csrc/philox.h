// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the counter
// layout of docs/numerics.md.
#pragma once

#include "simd.h"

DRIFTMAX_BEGIN

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr uint32_t kPlane = 0x80u;  // purpose bit of the low words

enum Purpose : uint32_t {
    kBits = 1,
    kUniform = 2,
    kExponential = 3,
    kGumbel = 4,
    kNormal = 5,
    kTokenNoise = 16,
    kBlockNoise = 17,
    kTopkNoise = 18
};

struct Words {
    uint32_t w[4];
};

inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        uint64_t a = static_cast<uint64_t>(kPhiloxM0) * c0, b = static_cast<uint64_t>(kPhiloxM1) * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(a);
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    return {{c0, c1, c2, c3}};
}

// One stream: everything of the counter but the block number.
struct Stream {
    uint32_t k0, k1, position, step_purpose, row;

    Stream(const Streams& s, int64_t n1, int64_t draw, uint32_t purpose) {
        int64_t lead = draw / n1;
        uint64_t seed = s.seeds ? static_cast<uint64_t>(s.seeds[lead]) : s.seed;
        k0 = static_cast<uint32_t>(seed);
        k1 = static_cast<uint32_t>(seed >> 32);
        position = static_cast<uint32_t>(s.positions ? s.positions[draw] : draw - lead * n1);
        step_purpose = s.step | purpose << 24;
        row = static_cast<uint32_t>(s.row_ids ? s.row_ids[lead] : lead);
    }
    Stream plane1() const {
        Stream s = *this;
        s.step_purpose |= kPlane << 24;
        return s;
    }
    Words block(uint64_t number) const {
        return philox(static_cast<uint32_t>(number), position + static_cast<uint32_t>(number >> 32), step_purpose, row, k0, k1);
    }
    uint32_t word(uint64_t element) const { return block(element / 4).w[element % 4]; }
};

// ---- lanes of 64 bits whose low halves carry the state ----------------------------------------------------------------
#if DRIFTMAX_AVX512
using wide = __m512i;
DRIFTMAX_INLINE wide w_set(uint32_t x) { return _mm512_set1_epi64(x); }
DRIFTMAX_INLINE wide w_mul(wide a, wide m) { return _mm512_mul_epu32(a, m); }
DRIFTMAX_INLINE wide w_high(wide a) { return _mm512_srli_epi64(a, 32); }
DRIFTMAX_INLINE wide w_xor(wide a, wide b, wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
DRIFTMAX_INLINE wide w_add(wide a, wide b) { return _mm512_add_epi64(a, b); }
// counters 0..7, so placed that the unpacked words come out in order
DRIFTMAX_INLINE wide w_iota() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
// numbers[i] in the lanes of w_iota's order
DRIFTMAX_INLINE wide w_gather(const uint32_t* n) { return _mm512_set_epi64(n[7], n[3], n[6], n[2], n[5], n[1], n[4], n[0]); }
DRIFTMAX_INLINE void w_store(uint32_t* out, wide c0, wide c1, wide c2, wide c3) {
    wide a = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
    wide b = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, b));
}
#elif DRIFTMAX_AVX2
using wide = __m256i;
DRIFTMAX_INLINE wide w_set(uint32_t x) { return _mm256_set1_epi64x(x); }
DRIFTMAX_INLINE wide w_mul(wide a, wide m) { return _mm256_mul_epu32(a, m); }
DRIFTMAX_INLINE wide w_high(wide a) { return _mm256_srli_epi64(a, 32); }
DRIFTMAX_INLINE wide w_xor(wide a, wide b, wide c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
DRIFTMAX_INLINE wide w_add(wide a, wide b) { return _mm256_add_epi64(a, b); }
DRIFTMAX_INLINE wide w_iota() { return _mm256_set_epi64x(3, 1, 2, 0); }
DRIFTMAX_INLINE wide w_gather(const uint32_t* n) { return _mm256_set_epi64x(n[3], n[1], n[2], n[0]); }
DRIFTMAX_INLINE void w_store(uint32_t* out, wide c0, wide c1, wide c2, wide c3) {
    wide a = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    wide b = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(a, b));
}
#elif DRIFTMAX_SSE
using wide = __m128i;
DRIFTMAX_INLINE wide w_set(uint32_t x) { return _mm_set1_epi64x(x); }
DRIFTMAX_INLINE wide w_mul(wide a, wide m) { return _mm_mul_epu32(a, m); }
DRIFTMAX_INLINE wide w_high(wide a) { return _mm_srli_epi64(a, 32); }
DRIFTMAX_INLINE wide w_xor(wide a, wide b, wide c) { return _mm_xor_si128(a, _mm_xor_si128(b, c)); }
DRIFTMAX_INLINE wide w_add(wide a, wide b) { return _mm_add_epi64(a, b); }
DRIFTMAX_INLINE wide w_iota() { return _mm_set_epi64x(1, 0); }
DRIFTMAX_INLINE wide w_gather(const uint32_t* n) { return _mm_set_epi64x(n[1], n[0]); }
DRIFTMAX_INLINE void w_store(uint32_t* out, wide c0, wide c1, wide c2, wide c3) {
    wide a = _mm_blend_epi16(c0, _mm_slli_epi64(c1, 32), 0xCC);
    wide b = _mm_blend_epi16(c2, _mm_slli_epi64(c3, 32), 0xCC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi64(a, b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4), _mm_unpackhi_epi64(a, b));
}
#elif DRIFTMAX_NEON
using wide = uint64x2_t;
DRIFTMAX_INLINE wide w_set(uint32_t x) { return vdupq_n_u64(x); }
DRIFTMAX_INLINE wide w_mul(wide a, wide m) { return vmull_u32(vmovn_u64(a), vmovn_u64(m)); }
DRIFTMAX_INLINE wide w_high(wide a) { return vshrq_n_u64(a, 32); }
DRIFTMAX_INLINE wide w_xor(wide a, wide b, wide c) { return veorq_u64(a, veorq_u64(b, c)); }
DRIFTMAX_INLINE wide w_add(wide a, wide b) { return vaddq_u64(a, b); }
DRIFTMAX_INLINE wide w_iota() { return vcombine_u64(vcreate_u64(0), vcreate_u64(1)); }
DRIFTMAX_INLINE wide w_gather(const uint32_t* n) { return vmovl_u32(vld1_u32(n)); }
DRIFTMAX_INLINE void w_store(uint32_t* out, wide c0, wide c1, wide c2, wide c3) {
    uint32x4_t a = vreinterpretq_u32_u64(vsliq_n_u64(c0, c1, 32)), b = vreinterpretq_u32_u64(vsliq_n_u64(c2, c3, 32));
    vst1q_u32(out, vcombine_u32(vget_low_u32(a), vget_low_u32(b)));
    vst1q_u32(out + 4, vcombine_u32(vget_high_u32(a), vget_high_u32(b)));
}
#else
struct wide {
    uint64_t v[2];
};
DRIFTMAX_INLINE wide w_set(uint32_t x) { return {{x, x}}; }
DRIFTMAX_INLINE wide w_mul(wide a, wide m) {
    return {{(a.v[0] & 0xffffffffu) * (m.v[0] & 0xffffffffu), (a.v[1] & 0xffffffffu) * (m.v[1] & 0xffffffffu)}};
}
DRIFTMAX_INLINE wide w_high(wide a) { return {{a.v[0] >> 32, a.v[1] >> 32}}; }
DRIFTMAX_INLINE wide w_xor(wide a, wide b, wide c) { return {{a.v[0] ^ b.v[0] ^ c.v[0], a.v[1] ^ b.v[1] ^ c.v[1]}}; }
DRIFTMAX_INLINE wide w_add(wide a, wide b) { return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}}; }
DRIFTMAX_INLINE wide w_iota() { return {{0, 1}}; }
DRIFTMAX_INLINE wide w_gather(const uint32_t* n) { return {{n[0], n[1]}}; }
DRIFTMAX_INLINE void w_store(uint32_t* out, wide c0, wide c1, wide c2, wide c3) {
    for (int i = 0; i < 2; ++i) {
        out[4 * i] = static_cast<uint32_t>(c0.v[i]);
        out[4 * i + 1] = static_cast<uint32_t>(c1.v[i]);
        out[4 * i + 2] = static_cast<uint32_t>(c2.v[i]);
        out[4 * i + 3] = static_cast<uint32_t>(c3.v[i]);
    }
}
#endif

constexpr int kWide = sizeof(wide) / 8;  // counters of one `wide`
constexpr int kChains = 4;               // independent chains, to cover the multiplier's latency

inline uint32_t mul_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }

// The part of a stream's blocks that does not vary over the lanes: c1, c2 and c3 are the same, so that rounds 1 and 2 need
// one vector multiplication each instead of two.
struct Schedule {
    uint32_t k0[10], k1[10], c3, a1, b2, b3;
    Schedule(const Stream& s, uint32_t high) : c3(s.row) {
        for (uint32_t r = 0; r < 10; ++r) {
            k0[r] = s.k0 + r * kPhiloxW0;
            k1[r] = s.k1 + r * kPhiloxW1;
        }
        uint32_t a0 = mul_high(kPhiloxM1, s.step_purpose) ^ (s.position + high) ^ k0[0];  // round 1's uniform half
        a1 = kPhiloxM1 * s.step_purpose;
        b2 = mul_high(kPhiloxM0, a0) ^ k1[1];  // round 2's, but for x3
        b3 = kPhiloxM0 * a0;
    }
};

constexpr int kGroup = kWide * kChains;  // blocks made at a time

// Words of kGroup blocks whose low numbers stand in the lanes of `counter`, in w_iota's order.
DRIFTMAX_INLINE void philox_group(uint32_t* out, const Schedule& s, const wide* counter) {
    const wide m0 = w_set(kPhiloxM0), m1 = w_set(kPhiloxM1), zero = w_set(0);
    wide x0[kChains], x1[kChains], x2[kChains], x3[kChains];
    for (int i = 0; i < kChains; ++i) {
        wide p = w_mul(counter[i], m0);
        x2[i] = w_xor(w_high(p), w_set(s.c3 ^ s.k1[0]), zero);  // round 1
        x3[i] = p;
        p = w_mul(x2[i], m1);
        x0[i] = w_xor(w_high(p), w_set(s.a1 ^ s.k0[1]), zero);  // round 2
        x1[i] = p;
        x2[i] = w_xor(x3[i], w_set(s.b2), zero);
        x3[i] = w_set(s.b3);
    }
    for (int r = 2; r < 10; ++r) {
        const wide u = w_set(s.k0[r]), v = w_set(s.k1[r]);
        for (int i = 0; i < kChains; ++i) {
            wide p = w_mul(x0[i], m0), q = w_mul(x2[i], m1);
            x0[i] = w_xor(w_high(q), x1[i], u);
            x1[i] = q;
            x2[i] = w_xor(w_high(p), x3[i], v);
            x3[i] = p;
        }
    }
    for (int i = 0; i < kChains; ++i) w_store(out + 4 * kWide * i, x0[i], x1[i], x2[i], x3[i]);
}

// Words of blocks [first, first + count) in order. Writes whole groups: `out` holds 4 * count words rounded up to a
// multiple of 128. The high half of the block number must not change within the range. before_group() is called once per
// kGroup blocks.
template <typename Before>
DRIFTMAX_INLINE void philox_words(uint32_t* out, const Stream& s, uint64_t first, int64_t count, Before&& before_group) {
    const Schedule schedule(s, static_cast<uint32_t>(first >> 32));
    wide counter[kChains];
    for (int i = 0; i < kChains; ++i) counter[i] = w_add(w_set(static_cast<uint32_t>(first) + i * kWide), w_iota());
    for (int64_t done = 0; done < count; done += kGroup, out += 4 * kGroup) {
        before_group();
        philox_group(out, schedule, counter);
        for (int i = 0; i < kChains; ++i) counter[i] = w_add(counter[i], w_set(kGroup));
    }
}

inline void philox_words(uint32_t* out, const Stream& s, uint64_t first, int64_t count) {
    philox_words(out, s, first, count, [] {});
}

// Words of the listed blocks (low halves of their numbers), in the order of the list. `numbers` is readable, and `out` writable,
// up to a multiple of 32 blocks.
inline void philox_words_of(uint32_t* out, const Stream& s, uint32_t high, const uint32_t* numbers, int64_t count) {
    const Schedule schedule(s, high);
    for (int64_t done = 0; done < count; done += kGroup) {
        wide counter[kChains];
        for (int i = 0; i < kChains; ++i) counter[i] = w_gather(numbers + done + i * kWide);
        philox_group(out + 4 * done, schedule, counter);
    }
}

DRIFTMAX_END
