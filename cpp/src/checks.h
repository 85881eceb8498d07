// What the CPU and CUDA forms of a function refuse alike, with std::invalid_argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "partita/adam.h"
#include "partita/norm.h"
#include "partita/span.h"

namespace partita {

// Segments beyond their buffer.
void check(const std::vector<NormPart>& parts);
// Buffers that do not fit together, segments beyond them, unknown groups.
void check(const std::vector<AdamPart>& parts, std::size_t groups);
// Params, remainder and master that do not fit together.
void check_split(Span params, const std::uint16_t* remainder, Span master);
void check_join(Span master, Span params, const std::uint16_t* remainder);

}  // namespace partita
