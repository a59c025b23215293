// Registration only: the one file that knows Python. Arguments are documented in python/driftmax/_core.pyi.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

#include "isa.h"
#include "parallel.h"

namespace py = pybind11;
using namespace driftmax;

namespace {

// data_ptr() integers
template <typename T> T* pointer(uintptr_t p) { return reinterpret_cast<T*>(p); }

DType dtype_of(int code) {
    if (code < 0 || code > 4) throw py::value_error("unknown dtype code " + std::to_string(code));
    return static_cast<DType>(code);
}

void need(bool condition, const char* what) {
    if (!condition) throw py::value_error(what);
}

Streams streams_of(uint64_t seed, uintptr_t seeds, uintptr_t row_ids, uintptr_t positions, int64_t step) {
    need(step >= 0 && step < (1 << 24), "step must be in [0, 2^24)");
    return {seed, pointer<const int64_t>(seeds), pointer<const int64_t>(row_ids), pointer<const int64_t>(positions),
            static_cast<uint32_t>(step)};
}

Logits logits_of(uintptr_t data, int dtype, int64_t n0, int64_t n1, int64_t s0, int64_t s1, int64_t vocab) {
    need(n0 >= 0 && n1 >= 0, "negative number of rows");
    need(vocab >= 1 && vocab < (int64_t{1} << 32), "vocabulary size must be in [1, 2^32)");
    need(data != 0 || n0 * n1 == 0, "null logits");
    need(dtype >= 0 && dtype <= 3, "logits must be float32, float64, float16 or bfloat16");
    return {pointer<const void>(data), dtype_of(dtype), n0, n1 > 0 ? n1 : 1, s0, s1, vocab};
}

Options options_of(double t, uintptr_t ts, int64_t k, uintptr_t ks, double p, uintptr_t ps, double m, uintptr_t ms) {
    need(ts || t >= 0.0, "temperature must not be negative or NaN");
    return {{t, pointer<const double>(ts)},
            {k, pointer<const int64_t>(ks)},
            {p, pointer<const double>(ps)},
            {m, pointer<const double>(ms)}};
}

py::tuple philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    uint32_t out[4];
    kernels().philox(out, c0, c1, c2, c3, k0, k1);
    return py::make_tuple(out[0], out[1], out[2], out[3]);
}

void fill(int kind, int dtype, uintptr_t out, int64_t rows, int64_t row_length, int64_t row_stride, uint64_t seed,
          uintptr_t seeds, uintptr_t row_ids, uintptr_t positions, int64_t step, int threads) {
    need(kind >= 1 && kind <= 5, "unknown kind");
    need(kind == 1 ? dtype == 4 : dtype == 0 || dtype == 1, "fills make float32 or float64 (bits: int32)");
    need(rows >= 0 && row_length >= 0, "negative shape");
    need(out != 0 || rows * row_length == 0, "null output");
    FillArgs args{kind,
                  dtype_of(dtype),
                  pointer<void>(out),
                  rows,
                  row_length,
                  row_stride,
                  streams_of(seed, seeds, row_ids, positions, step),
                  threads};
    py::gil_scoped_release release;
    kernels().fill(args);
}

Status categorical(uintptr_t logits, int dtype, int64_t n0, int64_t n1, int64_t s0, int64_t s1, int64_t vocab, uint64_t seed,
                   uintptr_t seeds, uintptr_t row_ids, uintptr_t positions, int64_t step, double temperature,
                   uintptr_t temperatures, int64_t top_k, uintptr_t top_ks, double top_p, uintptr_t top_ps, double min_p,
                   uintptr_t min_ps, int method, uintptr_t tokens, uintptr_t stats, int threads) {
    need(method == 0 || method == 1, "unknown method");
    need(tokens != 0 || n0 * n1 == 0, "null output");
    CategoricalArgs args{logits_of(logits, dtype, n0, n1, s0, s1, vocab),
                         streams_of(seed, seeds, row_ids, positions, step),
                         options_of(temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps),
                         static_cast<Method>(method),
                         pointer<int64_t>(tokens),
                         pointer<void>(stats),
                         threads};
    if (n1 == 0) return 0;
    py::gil_scoped_release release;
    return kernels().categorical(args);
}

