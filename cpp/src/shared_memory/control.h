// What ranks tell each other: the layout of the group's control memory. It begins as zeros. Every field is
// written by one rank only, but for the count of those who sleep on a signal.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "partita/shared_memory/mapping.h"
#include "partita/shared_memory/request.h"
#include "shared_memory/signal.h"

namespace partita {

inline constexpr std::uint32_t slots_per_rank = 64;  // collectives that a rank may have announced and not seen finished
inline constexpr std::int64_t payload_bytes = 8192;  // up to this size values travel in the slot itself
inline constexpr std::uint32_t messages_per_channel = 256;

inline constexpr std::size_t call_bytes = 64;  // of the name of what a program called, zero-terminated

enum class Standing : std::uint32_t { member = 0, failed, interrupted, left };

struct RankState {
    Signal posted;    // collectives announced
    Signal reduced;   // all-reduces whose part is reduced, counted as the collectives are
    Signal finished;  // collectives that this rank needs no peer's memory for any more
    std::atomic<Standing> standing;
    char reason[1020];  // why it is no member any more, zero-terminated; written before `standing`
};

struct alignas(64) Slot {
    Request request;
    std::int64_t offset;    // of the buffer in its rank's arena
    char call[call_bytes];  // in which the program is; empty: in none that has a name
    alignas(64) char payload[payload_bytes];
};

// From one rank to another.
struct Channel {
    struct Message {
        Element element;
        std::int64_t numel;
        std::int64_t offset;
    };
    Signal sent;   // by the sender
    Signal taken;  // by the receiver
    Message messages[messages_per_channel];
};

class Control {
  public:
    Control(char* memory, int world_size) : memory_(memory), world_size_(world_size) {}

    static std::int64_t bytes(int world_size) {
        const std::int64_t n = world_size;
        return n * static_cast<std::int64_t>(sizeof(RankState) + slots_per_rank * sizeof(Slot)) +
               n * n * static_cast<std::int64_t>(sizeof(Channel));
    }

    int world_size() const { return world_size_; }
    RankState& state(int rank) const { return reinterpret_cast<RankState*>(memory_)[rank]; }
    Slot& slot(int rank, std::uint32_t number) const {
        return slots()[static_cast<std::uint32_t>(rank) * slots_per_rank + number % slots_per_rank];
    }
    Channel& channel(int from, int to) const {
        Slot* end = slots() + static_cast<std::uint32_t>(world_size_) * slots_per_rank;
        return reinterpret_cast<Channel*>(end)[from * world_size_ + to];
    }

  private:
    Slot* slots() const { return reinterpret_cast<Slot*>(&state(world_size_)); }

    char* memory_;
    int world_size_;
};

}  // namespace partita
