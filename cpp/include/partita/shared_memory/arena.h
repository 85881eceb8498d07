// One rank's memory that its peers can read: a large range of addresses, of which allocations commit what they touch.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "partita/shared_memory/mapping.h"

namespace partita {

class Arena;

// A part of an arena; its pages go back to the system when it dies.
class Allocation {
  public:
    Allocation(std::shared_ptr<Arena> arena, std::int64_t offset, std::int64_t bytes, std::int64_t reserved)
        : arena_(std::move(arena)), offset_(offset), bytes_(bytes), reserved_(reserved) {}
    Allocation(const Allocation&) = delete;
    Allocation& operator=(const Allocation&) = delete;
    ~Allocation();

    char* data() const;
    std::int64_t offset() const { return offset_; }
    std::int64_t bytes() const { return bytes_; }
    // A peer may still read this memory and can no longer be waited for: it stays as it is, for the life of the arena.
    void leave_pages() { reserved_ = 0; }

  private:
    std::shared_ptr<Arena> arena_;
    std::int64_t offset_;
    std::int64_t bytes_;
    std::int64_t reserved_;
};

class Arena : public std::enable_shared_from_this<Arena> {
  public:
    // Throws std::system_error.
    static std::shared_ptr<Arena> create(std::int64_t capacity_bytes);
    // Several times a rank's share of the machine's memory. Every rank maps all arenas of its group, and addresses, if
    // plentiful, are finite.
    static std::int64_t default_capacity_bytes(int world_size);

    // Throws std::bad_alloc when no free range is long enough.
    std::shared_ptr<Allocation> allocate(std::int64_t bytes);
    // The live allocation that holds all of [data, data + bytes); null if there is none.
    std::shared_ptr<Allocation> find(const void* data, std::int64_t bytes);

    int fd() const { return memory_.get(); }
    const std::shared_ptr<Mapping>& mapping() const { return mapping_; }
    std::int64_t capacity_bytes() const { return mapping_->bytes(); }
    // Physical memory that is committed now.
    std::int64_t committed_bytes() const;

  private:
    friend class Allocation;
    explicit Arena(std::int64_t capacity_bytes);
    std::int64_t take(std::int64_t bytes);
    void release(std::int64_t offset, std::int64_t bytes);

    FileDescriptor memory_;
    std::shared_ptr<Mapping> mapping_;
    int owner_;  // process id: a forked child must not free its parent's pages
    std::mutex mutex_;
    std::map<std::int64_t, std::int64_t> free_;               // offset -> bytes, neighbours joined
    std::map<std::int64_t, std::weak_ptr<Allocation>> live_;  // by offset
};

}  // namespace partita
