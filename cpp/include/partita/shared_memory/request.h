// What a collective is: the part that all its ranks must agree on.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "partita/reduce.h"

namespace partita {

// The group no longer works; the message names the rank at fault and the collective.
class CommunicationError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Element : std::uint8_t { f32, f16, bf16, f64, byte };
enum class Collective : std::uint8_t { barrier, all_reduce, reduce_scatter, all_gather, broadcast };

struct Request {
    Collective collective = Collective::barrier;
    Element element = Element::byte;
    Reduction reduction = Reduction::sum;
    std::int32_t root = 0;
    std::int64_t numel = 0;  // of the whole buffer; reduce-scatter and all-gather divide it evenly

    std::int64_t bytes() const;
    bool operator==(const Request& other) const;
};

std::int64_t size_of(Element element);
const char* name_of(Element element);
// "all_reduce (sum) of 4096 f32"
std::string describe(const Request& request);
// Throws std::invalid_argument for a request that makes no sense in a group of this size.
void check(const Request& request, int world_size);

}  // namespace partita
