// Which elements of a flat buffer are real, and which optimizer group each belongs to.
//
// Flat buffers have padding between parameters and at their end. It may hold anything, so every function that reads or
// updates values goes through a table of segments and never touches the rest.
#pragma once

#include <cstdint>
#include <vector>

namespace partita {

struct Segment {
    std::int64_t offset;
    std::int64_t numel;
    std::int32_t group;
};

class Segments {
  public:
    // Elements that one thread takes at a time. Sums are formed per block and added in block order, so that results
    // depend on the layout alone and not on the number of threads.
    static constexpr std::int64_t block_numel = 1 << 14;

    // Offsets must be ascending and must not overlap; adjacent segments of one group are joined.
    // Throws std::invalid_argument.
    explicit Segments(const std::vector<Segment>& segments);

    // The segments, joined; and cut into blocks.
    const std::vector<Segment>& rows() const { return rows_; }
    const std::vector<Segment>& blocks() const { return blocks_; }
    std::int64_t numel() const { return numel_; }
    std::int64_t end() const { return end_; }
    std::int32_t groups() const { return groups_; }

  private:
    std::vector<Segment> rows_;
    std::vector<Segment> blocks_;
    std::int64_t numel_ = 0;
    std::int64_t end_ = 0;
    std::int32_t groups_ = 0;
};

}  // namespace partita
