// A counter in shared memory that others can sleep on.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace partita {

// Raised by one rank only. Counts wrap around; at any time they differ by less than half their range.
class alignas(64) Signal {
  public:
    bool reached(std::uint32_t target) const {
        return static_cast<std::int32_t>(value_.load(std::memory_order_acquire) - target) >= 0;
    }

    void raise(std::uint32_t value) {
        value_.store(value);
        if (sleepers_.load() > 0) wake();
    }

    // Lets all sleepers look around.
    void wake() { syscall(SYS_futex, &value_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

    // Sleeps while the target is not reached: until a wake-up, or for `longest`. May return early.
    void sleep(std::uint32_t target, std::chrono::milliseconds longest) {
        sleepers_.fetch_add(1);
        const std::uint32_t seen = value_.load();
        if (static_cast<std::int32_t>(seen - target) < 0) {
            const timespec duration{static_cast<time_t>(longest.count() / 1000),
                                    static_cast<long>(longest.count() % 1000) * 1000000};
            syscall(SYS_futex, &value_, FUTEX_WAIT, seen, &duration, nullptr, 0);
        }
        sleepers_.fetch_sub(1);
    }

  private:
    static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
    std::atomic<std::uint32_t> value_{0};
    std::atomic<std::uint32_t> sleepers_{0};
};

}  // namespace partita
