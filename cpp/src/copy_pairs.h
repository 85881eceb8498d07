// What pack and cast are made of, whatever processor does it.
#pragma once

#include <cstdint>
#include <vector>

#include "host_device.h"
#include "partita/copy.h"

namespace partita {

// `from` goes to `to`, of the same number of elements; without data it stands for zeros.
struct CopyPair {
    Span to;
    Span from;
};

// The pairs of a pack or a cast; throw std::invalid_argument when something does not fit.
std::vector<CopyPair> pack_pairs(Span destination, const std::vector<Span>& sources,
                                 const std::vector<std::int64_t>& offsets);
std::vector<CopyPair> cast_pairs(Span destination, Span source);

PARTITA_HOST_DEVICE inline float product(const Scale& scale) {
    return scale.factor == nullptr ? scale.value : static_cast<float>(scale.value * *scale.factor);
}

}  // namespace partita
