#include "partita/bucketer.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace partita {

Bucketer::Bucketer(std::vector<std::int32_t> unit_of, std::int32_t units)
    : unit_of_(std::move(unit_of)),
      expected_(unit_of_.size(), 1),
      seen_(unit_of_.size(), 0),
      missing_at_start_(static_cast<std::size_t>(std::max(units, 0)), 0),
      units_(units) {
    if (units < 0) throw std::invalid_argument("the number of units must not be negative: " + std::to_string(units));
    for (std::size_t p = 0; p < unit_of_.size(); ++p) {
        if (unit_of_[p] < 0 || unit_of_[p] >= units) {
            throw std::invalid_argument("parameter " + std::to_string(p) + " names unit " +
                                        std::to_string(unit_of_[p]) + " of " + std::to_string(units));
        }
        ++missing_at_start_[static_cast<std::size_t>(unit_of_[p])];
    }
    missing_ = missing_at_start_;
}

void Bucketer::begin_backward(bool overlap) {
    if (in_backward_) throw std::logic_error("begin_backward before the last backward was finished");
    in_backward_ = true;
    overlap_ = overlap;
    next_ = 0;
    std::fill(seen_.begin(), seen_.end(), 0);
    missing_ = missing_at_start_;
}

Bucketer::Range Bucketer::mark_ready(std::int32_t p) {
    if (!in_backward_) throw std::logic_error("mark_ready outside of a backward");
    const auto parameter = static_cast<std::size_t>(p);
    const std::int32_t unit = unit_of_.at(parameter);
    if (unit < next_ && learned_) {
        throw std::logic_error("parameter " + std::to_string(p) + " was accumulated after its unit was launched");
    }
    if (++seen_[parameter] <= expected_[parameter]) --missing_[static_cast<std::size_t>(unit)];
    const std::int32_t begin = next_;
    if (overlap_) {
        while (next_ < units_ && missing_[static_cast<std::size_t>(next_)] == 0) ++next_;
    }
    return {begin, next_};
}

bool Bucketer::is_complete(std::int32_t p) const {
    const std::int32_t unit = unit_of_.at(static_cast<std::size_t>(p));
    return missing_[static_cast<std::size_t>(unit)] == 0;
}

bool Bucketer::was_launched(std::int32_t p) const { return unit_of_.at(static_cast<std::size_t>(p)) < next_; }

Bucketer::Range Bucketer::finish() {
    if (!in_backward_) throw std::logic_error("finish outside of a backward");
    in_backward_ = false;
    learned_ = true;
    for (std::size_t p = 0; p < unit_of_.size(); ++p) {
        if (seen_[p] <= expected_[p]) continue;
        missing_at_start_[static_cast<std::size_t>(unit_of_[p])] += seen_[p] - expected_[p];
        expected_[p] = seen_[p];
    }
    return {std::exchange(next_, units_), units_};
}

}  // namespace partita
