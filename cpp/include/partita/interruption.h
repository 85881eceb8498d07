// How a wait of the core ends when the program is interrupted (Ctrl-C).
#pragma once

#include <chrono>
#include <functional>
#include <stdexcept>
#include <string>

namespace partita {

// A wait has ended because the program was interrupted.
class Interrupted : public std::runtime_error {
  public:
    explicit Interrupted(const std::string& awaited) : std::runtime_error("interrupted while waiting for " + awaited) {}
};

// Asked every now and then by a thread that waits: whether the wait is to end, as the program has been interrupted.
using IsInterrupted = std::function<bool()>;

// How often it is asked.
inline constexpr auto look_around_every = std::chrono::milliseconds(50);

}  // namespace partita
