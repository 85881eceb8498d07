// One buffer for all ranks: each has a slice of it in its own memory, and all slices, in rank order, in one range of
// addresses.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "partita/shared_memory/membership.h"

namespace partita {

class Group;
class Peers;

// A rank's view of the buffer. What any rank writes is there for all; they tell each other when, by a barrier, say.
//
// [Note: the life of slices]
// The view keeps the pages of every slice, whatever becomes of the other ranks and of the group. So an owner cannot
// know when its slice is no longer seen, and never gives it back to its arena. The pages go with the arena: when the
// group has gone and the last view of any rank has, too. Until then an arena whose rank was killed stays whole.
class MappedSlices {
  public:
    // What Group::map_slices() does.
    static std::shared_ptr<MappedSlices> create(Group& group, Peers& peers, const Membership& membership,
                                                std::int64_t bytes_per_rank);

    // `offsets`: by rank, where in its memory its slice is; the slices fill the addresses.
    MappedSlices(AddressRange addresses, const std::vector<Member>& members, const std::vector<std::int64_t>& offsets);

    char* data() const { return addresses_.data(); }
    std::int64_t bytes() const { return addresses_.bytes(); }

  private:
    AddressRange addresses_;
};

}  // namespace partita
