// Decides when the gradients of a unit can be communicated.
#pragma once

#include <cstdint>
#include <vector>

namespace partita {

// Units are launched in the order of their index, whatever order gradients arrive in, so that all ranks issue the same
// collectives in the same order.
//
// A parameter's gradient may be accumulated several times in one backward (shared weights under reentrant
// checkpointing). How often is learned: a unit is launched when each of its parameters was accumulated as often as in
// any backward before, and at least once. In the first backward some may be accumulated again after that: the caller
// finds what is left, and launches their units once more.
class Bucketer {
  public:
    struct Range {
        std::int32_t begin;
        std::int32_t end;
    };

    // unit_of[p] is the unit of parameter p. Throws std::invalid_argument.
    Bucketer(std::vector<std::int32_t> unit_of, std::int32_t units);

    // Parameter `p` was accumulated: units that can be launched now (often none). With `overlap` false in
    // begin_backward, none before finish. Throws std::logic_error when its unit was launched already, unless this is
    // the first backward.
    Range mark_ready(std::int32_t p);
    void begin_backward(bool overlap);
    // Whether all parameters of p's unit were accumulated as often as expected, though it may not be its turn yet.
    bool is_complete(std::int32_t p) const;
    // Whether p's unit was launched in this backward.
    bool was_launched(std::int32_t p) const;
    // Backward is over: the units not launched yet.
    Range finish();
    bool in_backward() const { return in_backward_; }

  private:
    std::vector<std::int32_t> unit_of_;
    std::vector<std::int32_t> expected_;  // accumulations per parameter and backward
    std::vector<std::int32_t> seen_;      // in this backward
    std::vector<std::int32_t> missing_;   // per unit: accumulations that are still to come
    std::vector<std::int32_t> missing_at_start_;
    std::int32_t next_ = 0;  // first unit not launched
    std::int32_t units_;
    bool learned_ = false;
    bool overlap_ = false;
    bool in_backward_ = false;
};

}  // namespace partita
