// How the ranks of one host find each other: every rank hands its memory to every other over a Unix socket.
//
// Sockets have addresses in Linux's abstract namespace, which no file system shows and which end with the socket. Who
// runs as another user, or does not know the group's token, is turned away.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "partita/shared_memory/arena.h"
#include "partita/shared_memory/mapping.h"

namespace partita {

using Token = std::array<std::uint8_t, 16>;  // random, the same on all ranks of a group and on no others

// A rank's open door, made before the ranks tell each other their addresses, by the process that will be the rank: it
// is the one whose death the others notice.
class Listener {
  public:
    // Throws std::system_error.
    Listener();
    const std::string& address() const { return address_; }  // raw bytes
    int fd() const { return socket_.get(); }
    // Nobody can connect any more; who waits at the door is sent away.
    void close() { socket_ = FileDescriptor(); }

  private:
    FileDescriptor socket_;
    std::string address_;
};

struct Member {
    int process = 0;  // as this process sees it; 0 when it cannot
    std::shared_ptr<Mapping> memory;
};

// What a rank holds of its group.
struct Membership {
    int rank = 0;
    std::shared_ptr<Arena> arena;      // its own memory
    std::shared_ptr<Mapping> control;  // where ranks announce what they do; made by rank 0
    std::vector<Member> members;       // by rank, itself included

    int world_size() const { return static_cast<int>(members.size()); }
};

// Meets all other ranks; `addresses` by rank. Throws CommunicationError when one is missing after `timeout` or runs as
// another user, std::system_error when the system refuses memory or sockets.
Membership join(const Listener& listener, int rank, const std::vector<std::string>& addresses, const Token& token,
                std::int64_t arena_bytes, std::chrono::milliseconds timeout);

}  // namespace partita
