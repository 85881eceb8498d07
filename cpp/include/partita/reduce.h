// Element by element over several buffers of equal size: what a collective makes of its ranks' values.
#pragma once

#include <cstdint>

#include "partita/span.h"

namespace partita {

enum class Reduction : std::uint8_t { sum, average, max };

// to = reduction of `count` sources, taken in their order; `to` may be one of them. Sums are formed in fp32 and rounded
// once to the type; an average is the sum times the reciprocal of `count` in fp32; a NaN in any source is one in the
// maximum. All sources have the type and size of `to`.
void reduce(Span to, const void* const* sources, int count, Reduction reduction, int threads);

// The same in fp64.
void reduce(double* to, const double* const* sources, int count, std::int64_t numel, Reduction reduction);

}  // namespace partita
