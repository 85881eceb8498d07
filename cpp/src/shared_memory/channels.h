// Sends and receives between pairs of ranks: the sender announces where the data lies, the receiver copies it out.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "partita/shared_memory/arena.h"
#include "shared_memory/peers.h"

namespace partita {

// A send or a receive under way.
class Transfer {
  public:
    Transfer(bool is_send, int other, std::uint32_t count, Element type, std::int64_t elements, void* target)
        : sends(is_send), peer(other), number(count), element(type), numel(elements), data(target) {}

    const bool sends;
    const int peer;
    const std::uint32_t number;  // among those to, or from, this peer
    const Element element;
    const std::int64_t numel;
    void* const data;                    // of a receive: where to
    std::shared_ptr<Allocation> memory;  // of a send: what the peer reads
    bool in_place = false;               // of a send: `memory` is the caller's
    bool done = false;                   // of a receive
};

class Channels {
  public:
    Channels(Peers& peers, std::shared_ptr<Arena> arena, const std::vector<Member>& members);

    std::shared_ptr<Transfer> send(const void* data, Element element, std::int64_t numel, int to);
    std::shared_ptr<Transfer> receive(void* data, Element element, std::int64_t numel, int from);
    void wait(Transfer& transfer);
    // Memory of sends that their receivers may not have read.
    void leave_pages();

  private:
    struct Outgoing {  // to one peer
        std::mutex mutex;
        std::uint32_t sent = 0;
        std::deque<std::shared_ptr<Transfer>> untaken;
    };
    struct Incoming {          // from one peer
        std::mutex receiving;  // held while data is waited for and copied
        std::uint32_t received = 0;
        std::mutex mutex;  // of what follows
        std::uint32_t asked = 0;
        std::deque<std::weak_ptr<Transfer>> unreceived;  // expired: nobody wants the data
    };

    void check(int peer, std::int64_t numel, const char* what) const;
    void receive_next(int from, Incoming& incoming);
    void forget_taken(int to, Outgoing& outgoing);
    std::string describe(const Transfer& transfer) const;

    Peers& peers_;
    std::shared_ptr<Arena> arena_;
    const std::vector<Member>& members_;
    std::vector<std::unique_ptr<Outgoing>> outgoing_;  // by peer
    std::vector<std::unique_ptr<Incoming>> incoming_;
};

}  // namespace partita
