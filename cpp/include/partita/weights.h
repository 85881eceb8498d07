// 16-bit weights and their fp32 masters.
//
// [Note: split masters]
// A bf16 weight is the upper half of its master, rounded to nearest with ties away from zero: one plus bit 15 of the
// master's bits. So the lower 16 bits, the remainder, are all that is missing: read as a signed number and added to
// the weight's bits shifted up, they give back every fp32 number exactly. With ties to even they would not: an even
// weight stands for 65537 masters. The weights have this rounding with whole masters too, so that splitting them is a
// matter of memory (14 instead of 16 bytes per parameter) and not of numbers. A NaN becomes a quiet one without
// remainder. The layout is that of NVIDIA apex's and TransformerEngine's `store_param_remainders`.
#pragma once

#include <cstdint>

#include "partita/span.h"
#include "partita/stream.h"

namespace partita {

// Writes `params` from `master` (f32): bf16 as the note says, other types to nearest, ties to even. `remainder`, of as
// many elements, may be null; otherwise `params` must be bf16. Throws std::invalid_argument.
void split_master(Span params, std::uint16_t* remainder, Span master, int threads);
void split_master(Span params, std::uint16_t* remainder, Span master, Stream stream);

// The masters (f32) of bf16 `params` and their remainder. Throws std::invalid_argument.
void join_master(Span master, Span params, const std::uint16_t* remainder, int threads);
void join_master(Span master, Span params, const std::uint16_t* remainder, Stream stream);

}  // namespace partita
