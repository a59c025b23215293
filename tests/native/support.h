// What the native drivers share: a small generator, half-precision codecs, exact-size buffers, failure reports.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "args.h"

namespace fuzz {

using driftmax::DType;
constexpr double kInf = std::numeric_limits<double>::infinity();

// SplitMix64: independent of the generator under test, reseeded per case so that one case replays alone.
class Random {
public:
    Random(uint64_t seed, uint64_t number) : state_(seed * 0x9E3779B97F4A7C15u + number * 0xD1B54A32D192ED03u) {}
    uint64_t bits() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
    bool chance(int one_in) { return below(one_in) == 0; }
    double uniform() { return (static_cast<double>(bits() >> 12) + 0.5) * 0x1p-52; }
    double normal() {
        double radius = std::sqrt(-2.0 * std::log(uniform()));
        return radius * std::cos(6.283185307179586 * uniform());
    }
    template <typename T> T pick(std::initializer_list<T> values) {
        return values.begin()[below(static_cast<int64_t>(values.size()))];
    }

private:
    uint64_t state_;
};

struct Context {
    uint64_t seed = 1, number = 0;
    std::string what;
};
inline Context& context() {
    static Context c;
    return c;
}

// Prints how to replay the case, then aborts, so that sanitizers and debuggers stop at the fault.
[[noreturn]] inline void fail(const std::string& message) {
    std::fprintf(stderr, "FAILED seed %llu case %llu (%s): %s\n", static_cast<unsigned long long>(context().seed),
                 static_cast<unsigned long long>(context().number), context().what.c_str(), message.c_str());
    std::fprintf(stderr, "replay with --seed %llu --case %llu\n", static_cast<unsigned long long>(context().seed),
                 static_cast<unsigned long long>(context().number));
    std::abort();
}
inline void require(bool condition, const std::string& message) {
    if (!condition) fail(message);
}

inline size_t size_of(DType dtype) {
    switch (dtype) {
        case DType::f64: return 8;
        case DType::f16:
        case DType::bf16: return 2;
        default: return 4;
    }
}

inline uint32_t float_bits(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    return b;
}
inline float bits_float(uint32_t b) {
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}

// Rounds towards zero: which value is stored does not matter, only that decode() reads what the kernels must read.
inline uint16_t encode_half(double x) {
    uint16_t sign = std::signbit(x) ? 0x8000u : 0u;
    double a = std::fabs(x);
    if (std::isnan(x)) return 0x7e00u;
    if (a == kInf) return sign | 0x7c00u;
    if (a >= 65504.0) return sign | 0x7bffu;
    if (a < 0x1p-14) return sign | static_cast<uint16_t>(a * 0x1p24);
    int exponent;
    double fraction = std::frexp(a, &exponent);  // a = fraction 2^exponent, fraction in [1/2, 1)
    return sign | static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(fraction * 2048.0) & 1023));
}
inline double decode_half(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double a = exponent == 31  ? (mantissa ? std::numeric_limits<double>::quiet_NaN() : kInf)
               : exponent == 0 ? std::ldexp(mantissa, -24)
                               : std::ldexp(1024 + mantissa, exponent - 25);
    return h & 0x8000u ? -a : a;
}

// `count` elements that end where the allocation ends: a read or write past them is seen by AddressSanitizer.
class Buffer {
public:
    Buffer() = default;
    Buffer(DType dtype, int64_t count, int64_t skip = 0)
        : dtype_(dtype),
          count_(count),
          skip_(skip),
          bytes_(new unsigned char[(count + skip) * size_of(dtype)]) {
        std::memset(bytes_.get(), 0xA5, (count + skip) * size_of(dtype));
    }
    void* data() { return bytes_.get() + skip_ * size_of(dtype_); }
    const void* data() const { return bytes_.get() + skip_ * size_of(dtype_); }
    DType dtype() const { return dtype_; }
    int64_t count() const { return count_; }
    size_t nbytes() const { return count_ * size_of(dtype_); }
    void set(int64_t i, double x) {
        unsigned char* p = static_cast<unsigned char*>(data()) + i * size_of(dtype_);
        float f = dtype_ == DType::f64 ? 0.0f : static_cast<float>(x);
        uint16_t h = dtype_ == DType::f16 ? encode_half(x) : static_cast<uint16_t>(float_bits(f) >> 16);
        if (dtype_ == DType::bf16 && std::isnan(x)) h = 0x7fc0u;
        switch (dtype_) {
            case DType::f64: std::memcpy(p, &x, 8); break;
            case DType::f32: std::memcpy(p, &f, 4); break;
            default: std::memcpy(p, &h, 2); break;
        }
    }
    double get(int64_t i) const {
        const unsigned char* p = static_cast<const unsigned char*>(data()) + i * size_of(dtype_);
        double d;
        float f;
        uint16_t h;
        switch (dtype_) {
            case DType::f64: std::memcpy(&d, p, 8); return d;
            case DType::f32: std::memcpy(&f, p, 4); return f;
            default:
                std::memcpy(&h, p, 2);
                return dtype_ == DType::f16 ? decode_half(h) : bits_float(static_cast<uint32_t>(h) << 16);
        }
    }
    bool same_bytes(const Buffer& other) const {
        return nbytes() == other.nbytes() && (nbytes() == 0 || std::memcmp(data(), other.data(), nbytes()) == 0);
    }

private:
    DType dtype_ = DType::f32;
    int64_t count_ = 0, skip_ = 0;
    std::unique_ptr<unsigned char[]> bytes_;
};

inline double largest(DType dtype) {
    switch (dtype) {
        case DType::f64: return std::numeric_limits<double>::max();
        case DType::f16: return 65504.0;
        case DType::bf16: return bits_float(0x7f7f0000u);
        default: return std::numeric_limits<float>::max();
    }
}
inline double smallest(DType dtype) {
    switch (dtype) {
        case DType::f64: return std::numeric_limits<double>::denorm_min();
        case DType::f16: return 0x1p-24;
        case DType::bf16: return bits_float(0x00010000u);
        default: return std::numeric_limits<float>::denorm_min();
    }
}

struct Settings {
    double seconds = 20;
    uint64_t seed = 1;
    int64_t only = -1;  // a single case
};

inline Settings parse(int argc, char** argv) {
    Settings s;
    for (int i = 1; i + 1 < argc; i += 2) {
        std::string name = argv[i];
        if (name == "--seconds") s.seconds = std::atof(argv[i + 1]);
        else if (name == "--seed") s.seed = std::strtoull(argv[i + 1], nullptr, 10);
        else if (name == "--case") s.only = std::atoll(argv[i + 1]);
        else argc = 0;
    }
    if (argc % 2 == 0) {
        std::fprintf(stderr, "usage: driver [--seconds S] [--seed N] [--case N]\n");
        std::exit(2);
    }
    return s;
}

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace fuzz
