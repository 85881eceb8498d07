// Dynamic loss scaling, and what one optimizer step needs to know about its gradients.
//
// The structs live in memory that the caller provides (on a GPU: device memory), so that deciding whether to skip a
// step needs no host.
#pragma once

#include <cstdint>

#include "partita/stream.h"

namespace partita {

struct LossScaleState {
    double scale;
    std::int64_t applied_steps;
    std::int64_t skipped_steps;
    std::int32_t good_steps;  // since a step was skipped; the step that grows the scale begins to count again, from 1
    std::int32_t hysteresis;  // overflows left before the scale is lowered
    std::int32_t consecutive_skips;
    std::int32_t at_minimum;  // 1: the last step overflowed although the scale could not be lowered further
};

struct StepControl {
    double grad_norm;   // of the mean gradient before clipping; not finite when the step is skipped
    float grad_scale;   // what a stored gradient is multiplied by: 1 / loss scale x mean x clip factor
    std::int32_t skip;  // 1: leave parameters and states as they are
    std::int64_t step;  // number of this update, from 1 on; bias correction reads it
};

class LossScaler {
  public:
    struct Config {
        bool dynamic = false;
        double initial_scale = 1.0;
        double minimum = 1.0;
        double maximum = 16777216.0;  // 2^24
        double factor = 2.0;
        std::int32_t window = 1000;           // good steps before the good step in which the scale grows
        std::int32_t hysteresis = 2;          // overflows tolerated before the scale shrinks
        bool consecutive_hysteresis = false;  // true: every good step restores the hysteresis
    };

    // Throws std::invalid_argument naming the field and its range.
    explicit LossScaler(const Config& config);

    LossScaleState initial() const;
    // The transition after one step, as in DeepSpeed's dynamic loss scaler. An overflow uses up hysteresis, then
    // divides the scale. A good step that has `window` good steps before it, since the last overflow or growth,
    // multiplies the scale and restores the hysteresis. So the scale grows first in good step `window` + 1, then in
    // every `window`th.
    void update(LossScaleState& state, bool overflow) const;

    const Config& config() const { return config_; }

  private:
    Config config_;
};

// Turns the sum of squares of the stored (summed, scaled) gradients into the step's control block, and advances the
// state.
//   mean         what makes the stored sum a mean: 1 / (ranks x micro-batches)
//   clip         largest norm of the mean gradient; 0: no clipping. Factor min(1, clip / (norm + 1e-6)), as
//                torch.nn.utils.clip_grad_norm_
void loss_scale_update(StepControl* control, LossScaleState* state, const LossScaler& scaler,
                       const double* sum_of_squares, double mean, double clip);
void loss_scale_update(StepControl* control, LossScaleState* state, const LossScaler& scaler,
                       const double* sum_of_squares, double mean, double clip, Stream stream);

}  // namespace partita
