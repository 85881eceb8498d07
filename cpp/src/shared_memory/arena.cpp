#include "partita/shared_memory/arena.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace partita {
namespace {

constexpr std::int64_t times_the_share = 4;

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

Allocation::~Allocation() {
    if (reserved_ > 0) arena_->release(offset_, reserved_);
}

char* Allocation::data() const { return arena_->mapping()->data() + offset_; }

std::int64_t Arena::default_capacity_bytes(int world_size) {
    const std::int64_t memory = std::int64_t{sysconf(_SC_PHYS_PAGES)} * page_bytes();
    return round_up(times_the_share * memory / world_size, huge_page_bytes);
}

std::shared_ptr<Arena> Arena::create(std::int64_t capacity_bytes) {
    return std::shared_ptr<Arena>(new Arena(round_up(capacity_bytes, huge_page_bytes)));
}

Arena::Arena(std::int64_t capacity_bytes)
    : memory_(anonymous_memory(capacity_bytes)),
      mapping_(std::make_shared<Mapping>(memory_.get(), capacity_bytes, Mapping::Access::read_write)),
      owner_(getpid()) {
    free_[0] = capacity_bytes;
}

std::shared_ptr<Allocation> Arena::allocate(std::int64_t bytes) {
    if (bytes < 0 || bytes > capacity_bytes()) throw std::bad_alloc();
    // Whole pages, which can be given back.
    const std::int64_t reserved = round_up(std::max<std::int64_t>(bytes, 1), page_bytes());
    std::shared_ptr<Allocation> allocation;  // outlives the lock, which its end needs
    const std::lock_guard lock(mutex_);
    const std::int64_t offset = take(reserved);
    allocation = std::make_shared<Allocation>(shared_from_this(), offset, bytes, reserved);
    live_[offset] = allocation;
    return allocation;
}

// First fit; an allocation of at least a huge page starts at one.
std::int64_t Arena::take(std::int64_t bytes) {
    const std::int64_t alignment = bytes >= huge_page_bytes ? huge_page_bytes : page_bytes();
    for (auto range = free_.begin(); range != free_.end(); ++range) {
        const std::int64_t begin = range->first, end = begin + range->second;
        const std::int64_t offset = round_up(begin, alignment);
        if (offset + bytes > end) continue;
        free_.erase(range);
        if (begin < offset) free_[begin] = offset - begin;
        if (offset + bytes < end) free_[offset + bytes] = end - offset - bytes;
        return offset;
    }
    throw std::bad_alloc();
}

std::shared_ptr<Allocation> Arena::find(const void* data, std::int64_t bytes) {
    const std::int64_t offset = static_cast<const char*>(data) - mapping_->data();
    if (offset < 0 || offset >= mapping_->bytes()) return nullptr;
    std::shared_ptr<Allocation> allocation;  // outlives the lock, which its end needs
    const std::lock_guard lock(mutex_);
    auto next = live_.upper_bound(offset);
    if (next == live_.begin()) return nullptr;
    allocation = std::prev(next)->second.lock();
    const bool holds = allocation != nullptr && offset + bytes <= allocation->offset() + allocation->bytes();
    return holds ? allocation : nullptr;
}

void Arena::release(std::int64_t offset, std::int64_t bytes) {
    if (getpid() != owner_) return;
    fallocate(memory_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
    const std::lock_guard lock(mutex_);
    live_.erase(offset);
    auto range = free_.emplace(offset, bytes).first;
    const auto next = std::next(range);
    if (next != free_.end() && range->first + range->second == next->first) {
        range->second += next->second;
        free_.erase(next);
    }
    if (range != free_.begin()) {
        const auto previous = std::prev(range);
        if (previous->first + previous->second == range->first) {
            previous->second += range->second;
            free_.erase(range);
        }
    }
}

std::int64_t Arena::committed_bytes() const {
    struct stat status{};
    if (fstat(memory_.get(), &status) != 0) throw_errno("fstat");
    return std::int64_t{status.st_blocks} * 512;
}

}  // namespace partita
