#include "copy_pairs.h"

#include <stdexcept>
#include <string>

namespace partita {
namespace {

void check_inside(std::size_t i, std::int64_t offset, std::int64_t numel, std::int64_t flat_numel) {
    if (offset < 0 || numel < 0 || offset > flat_numel - numel) {
        throw std::invalid_argument("source " + std::to_string(i) + " (offset " + std::to_string(offset) + ", numel " +
                                    std::to_string(numel) + ") does not fit into a flat buffer of " +
                                    std::to_string(flat_numel) + " elements");
    }
}

}  // namespace

std::vector<CopyPair> pack_pairs(Span destination, const std::vector<Span>& sources,
                                 const std::vector<std::int64_t>& offsets) {
    if (sources.size() != offsets.size()) {
        throw std::invalid_argument(std::to_string(sources.size()) + " spans but " + std::to_string(offsets.size()) +
                                    " offsets");
    }
    std::vector<CopyPair> pairs;
    pairs.reserve(sources.size());
    for (std::size_t i = 0; i < sources.size(); ++i) {
        check_inside(i, offsets[i], sources[i].numel, destination.numel);
        pairs.push_back({destination.part(offsets[i], sources[i].numel), sources[i]});
    }
    return pairs;
}

std::vector<CopyPair> cast_pairs(Span destination, Span source) {
    if (destination.numel != source.numel) {
        throw std::invalid_argument("cast from " + std::to_string(source.numel) + " to " +
                                    std::to_string(destination.numel) + " elements");
    }
    return {{destination, source}};
}

}  // namespace partita
