// What each rank computes in a collective, once all ranks have announced it.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "partita/shared_memory/arena.h"
#include "shared_memory/peers.h"

namespace partita {

// A collective under way on this rank.
class Operation {
  public:
    Operation(const Request& what, std::uint32_t count, char* data, std::string call_name)
        : request(what), number(count), user(data), call(std::move(call_name)) {}

    const Request request;
    const std::uint32_t number;  // among the group's collectives
    char* const user;            // the caller's buffer
    const std::string call;      // what the program has called, for the peers; may be empty
    // Where the result is formed: the caller's buffer itself, or something to copy back from.
    char* buffer = nullptr;
    std::shared_ptr<Allocation> memory;  // that holds `buffer`, while peers may read it
    std::vector<char> values;            // holds `buffer` for small collectives
    bool executed = false;
    std::string error;
    std::mutex delivering;  // of `delivered`
    bool delivered = false;

    bool is_small() const { return request.bytes() <= payload_bytes; }
};

class Collectives {
  public:
    Collectives(Peers& peers, const std::vector<Member>& members, int threads)
        : peers_(peers), members_(members), threads_(threads) {}

    // Tells the peers what is to be done and where this rank's values are; at `offset` of its arena unless small.
    void announce(const Operation& operation, std::int64_t offset);
    // Returns when the result is in `operation.buffer`; peers may still read there.
    void execute(Operation& operation);
    // Returns when no peer reads this rank's buffer any more.
    void await_finished(const Operation& operation);
    bool is_finished(const Operation& operation) const;
    // The slot of a number is free again when the collective that had it before is finished everywhere.
    void await_slot(const Operation& operation);

  private:
    std::string describe(const Operation& operation) const;
    void check_agreement(const Operation& operation) const;
    std::vector<const char*> buffers_of(const Operation& operation) const;
    void all_reduce(Operation& operation, const std::vector<const char*>& buffers);
    void all_gather(const Operation& operation, const std::vector<const char*>& buffers) const;
    void reduce_range(const Operation& operation, const std::vector<const char*>& buffers, std::int64_t begin,
                      std::int64_t end) const;
    void copy(char* to, const char* from, std::int64_t bytes) const;

    Peers& peers_;
    const std::vector<Member>& members_;
    int threads_;
};

}  // namespace partita