Status gumbel_topk(uintptr_t logits, int dtype, int64_t n0, int64_t n1, int64_t s0, int64_t s1, int64_t vocab, uint64_t seed,
                   uintptr_t seeds, uintptr_t row_ids, uintptr_t positions, int64_t step, double temperature,
                   uintptr_t temperatures, int64_t top_k, uintptr_t top_ks, double top_p, uintptr_t top_ps, double min_p,
                   uintptr_t min_ps, int64_t k, uintptr_t tokens, uintptr_t scores, int threads) {
    need(k >= 1 && k <= vocab, "k must be in [1, vocab]");
    need(tokens != 0 || n0 * n1 == 0, "null output");
    GumbelTopkArgs args{logits_of(logits, dtype, n0, n1, s0, s1, vocab),
                        streams_of(seed, seeds, row_ids, positions, step),
                        options_of(temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps),
                        k,
                        pointer<int64_t>(tokens),
                        pointer<double>(scores),
                        threads};
    if (n1 == 0) return 0;
    py::gil_scoped_release release;
    return kernels().gumbel_topk(args);
}

Status unmask(uintptr_t logits, int dtype, int64_t rows, int64_t length, int64_t s0, int64_t s1, int64_t vocab, uintptr_t tokens,
              uintptr_t revealed, int64_t mask_id, uintptr_t forbidden, int64_t forbidden_count, double probability,
              uintptr_t probabilities, uint64_t seed, uintptr_t seeds, uintptr_t row_ids, uintptr_t positions, int64_t step,
              double temperature, uintptr_t temperatures, int threads) {
    need((tokens != 0 && revealed != 0) || rows * length == 0, "null output");
    need(forbidden_count == 0 || (forbidden_count > 0 && forbidden != 0), "null forbidden columns");
    need(temperatures || temperature >= 0.0, "temperature must not be negative or NaN");
    UnmaskArgs args{logits_of(logits, dtype, rows, length, s0, s1, vocab),
                    streams_of(seed, seeds, row_ids, positions, step),
                    {temperature, pointer<const double>(temperatures)},
                    {probability, pointer<const double>(probabilities)},
                    pointer<int64_t>(tokens),
                    pointer<int64_t>(revealed),
                    mask_id,
                    pointer<const int64_t>(forbidden),
                    forbidden_count,
                    threads};
    if (length == 0) return 0;
    py::gil_scoped_release release;
    return kernels().unmask(args);
}

void transfer(uintptr_t tokens, uintptr_t drawn, uintptr_t scores, int dtype, uintptr_t moved, int64_t rows, int64_t length,
              int64_t mask_id, int64_t begin, int64_t end, uintptr_t eligible, int rule, int64_t count, uintptr_t counts,
              double threshold, uintptr_t thresholds, int threads) {
    need(rows >= 0 && length >= 0, "negative shape");
    need((tokens != 0 && drawn != 0 && scores != 0 && moved != 0) || rows * length == 0, "null argument");
    need(dtype == 0 || dtype == 1, "scores must be float32 or float64");
    need(begin >= 0 && end <= length, "window outside the row");
    need(rule == 0 || rule == 1, "unknown rule");
    TransferArgs args{rows,
                      length,
                      pointer<int64_t>(tokens),
                      pointer<const int64_t>(drawn),
                      pointer<const void>(scores),
                      dtype_of(dtype),
                      pointer<uint8_t>(moved),
                      mask_id,
                      begin,
                      end,
                      pointer<const uint8_t>(eligible),
                      static_cast<TransferRule>(rule),
                      {count, pointer<const int64_t>(counts)},
                      {threshold, pointer<const double>(thresholds)},
                      threads};
    py::gil_scoped_release release;
    kernels().transfer(args);
}

