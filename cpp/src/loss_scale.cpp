#include "partita/loss_scale.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "loss_scale_step.h"

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

void LossScaler::update(LossScaleState& state, bool overflow) const { advance(state, config_, overflow); }

void loss_scale_update(StepControl* control, LossScaleState* state, const LossScaler& scaler,
                       const double* sum_of_squares, double mean, double clip) {
    decide(*control, *state, scaler.config(), *sum_of_squares, mean, clip);
}

}  // namespace partita
