#include "fill.h"

#include "parallel.h"
#include "philox.h"
#include "vector_math.h"

DRIFTMAX_BEGIN
namespace {

constexpr int64_t kChunk = 1024;  // elements made at a time: their words stay in the first-level cache

struct Chunk {
    alignas(64) uint32_t hi[kChunk], lo[kChunk];
};

// The loops below are plain so that the compiler vectorises them, and short: how many turns of a loop a processor has in flight
// decides its speed, so that a long chain of operations runs faster in pieces.
template <typename F> struct Pieces {
    alignas(64) F f[kChunk], k[kChunk];
};

// `count` exponentials from every `step`-th word.
template <int step, typename F> DRIFTMAX_INLINE void exponentials(const Chunk& c, Pieces<F>& p, F* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) exponential_parts(c.hi[step * i], c.lo[step * i], p.f[i], p.k[i]);
    for (int64_t i = 0; i < count; ++i) out[i] = -log_core(p.f[i], p.k[i]);
}

// `count` is even.
template <typename F> DRIFTMAX_INLINE void transform(int kind, const Chunk& c, F* out, int64_t count) {
    Pieces<F> p;
    switch (kind) {
        case kUniform:
            for (int64_t i = 0; i < count; ++i) out[i] = uniform(c.hi[i], c.lo[i], F());
            break;
        case kExponential: exponentials<1>(c, p, out, count); break;
        case kGumbel:
            exponentials<1>(c, p, out, count);
            for (int64_t i = 0; i < count; ++i) out[i] = -log_pos(out[i]);
            break;
        default: {
            F* radius = p.f;
            exponentials<2>(c, p, radius, count / 2);
            for (int64_t i = 0; i < count / 2; ++i) {
                F cosine, sine, r = std::sqrt(F(2) * radius[i]);
                turn(c.hi[2 * i + 1], c.lo[2 * i + 1], cosine, sine);
                out[2 * i] = r * cosine;
                out[2 * i + 1] = r * sine;
            }
        }
    }
}

// A float of unit() has 24 bits: where min(hi, ~hi) >= 2^25 the low word cannot change it. So for float32 only the low words of
// the other 1/64 are made; the rest are zero. Every word of a block counts, but for normals only those of even elements.
void sparse_low(int kind, const Stream& low, uint64_t block, Chunk& c, int64_t count) {
    uint32_t numbers[kChunk / 4 + 32], words[kChunk + 128];
    int64_t blocks = 0;
    const uint32_t used = kind == kNormal ? 0x5555u : 0xffffu;
    for (int64_t i = 0; i < count; i += 16) {
        // w + 2^25 < 2^26 modulo 2^32
        i32x16 high_bits = shr<26>(iload16(c.hi + i) + isplat(0x02000000));
        uint32_t doubt = ge(splat(0.0f), to_float(high_bits)) & used;
        while (doubt) {
            uint32_t block_of = static_cast<uint32_t>(__builtin_ctz(doubt)) / 4;
            numbers[blocks++] = static_cast<uint32_t>(block) + static_cast<uint32_t>(i / 4) + block_of;
            doubt &= ~(0xfu << (4 * block_of));
        }
    }
    std::memset(c.lo, 0, static_cast<size_t>(count) * sizeof(uint32_t));
    std::memset(numbers + blocks, 0, 32 * sizeof(uint32_t));
    philox_words_of(words, low, static_cast<uint32_t>(block >> 32), numbers, blocks);
    for (int64_t j = 0; j < blocks; ++j) std::memcpy(c.lo + 4 * (numbers[j] - static_cast<uint32_t>(block)), words + 4 * j, 16);
}

// Elements to make for n: whole groups of philox_words.
int64_t whole_groups(int64_t n) { return (n + 127) / 128 * 128; }

// Values [begin, begin + n) of one stream; begin is a multiple of kChunk, n at most kChunk.
template <typename F> void fill_chunk(int kind, const Stream& stream, int64_t begin, int64_t n, F* out) {
    Chunk words;
    uint64_t block = static_cast<uint64_t>(begin) / 4;
    int64_t count = whole_groups(n);
    philox_words(words.hi, stream, block, count / 4);
    if (sizeof(F) == 8) philox_words(words.lo, stream.plane1(), block, count / 4);
    else if (kind != kUniform) sparse_low(kind, stream.plane1(), block, words, count);
    if (n == kChunk) return transform(kind, words, out, kChunk);
    F whole[kChunk];
    transform(kind, words, whole, count);
    std::memcpy(out, whole, static_cast<size_t>(n) * sizeof(F));
}

void fill_bits(const Stream& stream, int64_t begin, int64_t n, uint32_t* out) {
    alignas(64) uint32_t words[kChunk];
    philox_words(words, stream, static_cast<uint64_t>(begin) / 4, whole_groups(n) / 4);
    std::memcpy(out, words, static_cast<size_t>(n) * 4);
}

}  // namespace

void fill(const FillArgs& args) {
    int64_t chunks = (args.row_length + kChunk - 1) / kChunk;
    if (args.rows <= 0 || chunks <= 0) return;
    int64_t grain = chunks * args.rows > 64 ? 16 : 4;
    parallel_for(args.rows * chunks, grain, args.threads, [&](int64_t task, int64_t end, int) {
        for (; task < end; ++task) {
            int64_t row = task / chunks, begin = task % chunks * kChunk;
            int64_t n = args.row_length - begin < kChunk ? args.row_length - begin : kChunk;
            Stream stream(args.streams, 1, row, static_cast<uint32_t>(args.kind));
            if (!args.streams.positions) stream.position = 0;
            int64_t at = row * args.row_stride + begin;
            if (args.kind == kBits) fill_bits(stream, begin, n, static_cast<uint32_t*>(args.out) + at);
            else if (args.dtype == DType::f64) fill_chunk(args.kind, stream, begin, n, static_cast<double*>(args.out) + at);
            else fill_chunk(args.kind, stream, begin, n, static_cast<float*>(args.out) + at);
        }
    });
}

void philox4x32(uint32_t* out, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    Words words = philox(c0, c1, c2, c3, k0, k1);
    std::memcpy(out, words.w, sizeof words);
}

float read_sum(const float* data, int64_t n, int threads) {
    constexpr int64_t piece = 1 << 14;
    int64_t pieces = (n + piece - 1) / piece;
    float* sums = static_cast<float*>(scratch(0, static_cast<size_t>(pieces + 1) * 4));
    parallel_for(pieces, 4, threads, [&](int64_t p, int64_t end, int) {
        for (; p < end; ++p) {
            int64_t stop = (p + 1) * piece < n ? (p + 1) * piece : n, i = p * piece, quarter = (stop - i) / 64 * 16;
            f32x16 a = splat(0), b = splat(0), c = splat(0), d = splat(0);
            // Four streams: the hardware's prefetcher stops at page ends, and not at all four at once.
            for (int64_t end = i + quarter; i < end; i += 16) {
                a = a + load16(data + i);
                b = b + load16(data + i + quarter);
                c = c + load16(data + i + 2 * quarter);
                d = d + load16(data + i + 3 * quarter);
            }
            i += 3 * quarter;
            float rest = 0;
            for (; i < stop; ++i) rest = rest + data[i];
            sums[p] = sum16((a + b) + (c + d)) + rest;
        }
    });
    float total = 0;
    for (int64_t p = 0; p < pieces; ++p) total = total + sums[p];
    return total;
}

DRIFTMAX_END
