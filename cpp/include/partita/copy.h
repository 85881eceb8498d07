// Copies between flat buffers and tensors: destination = [destination +] source * scale, computed in fp32 and rounded
// once to the destination's type (nearest, ties to even). A source without data counts as zeros.
#pragma once

#include <cstdint>
#include <vector>

#include "partita/span.h"

namespace partita {

// Gathers `sources` into `destination`, source i at element `offsets[i]`. Throws std::invalid_argument when a
// source does not fit.
void pack(Span destination, const std::vector<Span>& sources, const std::vector<std::int64_t>& offsets, float scale,
          bool accumulate, int threads);

// Scatters `source` from `offsets[i]` on into `destinations[i]`, the reverse of pack.
void unpack(Span source, const std::vector<Span>& destinations, const std::vector<std::int64_t>& offsets, float scale,
            bool accumulate, int threads);

// One span into one of the same number of elements.
void cast(Span destination, Span source, float scale, bool accumulate, int threads);

}  // namespace partita
