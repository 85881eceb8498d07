#include "partita/shared_memory/mapped_slices.h"

#include <exception>
#include <optional>
#include <stdexcept>

#include "partita/shared_memory/group.h"
#include "shared_memory/peers.h"

namespace partita {
namespace {

// What a rank tells the others.
struct Slice {
    std::int64_t bytes;
    std::int64_t offset;  // in its rank's arena; negative when there was no room
};

std::string describe(std::int64_t bytes_per_rank) {
    return "map_slices of " + std::to_string(bytes_per_rank) + " bytes per rank";
}

void check(std::int64_t bytes_per_rank) {
    if (bytes_per_rank > 0 && bytes_per_rank % page_bytes() == 0) return;
    throw std::invalid_argument(describe(bytes_per_rank) + ": a slice must be a positive multiple of the page size, " +
                                std::to_string(page_bytes()) + " bytes");
}

std::vector<Slice> exchange(Group& group, const Slice& own) {
    std::vector<Slice> slices(static_cast<std::size_t>(group.world_size()));
    slices[static_cast<std::size_t>(group.rank())] = own;
    const auto bytes = static_cast<std::int64_t>(slices.size() * sizeof(Slice));
    group.wait(*group.launch({Collective::all_gather, Element::byte, Reduction::sum, 0, bytes}, slices.data()));
    return slices;
}

// Every rank sees all sizes, so all of them raise, each with both sides.
void check_agreement(Peers& peers, const std::vector<Slice>& slices) {
    const std::int64_t own = slices[static_cast<std::size_t>(peers.rank())].bytes;
    for (std::size_t r = 0; r < slices.size(); ++r) {
        if (slices[r].bytes == own) continue;
        peers.fail(describe(own) + " on rank " + std::to_string(peers.rank()) + " but " +
                   std::to_string(slices[r].bytes) + " on rank " + std::to_string(r) +
                   ": all ranks must map slices of the same size");
        peers.require_usable();
    }
}

}  // namespace

std::shared_ptr<MappedSlices> MappedSlices::create(Group& group, Peers& peers, const Membership& membership,
                                                   std::int64_t bytes_per_rank) {
    peers.require_member();
    peers.require_usable();
    check(bytes_per_rank);
    Slice own{bytes_per_rank, -1};
    std::optional<AddressRange> addresses;
    std::exception_ptr no_room;
    try {
        const auto slice = membership.arena->allocate(bytes_per_rank);
        addresses.emplace(bytes_per_rank * membership.world_size());
        slice->leave_pages();  // from here on for good, see [Note: the life of slices]
        own.offset = slice->offset();
    } catch (const std::exception&) {
        no_room = std::current_exception();  // once the others know, who would wait
    }
    const std::vector<Slice> slices = exchange(group, own);
    check_agreement(peers, slices);
    if (no_room) std::rethrow_exception(no_room);
    std::vector<std::int64_t> offsets;
    for (std::size_t r = 0; r < slices.size(); ++r) {
        if (slices[r].offset < 0) {
            throw std::runtime_error(describe(bytes_per_rank) + ": rank " + std::to_string(r) + " has no room for it");
        }
        offsets.push_back(slices[r].offset);
    }
    return std::make_shared<MappedSlices>(std::move(*addresses), membership.members, offsets);
}

MappedSlices::MappedSlices(AddressRange addresses, const std::vector<Member>& members,
                           const std::vector<std::int64_t>& offsets)
    : addresses_(std::move(addresses)) {
    const std::int64_t bytes_per_rank = bytes() / static_cast<std::int64_t>(offsets.size());
    for (std::size_t r = 0; r < offsets.size(); ++r) {
        members[r].memory->map_again(offsets[r], bytes_per_rank,
                                     data() + static_cast<std::int64_t>(r) * bytes_per_rank);
    }
}

}  // namespace partita
