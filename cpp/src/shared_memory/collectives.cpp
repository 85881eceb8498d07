#include "shared_memory/collectives.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace partita {
namespace {

constexpr std::int64_t copy_block_bytes = 1 << 18;
constexpr std::int64_t part_unit = 64;  // elements: parts of an all-reduce share no cache line

DType dtype_of(Element element) {
    if (element == Element::f16) return DType::f16;
    return element == Element::bf16 ? DType::bf16 : DType::f32;
}

// The part of an all-reduce that a rank reduces for all.
struct Part {
    std::int64_t begin, end;

    Part(std::int64_t numel, int rank, int world_size) {
        const std::int64_t units = (numel + part_unit - 1) / part_unit;
        const std::int64_t each = (units + world_size - 1) / world_size * part_unit;
        begin = std::min(numel, rank * each);
        end = std::min(numel, begin + each);
    }
};

}  // namespace

std::string Collectives::describe(const Operation& operation) const {
    const std::string in = operation.call.empty() ? "" : " in " + operation.call + ",";
    return partita::describe(operation.request) + ", number " + std::to_string(operation.number) + "," + in;
}

void Collectives::announce(const Operation& operation, std::int64_t offset) {
    Slot& slot = peers_.control().slot(peers_.rank(), operation.number);
    slot.request = operation.request;
    slot.offset = offset;
    const std::size_t length = std::min(operation.call.size(), call_bytes - 1);
    std::memcpy(slot.call, operation.call.data(), length);
    slot.call[length] = 0;
    if (operation.is_small() && operation.request.numel > 0) {
        std::memcpy(slot.payload, operation.user, static_cast<std::size_t>(operation.request.bytes()));
    }
    peers_.own().posted.raise(operation.number + 1);
}

void Collectives::await_slot(const Operation& operation) {
    const auto why = [&] { return describe(operation); };
    peers_.await_all(&RankState::finished, operation.number + 1 - slots_per_rank, why);
}

void Collectives::await_finished(const Operation& operation) {
    const auto why = [&] { return describe(operation); };
    peers_.await_all(&RankState::finished, operation.number + 1, why);
    // A rank that gave up may have written its buffer again while this one still read it.
    peers_.require_no_failure(why);
}

bool Collectives::is_finished(const Operation& operation) const {
    return peers_.all_reached(&RankState::finished, operation.number + 1);
}

void Collectives::execute(Operation& operation) {
    peers_.await_all(&RankState::posted, operation.number + 1, [&] { return describe(operation); });
    check_agreement(operation);
    const std::vector<const char*> buffers = buffers_of(operation);
    const Request& request = operation.request;
    const std::int64_t slice = request.numel / peers_.world_size();
    const std::int64_t begin = peers_.rank() * slice;
    switch (request.collective) {
        case Collective::barrier:
            break;
        case Collective::all_reduce:
            all_reduce(operation, buffers);
            break;
        case Collective::reduce_scatter:
            reduce_range(operation, buffers, begin, begin + slice);
            break;
        case Collective::all_gather:
            all_gather(operation, buffers);
            break;
        case Collective::broadcast:
            copy(operation.buffer, buffers[static_cast<std::size_t>(request.root)], request.bytes());
            break;
    }
    peers_.own().reduced.raise(operation.number + 1);  // also where nobody looks: counts must not lag behind
    peers_.own().finished.raise(operation.number + 1);
}

