// How long this rank was held up by each other one.
//
// [Note: what counts as waiting]
// A wait for several ranks is put down to the one that came last: had the others come sooner, nothing would have
// changed. So the sum over ranks is the time that this rank has lost, and no time is counted twice. The group's own
// thread waits beside a program that computes: its waits count only while a caller is held up until that thread is
// done.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <ratio>
#include <thread>
#include <type_traits>
#include <vector>

namespace partita {

class Waits {
  public:
    using Clock = std::chrono::steady_clock;

    explicit Waits(int world_size) : nanoseconds_(static_cast<std::size_t>(world_size)) {}

    // Called by the group's own thread, before it waits for anybody.
    void belong_to_this_thread() { own_thread_ = std::this_thread::get_id(); }

    // In the lifetime of this object a caller is held up until the group's own thread is done, if `is_held_up`.
    class HeldUp {
      public:
        HeldUp(Waits& waits, bool is_held_up) : waits_(is_held_up ? &waits : nullptr) {
            if (is_held_up) waits.held_up_since_ = Clock::now().time_since_epoch().count();
        }
        ~HeldUp() {
            if (waits_ != nullptr) waits_->held_up_since_ = never;
        }
        HeldUp(const HeldUp&) = delete;
        HeldUp& operator=(const HeldUp&) = delete;

      private:
        Waits* waits_;
    };

    // The calling thread waited, and `rank` came last.
    void add(int rank, Clock::time_point from, Clock::time_point to) {
        std::int64_t begin = from.time_since_epoch().count();
        const std::int64_t end = to.time_since_epoch().count();
        if (std::this_thread::get_id() == own_thread_.load()) {
            begin = std::max(begin, held_up_since_.load());
        }
        if (begin < end) nanoseconds_[static_cast<std::size_t>(rank)].fetch_add(end - begin, std::memory_order_relaxed);
    }

    // By rank.
    std::vector<std::int64_t> nanoseconds() const { return {nanoseconds_.begin(), nanoseconds_.end()}; }

  private:
    static_assert(std::is_same_v<Clock::period, std::nano>);
    static constexpr std::int64_t never = std::numeric_limits<std::int64_t>::max();

    std::vector<std::atomic<std::int64_t>> nanoseconds_;
    std::atomic<std::int64_t> held_up_since_{never};  // of Clock
    std::atomic<std::thread::id> own_thread_{};
};

}  // namespace partita