Status lm_head_tile(uintptr_t tile, int64_t draws, int64_t row_stride, int64_t begin, int64_t columns, int64_t vocab, int64_t n1,
                    int64_t first, uint64_t seed, uintptr_t seeds, uintptr_t row_ids, uintptr_t positions, int64_t step,
                    double temperature, uintptr_t temperatures, int method, int stats, uintptr_t state, int threads) {
    need(draws == 0 || (tile != 0 && state != 0), "null tile or state");
    need(begin >= 0 && begin % 1024 == 0 && columns >= 0 && begin + columns <= vocab, "tile outside the vocabulary");
    need(columns % 1024 == 0 || begin + columns == vocab, "only the last tile may end inside a block");
    need(n1 >= 1 && first >= 0 && (method == 0 || method == 1), "bad draw index or method");
    need(temperatures || temperature >= 0.0, "temperature must not be negative or NaN");
    LmHeadTileArgs args{pointer<const float>(tile),
                        draws,
                        row_stride,
                        begin,
                        columns,
                        vocab,
                        n1,
                        first,
                        streams_of(seed, seeds, row_ids, positions, step),
                        {temperature, pointer<const double>(temperatures)},
                        static_cast<Method>(method),
                        stats != 0,
                        pointer<void>(state),
                        threads};
    py::gil_scoped_release release;
    return kernels().lm_head_tile(args);
}

Status lm_head_finish(uintptr_t state, int64_t draws, int64_t first, double temperature, uintptr_t temperatures, uintptr_t tokens,
                      uintptr_t stats, int64_t stats_stride) {
    need(draws == 0 || (state != 0 && tokens != 0), "null state or tokens");
    LmHeadFinishArgs args{pointer<const void>(state),
                          draws,
                          first,
                          {temperature, pointer<const double>(temperatures)},
                          pointer<int64_t>(tokens),
                          pointer<float>(stats),
                          stats_stride};
    py::gil_scoped_release release;
    return kernels().lm_head_finish(args);
}

float read_sum(uintptr_t data, int64_t nbytes, int threads) {
    need(data != 0 && nbytes >= 0, "null data");
    py::gil_scoped_release release;
    return kernels().read_sum(pointer<const float>(data), nbytes / 4, threads);
}

py::list available_isas() {
    py::list names;
    for (const Kernels* k = available_kernels(); k->name; ++k) names.append(k->name);
    return names;
}

void set_isa(const std::string& name) {
    if (set_kernels(name.c_str())) return;
    std::string have;
    for (const Kernels* k = available_kernels(); k->name; ++k) have += std::string(have.empty() ? "" : ", ") + k->name;
    throw py::value_error("instruction set '" + name + "' is not available here; available: " + have);
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    if (!available_kernels()->name) throw py::import_error("driftmax needs SSE4.2 on x86-64");
    const char* wanted = std::getenv("DRIFTMAX_ISA");
    if (wanted && *wanted && !set_kernels(wanted))
        throw py::import_error(std::string("DRIFTMAX_ISA=") + wanted + " is not available on this processor or in this build");
    m.def("philox4x32", &philox4x32);
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("available_isas", &available_isas);
    m.def("set_isa", &set_isa);
    m.def("borrow_team", [](uintptr_t gomp_parallel) { borrow_team(reinterpret_cast<Team>(gomp_parallel)); });
    m.def("team_is_borrowed", &team_is_borrowed);
    m.def("read_sum", &read_sum);
    m.def("fill", &fill);
    m.def("categorical", &categorical);
    m.def("gumbel_topk", &gumbel_topk);
    m.def("unmask", &unmask);
    m.def("transfer", &transfer);
    m.def("lm_head_state_bytes", [] { return kernels().lm_head_state_bytes(); });
    m.def("lm_head_tile", &lm_head_tile);
    m.def("lm_head_finish", &lm_head_finish);
}
