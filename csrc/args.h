// Plain argument structs of the kernels. Raw pointers, no ownership; null means "absent, use the scalar beside it".
#pragma once

#include <cstddef>
#include <cstdint>

namespace driftmax {

// 0, or code | row << 8.
using Status = int64_t;
enum StatusCode : int64_t { kOk = 0, kNaN = 1, kInfinite = 2, kEmpty = 3, kTooFew = 4 };
inline Status status(StatusCode code, int64_t row) { return code | (row << 8); }

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, i32 = 4 };

// Who draws: counters of docs/numerics.md. Draw i = a * n1 + b belongs to leading row a.
struct Streams {
    uint64_t seed = 0;
    const int64_t* seeds = nullptr;      // per leading row
    const int64_t* row_ids = nullptr;    // per leading row; null: 0, 1, ...
    const int64_t* positions = nullptr;  // per draw; null: b
    uint32_t step = 0;
};

struct Logits {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t n0 = 0, n1 = 1;  // draws = n0 * n1
    int64_t s0 = 0, s1 = 0;  // element strides
    int64_t vocab = 0;
};

// A scalar, or one value per draw.
template <typename T>
struct PerDraw {
    T scalar{};
    const T* values = nullptr;
    T operator[](int64_t i) const { return values ? values[i] : scalar; }
};

struct Options {
    PerDraw<double> temperature{1.0};
    PerDraw<int64_t> top_k{0};   // 0: off
    PerDraw<double> top_p{1.0};  // 1: off
    PerDraw<double> min_p{0.0};  // 0: off
    bool filtered() const {
        return top_k.values || top_p.values || min_p.values || top_k.scalar > 0 || top_p.scalar < 1.0 || min_p.scalar > 0.0;
    }
};

enum class Method : int { block = 0, gumbel = 1 };

struct FillArgs {
    int kind = 0;  // purpose tag: 1 bits, 2 uniform, 3 exponential, 4 gumbel, 5 normal
    DType dtype = DType::f32;
    void* out = nullptr;
    int64_t rows = 0, row_length = 0, row_stride = 0;
    Streams streams;  // positions: one per row; null: 0
    int threads = 1;
};

struct CategoricalArgs {
    Logits logits;
    Streams streams;
    Options options;
    Method method = Method::block;
    int64_t* tokens = nullptr;
    void* stats = nullptr;  // [4, draws]
    int threads = 1;
};

struct GumbelTopkArgs {
    Logits logits;
    Streams streams;
    Options options;
    int64_t k = 1;
    int64_t* tokens = nullptr;  // [draws, k]
    double* scores = nullptr;   // [draws, k]
    int threads = 1;
};

struct UnmaskArgs {
    Logits logits;  // n0 rows of n1 positions
    Streams streams;
    PerDraw<double> temperature{1.0};
    PerDraw<double> probability{1.0};    // per row
    int64_t* tokens = nullptr;           // [n0, n1], read and written
    int64_t* revealed = nullptr;         // [n0]
    int64_t mask_id = 0;                 // its column counts as -inf where there is one
    const int64_t* forbidden = nullptr;  // columns that count as -inf
    int64_t forbidden_count = 0;
    int threads = 1;
};

enum class TransferRule : int { count = 0, threshold = 1 };

struct TransferArgs {
    int64_t rows = 0, length = 0;
    int64_t* tokens = nullptr;       // [rows, length], read and written
    const int64_t* drawn = nullptr;  // [rows, length]
    const void* scores = nullptr;    // [rows, length]
    DType dtype = DType::f32;        // of the scores: f32 or f64
    uint8_t* moved = nullptr;        // [rows, length]: 1 where written
    int64_t mask_id = 0;
    int64_t begin = 0, end = 0;         // eligible positions
    const uint8_t* eligible = nullptr;  // [rows, length]; null: all
    TransferRule rule = TransferRule::count;
    PerDraw<int64_t> count{0};       // per row; under the threshold rule the least
    PerDraw<double> threshold{0.0};  // per row
    int threads = 1;
};

struct LmHeadTileArgs {
    const float* tile = nullptr;
    int64_t draws = 0, row_stride = 0, begin = 0, columns = 0, vocab = 0, n1 = 1, first = 0;
    Streams streams;
    PerDraw<double> temperature{1.0};
    Method method = Method::block;
    bool stats = false;
    void* state = nullptr;
    int threads = 1;
};

struct LmHeadFinishArgs {
    const void* state = nullptr;
    int64_t draws = 0, first = 0;
    PerDraw<double> temperature{1.0};
    int64_t* tokens = nullptr;
    float* stats = nullptr;
    int64_t stats_stride = 0;
};

}  // namespace driftmax
