// Waiting for other ranks, and what becomes of a group when one of them does not come.
//
// [Note: failures]
// Who waits for a rank's counter also watches the process behind it. When that process has died, has left the group or
// lets the timeout pass, the group has failed on this rank: this and every further call throws CommunicationError, and
// the reason stands where the peers find it, so that they do not wait for this rank either.
//
// An interrupted wait (Ctrl-C) fails the group as well: half of the collective may have been done. Ctrl-C reaches all
// ranks of a terminal, one after the other. So a rank that learns of a peer's interruption gives its own a moment.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "partita/interruption.h"
#include "partita/shared_memory/membership.h"
#include "shared_memory/control.h"
#include "shared_memory/waits.h"

namespace partita {

using Describe = std::function<std::string()>;  // what a rank was doing when it had to wait

class Peers {
  public:
    Peers(Control control, int rank, const std::vector<Member>& members, std::chrono::milliseconds timeout,
          IsInterrupted is_interrupted);

    int rank() const { return rank_; }
    int world_size() const { return control_.world_size(); }
    const Control& control() const { return control_; }
    RankState& own() const { return control_.state(rank_); }
    // What the waits of this rank have come to.
    Waits& waits() { return waits_; }

    bool all_reached(Signal RankState::* signal, std::uint32_t target) const {
        return first_missing(signal, target) == nobody;
    }
    // Returns when all ranks have raised the signal that far; throws CommunicationError when one will not.
    void await_all(Signal RankState::* signal, std::uint32_t target, const Describe& describe);
    // The same for one signal, which belongs to `rank`.
    void await(int rank, Signal& signal, std::uint32_t target, const Describe& describe);
    // Throws CommunicationError when a rank has failed: what it did last may not be what it announced.
    void require_no_failure(const Describe& describe);

    // Throws CommunicationError in a forked child of the member. What threads of the parent held or were about to do is
    // lost there, so this comes before any lock.
    void require_member() const;
    // Throws CommunicationError if the group has failed or was closed.
    void require_usable();
    // The group has failed on this rank for this reason (unless it has before); tells the peers.
    void fail(const std::string& reason) { give_up(reason, Standing::failed); }
    // Throws Interrupted if the program has been interrupted: the group has failed then.
    void require_uninterrupted(const Describe& describe);
    // This rank leaves; whoever waits, here or elsewhere, looks around. `reason`: for those who wait elsewhere.
    void leave(const std::string& reason);
    bool forked() const { return getpid() != process_; }

  private:
    static constexpr int nobody = -1;

    struct Awaited {
        int rank;
        Signal* signal;
    };

    // `last`: a rank that has not come; becomes the one that came last.
    void sleep(std::vector<Awaited> missing, std::uint32_t target, const Describe& describe, int& last);
    int first_missing(Signal RankState::* signal, std::uint32_t target) const;  // or `nobody`
    std::string why_missing(int rank, bool timed_out);
    bool is_standing(int rank, Standing standing) const { return control_.state(rank).standing.load() == standing; }
    void give_up(const std::string& reason, Standing standing);
    void write_reason(const std::string& reason);
    void await_own_interruption(const Describe& describe);
    bool has_died(int rank) const;
    void wake_waiting_peers();

    Control control_;
    Waits waits_;
    int rank_;
    std::chrono::milliseconds timeout_;
    IsInterrupted is_interrupted_;
    int process_;                          // this one
    std::vector<int> processes_;           // by rank; 0: not visible from here
    std::vector<FileDescriptor> watches_;  // pidfds by rank; invalid where the system has none
    std::atomic<bool> leaving_{false};
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    std::string failure_;
};

}  // namespace partita
