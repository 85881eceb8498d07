#include "partita/norm.h"

#include <stdexcept>
#include <vector>

#include "parallel.h"
#include "simd/kernels.h"

namespace partita {

void norm(double* sum_of_squares, Span values, const Segments& segments, int threads) {
    if (segments.end() > values.numel) throw std::invalid_argument("norm: segments reach beyond the buffer");
    const auto& blocks = segments.blocks();
    std::vector<double> sums(blocks.size());
    const auto kernel = kernels().sum_of_squares[index(values.dtype)];
    for_each_block(static_cast<std::int64_t>(blocks.size()), segments.numel(), threads, [&](std::int64_t i) {
        const Segment& block = blocks[static_cast<std::size_t>(i)];
        sums[static_cast<std::size_t>(i)] = kernel(values.part(block.offset, block.numel).data, block.numel);
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    *sum_of_squares += total;
}

}  // namespace partita
