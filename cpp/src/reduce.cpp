#include "partita/reduce.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "parallel.h"
#include "simd/kernels.h"

namespace partita {
namespace {

constexpr std::int64_t block_numel = 1 << 15;

void check_count(int count) {
    if (count < 1) throw std::invalid_argument("a reduction needs at least one source");
}

double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }

}  // namespace

void reduce(Span to, const void* const* sources, int count, Reduction reduction, int threads) {
    check_count(count);
    const auto run = reduction == Reduction::max ? kernels().max[index(to.dtype)] : kernels().sum[index(to.dtype)];
    const float factor = reduction == Reduction::average ? 1.0f / static_cast<float>(count) : 1.0f;
    const std::int64_t blocks = (to.numel + block_numel - 1) / block_numel;
    for_each_block(blocks, to.numel, threads, [&](std::int64_t block) {
        const std::int64_t begin = block * block_numel;
        const Span part = to.part(begin, std::min(block_numel, to.numel - begin));
        run(part.data, sources, count, begin, part.numel, factor);
    });
}

void reduce(double* to, const double* const* sources, int count, std::int64_t numel, Reduction reduction) {
    check_count(count);
    for (std::int64_t i = 0; i < numel; ++i) {
        double value = sources[0][i];
        for (int s = 1; s < count; ++s) {
            value = reduction == Reduction::max ? larger(value, sources[s][i]) : value + sources[s][i];
        }
        to[i] = reduction == Reduction::average ? value / count : value;
    }
}

}  // namespace partita
