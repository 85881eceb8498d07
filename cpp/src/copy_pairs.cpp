#include "copy_pairs.h"

#include <stdexcept>
#include <string>

namespace partita {
namespace {

void check_inside(const char* what, std::size_t i, std::int64_t offset, std::int64_t numel, std::int64_t flat_numel) {
    if (offset < 0 || numel < 0 || offset > flat_numel - numel) {
        throw std::invalid_argument(std::string(what) + " " + std::to_string(i) + " (offset " + std::to_string(offset) +
                                    ", numel " + std::to_string(numel) + ") does not fit into a flat buffer of " +
                                    std::to_string(flat_numel) + " elements");
    }
}

void check_counts(std::size_t spans, std::size_t offsets) {
    if (spans != offsets) {
        throw std::invalid_argument(std::to_string(spans) + " spans but " + std::to_string(offsets) + " offsets");
    }
}

}  // namespace

std::vector<CopyPair> pack_pairs(Span destination, const std::vector<Span>& sources,
                                 const std::vector<std::int64_t>& offsets) {
    check_counts(sources.size(), offsets.size());
    std::vector<CopyPair> pairs;
    pairs.reserve(sources.size());
    for (std::size_t i = 0; i < sources.size(); ++i) {
        check_inside("source", i, offsets[i], sources[i].numel, destination.numel);
        pairs.push_back({destination.part(offsets[i], sources[i].numel), sources[i]});
    }
    return pairs;
}

std::vector<CopyPair> unpack_pairs(Span source, const std::vector<Span>& destinations,
                                   const std::vector<std::int64_t>& offsets) {
    check_counts(destinations.size(), offsets.size());
    std::vector<CopyPair> pairs;
    pairs.reserve(destinations.size());
    for (std::size_t i = 0; i < destinations.size(); ++i) {
        check_inside("destination", i, offsets[i], destinations[i].numel, source.numel);
        const Span none{nullptr, destinations[i].numel, source.dtype};
        pairs.push_back(
            {destinations[i], source.data == nullptr ? none : source.part(offsets[i], destinations[i].numel)});
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
