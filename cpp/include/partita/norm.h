#pragma once

#include "partita/segments.h"
#include "partita/span.h"
#include "partita/stream.h"

namespace partita {

// Adds the sum of squares of the segments of `values` to `*sum_of_squares`, in fp64 and in one pass.
//
// The square of the largest fp32 number is far below the largest fp64 number, so the sum is infinite or NaN exactly
// when an element is: it is its own overflow flag.
void norm(double* sum_of_squares, Span values, const Segments& segments, int threads);
// The same on a device; `scratch` has room for one number per block of the segments. The order of additions depends on
// the segments and on whether `values` starts on a 16-byte boundary, not on the device or the stream.
void norm(double* sum_of_squares, Span values, const Segments& segments, double* scratch, Stream stream);

}  // namespace partita
