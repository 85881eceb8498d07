#pragma once

#include <cstdint>

#include "partita/span.h"

namespace partita {

// Throw std::invalid_argument, naming the function, unless params, remainder and master fit together.
void check_split(Span params, const std::uint16_t* remainder, Span master);
void check_join(Span master, Span params, const std::uint16_t* remainder);

}  // namespace partita
