#include "partita/norm.h"

#include <stdexcept>
#include <vector>

#include "checks.h"
#include "parallel.h"
#include "simd/kernels.h"

namespace partita {

void check(const std::vector<NormPart>& parts) {
    for (const NormPart& part : parts) {
        if (part.segments->end() > part.values.numel) {
            throw std::invalid_argument("norm: segments reach beyond the buffer");
        }
    }
}

void norm(double* sum_of_squares, const std::vector<NormPart>& parts, int threads) {
    check(parts);
    double total = 0;
    for (const NormPart& part : parts) {
        const auto& blocks = part.segments->blocks();
        std::vector<double> sums(blocks.size());
        const auto kernel = kernels().sum_of_squares[index(part.values.dtype)];
        for_each_block(static_cast<std::int64_t>(blocks.size()), part.segments->numel(), threads, [&](std::int64_t i) {
            const Segment& block = blocks[static_cast<std::size_t>(i)];
            sums[static_cast<std::size_t>(i)] = kernel(part.values.part(block.offset, block.numel).data, block.numel);
        });
        for (const double sum : sums) total += sum;
    }
    *sum_of_squares += total;
}

}  // namespace partita
