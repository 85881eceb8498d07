#include "shared_memory/peers.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434  // the same on all processors; older headers lack it
#endif

namespace partita {
namespace {

using Clock = Waits::Clock;

constexpr auto spin_time = std::chrono::microseconds(20);
constexpr auto own_interruption_within = std::chrono::milliseconds(200);

void relax() {
#ifdef PARTITA_X86
    __builtin_ia32_pause();
#endif
}

// How a wait begins. `missing` says who has not come yet, by a number of 0 and more; the last such answer is in `last`.
template <class Missing>
bool spin(const Missing& missing, Clock::time_point begin, int& last) {
    do {
        for (int i = 0; i < 16; ++i) {
            const int rank = missing();
            if (rank < 0) return true;
            last = rank;
            relax();
        }
    } while (Clock::now() < begin + spin_time);
    return false;
}

std::string seconds(std::chrono::milliseconds duration) {
    std::string text = std::to_string(static_cast<double>(duration.count()) / 1000);
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
    return text + " s";
}

}  // namespace

Peers::Peers(Control control, int rank, const std::vector<Member>& members, std::chrono::milliseconds timeout,
             IsInterrupted is_interrupted)
    : control_(control),
      waits_(control.world_size()),
      rank_(rank),
      timeout_(timeout),
      is_interrupted_(std::move(is_interrupted)),
      process_(getpid()) {
    for (const Member& member : members) {
        processes_.push_back(member.process);
        const long fd = member.process > 0 ? syscall(SYS_pidfd_open, member.process, 0) : -1;
        watches_.emplace_back(static_cast<int>(fd));
    }
}

int Peers::first_missing(Signal RankState::* signal, std::uint32_t target) const {
    for (int r = 0; r < world_size(); ++r) {
        if (!(control_.state(r).*signal).reached(target)) return r;
    }
    return nobody;
}

void Peers::await_all(Signal RankState::* signal, std::uint32_t target, const Describe& describe) {
    int last = first_missing(signal, target);
    if (last == nobody) return;
    const auto begin = Clock::now();
    if (!spin([&] { return first_missing(signal, target); }, begin, last)) {
        std::vector<Awaited> missing;
        for (int r = 0; r < world_size(); ++r) missing.push_back({r, &(control_.state(r).*signal)});
        sleep(std::move(missing), target, describe, last);
    }
    waits_.add(last, begin, Clock::now());
}

void Peers::await(int rank, Signal& signal, std::uint32_t target, const Describe& describe) {
    if (signal.reached(target)) return;
    const auto begin = Clock::now();
    int last = rank;
    if (!spin([&] { return signal.reached(target) ? nobody : rank; }, begin, last)) {
        sleep({{rank, &signal}}, target, describe, last);
    }
    waits_.add(rank, begin, Clock::now());
}

void Peers::sleep(std::vector<Awaited> missing, std::uint32_t target, const Describe& describe, int& last) {
    const auto deadline = Clock::now() + timeout_;
    for (;;) {
        require_usable();
        // Read before the counters are: who has raised its counter and died or left since is not missing.
        const bool timed_out = Clock::now() >= deadline;
        std::vector<std::string> reasons;
        for (const Awaited& awaited : missing) reasons.push_back(why_missing(awaited.rank, timed_out));
        const bool interrupted = std::any_of(missing.begin(), missing.end(), [&](const Awaited& awaited) {
            return is_standing(awaited.rank, Standing::interrupted);
        });
        for (std::size_t i = missing.size(); i-- > 0;) {
            if (missing[i].signal->reached(target)) {
                missing.erase(missing.begin() + static_cast<std::ptrdiff_t>(i));
                reasons.erase(reasons.begin() + static_cast<std::ptrdiff_t>(i));
            }
        }
        if (missing.empty()) return;
        last = missing.front().rank;  // whose signal wakes this rank: who comes later is still missing then
        const auto reason = std::find_if(reasons.begin(), reasons.end(), [](const auto& r) { return !r.empty(); });
        if (reason != reasons.end()) {
            if (interrupted) await_own_interruption(describe);
            fail(describe() + " on rank " + std::to_string(rank_) + ": " + *reason);
            require_usable();
        }
        missing.front().signal->sleep(target, look_around_every);
        require_uninterrupted(describe);
    }
}

void Peers::require_uninterrupted(const Describe& describe) {
    if (!is_interrupted_ || !is_interrupted_()) return;
    give_up("it was interrupted in " + describe() + " by Ctrl-C or another signal", Standing::interrupted);
    throw Interrupted("another rank");
}

void Peers::await_own_interruption(const Describe& describe) {
    const auto end = Clock::now() + own_interruption_within;
    do {
        require_uninterrupted(describe);
        std::this_thread::sleep_for(spin_time);
    } while (is_interrupted_ && Clock::now() < end);
}

// Empty while there is hope.
std::string Peers::why_missing(int rank, bool timed_out) {
    const std::string who = "rank " + std::to_string(rank);
    const std::string process = " (process " + std::to_string(processes_[static_cast<std::size_t>(rank)]) + ")";
    const RankState& state = control_.state(rank);
    const Standing standing = state.standing.load();
    if (standing == Standing::failed) return who + " gave up: " + std::string(state.reason);
    if (standing == Standing::interrupted) return who + " gave up: " + std::string(state.reason);
    if (standing == Standing::left) {
        const std::string why = state.reason;
        return who + process + " has left the group" + (why.empty() ? "" : ": " + why);
    }
    if (has_died(rank)) return who + process + " died";
    if (timed_out) {
        return who + process + " did not take part within " + seconds(timeout_) +
               ": it hangs, is stopped, or took another path; raise comm.timeout_seconds if it may be busy that long";
    }
    return "";
}

bool Peers::has_died(int rank) const {
    const int watch = watches_[static_cast<std::size_t>(rank)].get();
    if (watch >= 0) {
        pollfd state{watch, POLLIN, 0};
        return poll(&state, 1, 0) > 0;
    }
    const int process = processes_[static_cast<std::size_t>(rank)];
    return process > 0 && kill(process, 0) != 0 && errno == ESRCH;
}

void Peers::require_member() const {
    if (!forked()) return;
    throw CommunicationError("rank " + std::to_string(rank_) + " is process " + std::to_string(process_) +
                             ": its forked child " + std::to_string(getpid()) + " is no member of the group");
}

void Peers::require_no_failure(const Describe& describe) {
    for (int r = 0; r < world_size(); ++r) {
        if (r == rank_ || !(is_standing(r, Standing::failed) || is_standing(r, Standing::interrupted))) continue;
        fail(describe() + " on rank " + std::to_string(rank_) + ": " + why_missing(r, false));
        require_usable();
    }
}

void Peers::require_usable() {
    if (failed_) {
        const std::lock_guard lock(mutex_);
        throw CommunicationError(failure_);
    }
    if (leaving_) throw CommunicationError("rank " + std::to_string(rank_) + " has closed its group");
}

void Peers::give_up(const std::string& reason, Standing standing) {
    {
        const std::lock_guard lock(mutex_);
        if (failed_ || leaving_) return;
        failure_ = reason;
        write_reason(reason);
        own().standing = standing;
        failed_ = true;
    }
    wake_waiting_peers();
}

void Peers::write_reason(const std::string& reason) {
    RankState& state = own();
    const std::size_t length = std::min(reason.size(), sizeof state.reason - 1);
    std::memcpy(state.reason, reason.data(), length);
    state.reason[length] = 0;
}

void Peers::leave(const std::string& reason) {
    {
        const std::lock_guard lock(mutex_);  // a thread of this rank may be failing
        if (leaving_.exchange(true)) return;
        if (!failed_) {
            write_reason(reason);
            own().standing = Standing::left;
        }
    }
    wake_waiting_peers();
    // Threads of this process sleep on the peers' signals; those in a send or receive look around by themselves.
    for (int r = 0; r < world_size(); ++r) {
        RankState& state = control_.state(r);
        for (Signal* signal : {&state.posted, &state.reduced, &state.finished}) signal->wake();
    }
}

// All signals that this rank raises: who sleeps on one sees that it will not.
void Peers::wake_waiting_peers() {
    for (Signal* signal : {&own().posted, &own().reduced, &own().finished}) signal->wake();
    for (int r = 0; r < world_size(); ++r) {
        control_.channel(rank_, r).sent.wake();
        control_.channel(r, rank_).taken.wake();
    }
}

}  // namespace partita
