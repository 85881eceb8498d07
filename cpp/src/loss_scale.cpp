#include "partita/loss_scale.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace partita {
namespace {

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("loss scaler: ") + what);
}

}  // namespace

LossScaler::LossScaler(const Config& config) : config_(config) {
    require(std::isfinite(config.initial_scale) && config.initial_scale > 0,
            "initial_scale must be positive and finite");
    if (!config.dynamic) return;
    require(config.minimum > 0, "minimum must be positive");
    require(config.minimum <= config.initial_scale, "minimum must not exceed initial_scale");
    require(std::isfinite(config.maximum) && config.initial_scale <= config.maximum,
            "initial_scale must not exceed maximum");
    require(std::isfinite(config.factor) && config.factor > 1, "factor must be above 1");
    require(config.window >= 1, "window must be at least 1");
    require(config.hysteresis >= 1, "hysteresis must be at least 1");
}

LossScaleState LossScaler::initial() const {
    LossScaleState state{};
    state.scale = config_.initial_scale;
    state.hysteresis = config_.hysteresis;
    return state;
}

void LossScaler::update(LossScaleState& state, bool overflow) const {
    state.at_minimum = 0;
    if (!overflow) {
        ++state.applied_steps;
        state.consecutive_skips = 0;
        if (config_.consecutive_hysteresis) state.hysteresis = config_.hysteresis;
        if (config_.dynamic && ++state.good_steps >= config_.window) {
            state.good_steps = 0;
            state.hysteresis = config_.hysteresis;
            state.scale = std::min(state.scale * config_.factor, config_.maximum);
        }
        return;
    }
    ++state.skipped_steps;
    ++state.consecutive_skips;
    state.good_steps = 0;
    if (!config_.dynamic) return;
    if (state.hysteresis > 1) {
        --state.hysteresis;
        return;
    }
    state.at_minimum = state.scale <= config_.minimum ? 1 : 0;
    state.scale = std::max(state.scale / config_.factor, config_.minimum);
}

void loss_scale_update(StepControl* control, LossScaleState* state, const LossScaler& scaler,
                       const double* sum_of_squares, double mean, double clip) {
    const double unscale = mean / state->scale;
    control->grad_norm = std::sqrt(*sum_of_squares) * unscale;
    control->skip = std::isfinite(*sum_of_squares) ? 0 : 1;
    const double clip_factor = clip > 0 ? std::min(1.0, clip / (control->grad_norm + 1e-6)) : 1.0;
    control->grad_scale = static_cast<float>(unscale * clip_factor);
    scaler.update(*state, control->skip != 0);
    control->step = state->applied_steps;
}

}  // namespace partita
