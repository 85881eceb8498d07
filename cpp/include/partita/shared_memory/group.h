// Collectives over memory that all ranks of one host can read.
//
// [Note: how a collective runs]
// All ranks launch the same collectives in the same order; number k of each rank belongs together. A launch announces
// the collective in the control memory: what it is, and where this rank's buffer lies (small values travel in the
// announcement itself). From then on peers can read it. The rest is done once per rank, by the communication thread
// (large ones) or by whoever waits first: when all have announced number k, each rank computes its own part
// straight out of its peers' memory, in rank order, so a result never depends on timing. Three counters per rank say
// how far it is: `posted`, `reduced` (its part of an all-reduce is ready to be gathered), `finished` (it no longer
// reads its peers). Nothing else synchronises, and nobody writes into another rank's buffers.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "partita/interruption.h"
#include "partita/shared_memory/mapped_slices.h"
#include "partita/shared_memory/membership.h"
#include "partita/shared_memory/request.h"

namespace partita {

class Operation;
class Transfer;

class Group {
  public:
    // `timeout`: how long a rank may be waited for. `threads`: that reduce or copy one large buffer together.
    // `is_interrupted`: asked by threads that wait, the group's own one too, every 50 ms and after each signal handler.
    // Where the answer is true, the group has failed and the call throws Interrupted.
    Group(Membership membership, std::chrono::milliseconds timeout, int threads, IsInterrupted is_interrupted = {});
    ~Group();

    int rank() const;
    int world_size() const;
    // Memory in which collectives work in place.
    std::shared_ptr<Allocation> allocate(std::int64_t bytes);
    // One buffer for all ranks, see MappedSlices. A collective: returns when all ranks have called it, with the same
    // size, which must be a multiple of page_bytes() above 0. Throws std::invalid_argument for another size, before
    // this rank takes part; CommunicationError; std::runtime_error when a rank (and on that rank std::bad_alloc or
    // std::system_error) has no addresses left: the group goes on.
    std::shared_ptr<MappedSlices> map_slices(std::int64_t bytes_per_rank);
    // Physical memory of this rank's allocations, and of its slices.
    std::int64_t committed_bytes() const;

    // Starts a collective on `data`. In memory of allocate() it works in place: the buffer must not be touched before
    // wait(). Other memory is copied here, and written by wait(). Throws std::invalid_argument for a request that makes
    // no sense, CommunicationError when the group has failed.
    // `call`: what the program has called (its first 63 bytes), for the error of ranks whose calls do not match; two
    // calls with names must be the same.
    std::shared_ptr<Operation> launch(const Request& request, void* data, std::string call = {});
    // Returns when the result is in the buffer and no peer reads it any more; a second call returns at once. Throws
    // CommunicationError.
    void wait(Operation& operation);
    // Returns when all ranks have called it.
    void barrier(std::string call = {});

    // Between two ranks, in the order of the calls. The data of a send may change after its wait(), which returns at
    // once for memory that is not of allocate(), and otherwise when the receiver has waited. A receive happens in its
    // wait(), after those before it from the same rank; one that is dropped without is read and forgotten.
    std::shared_ptr<Transfer> send(const void* data, Element element, std::int64_t numel, int to);
    std::shared_ptr<Transfer> receive(void* data, Element element, std::int64_t numel, int from);
    void wait(Transfer& transfer);

    // Nanoseconds in which callers of this rank were held up by each rank, since the group began. A wait for several
    // ranks is put down to the one that came last; waits of the group's own thread count while a caller waits for that
    // thread.
    std::vector<std::int64_t> waited_ns() const;

    // Leaves the group: peers that still wait for this rank get an error, and so does every further call here. Memory
    // of allocate() and of map_slices() stays valid. `reason`: for that error.
    void close(const std::string& reason = {});

  private:
    class State;
    std::unique_ptr<State> state_;
};

}  // namespace partita
