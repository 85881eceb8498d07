// Copies between flat buffers and tensors: destination = [destination +] source * scale, computed in fp32 and rounded
// once to the destination's type (nearest, ties to even). A source without data counts as zeros.
#pragma once

#include <cstdint>
#include <vector>

#include "partita/span.h"
#include "partita/stream.h"

namespace partita {

// What values are multiplied by: a number, times another one that lies where the values lie, if there is one.
struct Scale {
    float value = 1.0f;
    const double* factor = nullptr;

    Scale(float number, const double* in_memory = nullptr) : value(number), factor(in_memory) {}
};

// Gathers `sources` into `destination`, source i at element `offsets[i]`. Throws std::invalid_argument when a
// source does not fit.
void pack(Span destination, const std::vector<Span>& sources, const std::vector<std::int64_t>& offsets, Scale scale,
          bool accumulate, int threads);
void pack(Span destination, const std::vector<Span>& sources, const std::vector<std::int64_t>& offsets, Scale scale,
          bool accumulate, Stream stream);

// One span into one of the same number of elements.
void cast(Span destination, Span source, Scale scale, bool accumulate, int threads);
void cast(Span destination, Span source, Scale scale, bool accumulate, Stream stream);

}  // namespace partita
