// The state machine of the loss scale, for the CPU and for a single CUDA thread.
#pragma once

#include <cmath>

#include "host_device.h"
#include "partita/loss_scale.h"

namespace partita {

PARTITA_HOST_DEVICE inline void advance(LossScaleState& state, const LossScaler::Config& config, bool overflow) {
    state.at_minimum = 0;
    if (!overflow) {
        ++state.applied_steps;
        state.consecutive_skips = 0;
        if (config.consecutive_hysteresis) state.hysteresis = config.hysteresis;
        if (!config.dynamic) return;
        if (state.good_steps < config.window) {
            ++state.good_steps;
            return;
        }
        const double grown = state.scale * config.factor;
        state.good_steps = 1;  // the step that grows the scale is the first of the next window
        state.hysteresis = config.hysteresis;
        state.scale = grown < config.maximum ? grown : config.maximum;
        return;
    }
    ++state.skipped_steps;
    ++state.consecutive_skips;
    state.good_steps = 0;
    if (!config.dynamic) return;
    if (state.hysteresis > 1) {
        --state.hysteresis;
        return;
    }
    const double shrunk = state.scale / config.factor;
    state.at_minimum = state.scale <= config.minimum ? 1 : 0;
    state.scale = shrunk > config.minimum ? shrunk : config.minimum;
}

PARTITA_HOST_DEVICE inline void decide(StepControl& control, LossScaleState& state, const LossScaler::Config& config,
                                       double sum_of_squares, double mean, double clip) {
    const double unscale = mean / state.scale;
    const bool overflow = !(sum_of_squares - sum_of_squares == 0);  // infinite or NaN
    control.grad_norm = sqrt(sum_of_squares) * unscale;
    control.skip = overflow ? 1 : 0;
    const double clip_factor = clip > 0 ? clip / (control.grad_norm + 1e-6) : 1.0;
    control.grad_scale = static_cast<float>(unscale * (clip_factor < 1.0 ? clip_factor : 1.0));
    advance(state, config, overflow);
    control.step = state.applied_steps;
}

}  // namespace partita
