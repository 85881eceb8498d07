#include "partita/segments.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace partita {
namespace {

std::vector<Segment> joined(const std::vector<Segment>& segments) {
    std::vector<Segment> result;
    for (const Segment& s : segments) {
        const std::int64_t end = result.empty() ? 0 : result.back().offset + result.back().numel;
        if (s.numel < 0 || s.group < 0 || s.group == std::numeric_limits<std::int32_t>::max() || s.offset < end ||
            s.offset > std::numeric_limits<std::int64_t>::max() - s.numel) {
            throw std::invalid_argument("segments must be ascending and disjoint: offset " + std::to_string(s.offset) +
                                        ", numel " + std::to_string(s.numel) + ", group " + std::to_string(s.group) +
                                        " after a segment that ends at " + std::to_string(end));
        }
        if (s.numel == 0) continue;
        if (!result.empty() && s.offset == end && s.group == result.back().group) {
            result.back().numel += s.numel;
        } else {
            result.push_back(s);
        }
    }
    return result;
}

}  // namespace

Segments::Segments(const std::vector<Segment>& segments) : rows_(joined(segments)) {
    for (const Segment& s : segments) groups_ = std::max(groups_, s.group + 1);
    for (const Segment& s : rows_) {
        for (std::int64_t done = 0; done < s.numel; done += block_numel) {
            blocks_.push_back({s.offset + done, std::min(block_numel, s.numel - done), s.group});
        }
        numel_ += s.numel;
        end_ = s.offset + s.numel;
    }
}

}  // namespace partita
