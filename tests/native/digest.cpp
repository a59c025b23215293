// Hashes of results, a line a case, to compare machines: run it on two, or under an emulator, and diff. Inputs come partly
// from the C library's log and cos, so that a line carries their hash too: where that differs, the case says nothing.
#include "cases.h"
#include "isa.h"

namespace fuzz {
namespace {

using namespace driftmax;

// FNV-1a
struct Hash {
    uint64_t value = 1469598103934665603u;
    void add(const void* data, size_t bytes) {
        for (size_t i = 0; i < bytes; ++i) value = (value ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
    }
};

uint64_t input_of(const Case& c) {
    Hash h;
    h.add(c.logits.data(), c.logits.nbytes());
    h.add(c.temperatures.data(), c.temperatures.size() * 8);
    h.add(&c.temperature, 8);
    h.add(&c.top_p, 8);
    h.add(&c.min_p, 8);
    return h.value;
}

void add_categorical(Hash& h, const Kernels& kernels, const Case& c, Method method, bool stats) {
    std::vector<int64_t> tokens(static_cast<size_t>(c.draws()), -7);
    Buffer out(c.logits.dtype() == DType::f64 ? DType::f64 : DType::f32, 4 * c.draws());
    Status status =
        kernels.categorical({c.view(), c.streams(), c.options(), method, tokens.data(), stats ? out.data() : nullptr, 2});
    h.add(&status, sizeof status);
    if (status != 0) return;
    h.add(tokens.data(), tokens.size() * 8);
    if (stats) h.add(out.data(), out.nbytes());
}

void add_topk(Hash& h, const Kernels& kernels, const Case& c) {
    int64_t k = std::min<int64_t>(c.vocab, 5);
    std::vector<int64_t> tokens(static_cast<size_t>(c.draws() * k), -7);
    std::vector<double> scores(tokens.size());
    Status status = kernels.gumbel_topk({c.view(), c.streams(), c.options(), k, tokens.data(), scores.data(), 1});
    h.add(&status, sizeof status);
    if (status != 0) return;
    h.add(tokens.data(), tokens.size() * 8);
    h.add(scores.data(), scores.size() * 8);
}

void add_fills(Hash& h, const Kernels& kernels, const Case& c) {
    for (int kind = 1; kind <= 5; ++kind)
        for (DType dtype : {DType::i32, DType::f32, DType::f64}) {
            if ((kind == 1) != (dtype == DType::i32)) continue;
            Buffer out(dtype == DType::i32 ? DType::f32 : dtype, 3 * 1001);
            kernels.fill({kind, dtype, out.data(), 3, 1001, 1001, {c.seed, nullptr, nullptr, nullptr, c.step}, 2});
            h.add(out.data(), out.nbytes());
        }
}

uint64_t output_of(const Kernels& kernels, const Case& c) {
    Hash h;
    for (Method method : {Method::block, Method::gumbel})
        for (bool stats : {false, true}) add_categorical(h, kernels, c, method, stats);
    add_topk(h, kernels, c);
    add_fills(h, kernels, c);
    return h.value;
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
    fuzz::Settings settings = fuzz::parse(argc, argv);
    const double end = fuzz::now() + settings.seconds;
    for (uint64_t number = 0; number < 20000 && fuzz::now() < end; ++number) {
        fuzz::context() = {settings.seed, number, "digest"};
        fuzz::Random r(settings.seed, number);
        fuzz::Case c = fuzz::random_case(r, true, number % 2 == 0);
        uint64_t input = fuzz::input_of(c), first = 0;
        for (const driftmax::Kernels* k = driftmax::available_kernels(); k->name; ++k) {
            uint64_t output = fuzz::output_of(*k, c);
            if (first == 0) first = output;
            fuzz::require(output == first, std::string("instruction set ") + k->name + " differs");
        }
        std::printf("%llu %016llx %016llx\n", static_cast<unsigned long long>(number), static_cast<unsigned long long>(input),
                    static_cast<unsigned long long>(first));
    }
}