// Every rank sees the others' announcements, so all of them raise, with the same text: of rank 0 and the first rank
// that differs from it. What a program called counts too: the collectives of two different calls may look the same.
void Collectives::check_agreement(const Operation& operation) const {
    const Slot& first = peers_.control().slot(0, operation.number);
    const std::string here = first.call;
    for (int r = 1; r < peers_.world_size(); ++r) {
        const Slot& slot = peers_.control().slot(r, operation.number);
        const std::string there = slot.call;
        const bool same_call = here.empty() || there.empty() || here == there;
        if (slot.request == first.request && same_call) continue;
        const std::string rank = std::to_string(r);
        const std::string both = "collective number " + std::to_string(operation.number) + " is " +
                                 partita::describe(first.request) + " on rank 0 but " +
                                 partita::describe(slot.request) + " on rank " + rank;
        const std::string rule = "all ranks must call the same collectives in the same order";
        if (!same_call) {
            peers_.fail(here + " is called on every rank; rank " + rank + " called " + there + " (" + both + ": " +
                        rule + ")");
        } else {
            peers_.fail((here.empty() ? "" : "in " + here + ": ") + both + ": " + rule);
        }
        peers_.require_usable();
    }
}

std::vector<const char*> Collectives::buffers_of(const Operation& operation) const {
    std::vector<const char*> buffers;
    for (int r = 0; r < peers_.world_size(); ++r) {
        const Slot& slot = peers_.control().slot(r, operation.number);
        buffers.push_back(operation.is_small() ? slot.payload
                                               : members_[static_cast<std::size_t>(r)].memory->data() + slot.offset);
    }
    return buffers;
}

void Collectives::all_reduce(Operation& operation, const std::vector<const char*>& buffers) {
    const std::int64_t numel = operation.request.numel;
    if (operation.is_small()) return reduce_range(operation, buffers, 0, numel);
    const int world_size = peers_.world_size();
    const Part own(numel, peers_.rank(), world_size);
    reduce_range(operation, buffers, own.begin, own.end);
    peers_.own().reduced.raise(operation.number + 1);
    const std::int64_t size = size_of(operation.request.element);
    for (int step = 1; step < world_size; ++step) {  // each begins with another neighbour
        const int r = (peers_.rank() + step) % world_size;
        peers_.await(r, peers_.control().state(r).reduced, operation.number + 1, [&] { return describe(operation); });
        const Part part(numel, r, world_size);
        copy(operation.buffer + part.begin * size, buffers[static_cast<std::size_t>(r)] + part.begin * size,
             (part.end - part.begin) * size);
    }
}

void Collectives::all_gather(const Operation& operation, const std::vector<const char*>& buffers) const {
    const std::int64_t bytes = operation.request.bytes() / peers_.world_size();
    for (int step = 0; step < peers_.world_size(); ++step) {
        const int r = (peers_.rank() + step) % peers_.world_size();
        copy(operation.buffer + r * bytes, buffers[static_cast<std::size_t>(r)] + r * bytes, bytes);
    }
}

void Collectives::reduce_range(const Operation& operation, const std::vector<const char*>& buffers, std::int64_t begin,
                               std::int64_t end) const {
    const Request& request = operation.request;
    const std::int64_t offset = begin * size_of(request.element), numel = end - begin;
    const int count = static_cast<int>(buffers.size());
    if (request.element == Element::f64) {
        std::vector<const double*> sources;
        for (const char* buffer : buffers) sources.push_back(reinterpret_cast<const double*>(buffer + offset));
        reduce(reinterpret_cast<double*>(operation.buffer + offset), sources.data(), count, numel, request.reduction);
        return;
    }
    std::vector<const void*> sources;
    for (const char* buffer : buffers) sources.push_back(buffer + offset);
    const Span to{operation.buffer + offset, numel, dtype_of(request.element)};
    reduce(to, sources.data(), count, request.reduction, threads_);
}

void Collectives::copy(char* to, const char* from, std::int64_t bytes) const {
    if (to == from) return;
    for_each_block((bytes + copy_block_bytes - 1) / copy_block_bytes, bytes, threads_, [&](std::int64_t block) {
        const std::int64_t begin = block * copy_block_bytes;
        std::memcpy(to + begin, from + begin, static_cast<std::size_t>(std::min(copy_block_bytes, bytes - begin)));
    });
}

}  // namespace partita
