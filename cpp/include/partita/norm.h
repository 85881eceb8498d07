#pragma once

#include <vector>

#include "partita/segments.h"
#include "partita/span.h"
#include "partita/stream.h"

namespace partita {

// A buffer, and which of its elements count.
struct NormPart {
    Span values;
    const Segments* segments;
};

// Adds the sum of squares of all parts to `*sum_of_squares`, in fp64 and in one pass.
//
// The square of the largest fp32 number is far below the largest fp64 number, so the sum is infinite or NaN exactly
// when an element is: it is its own overflow flag.
void norm(double* sum_of_squares, const std::vector<NormPart>& parts, int threads);
// The same on a device; `scratch` has room for one number per block of all segments. The order of additions depends on
// the parts and on which of them start on a 16-byte boundary, not on the device or the stream.
void norm(double* sum_of_squares, const std::vector<NormPart>& parts, double* scratch, Stream stream);

}  // namespace partita
