#include "launch.cuh"
#include "loss_scale_step.h"
#include "partita/loss_scale.h"

namespace partita {
namespace cuda {
namespace {

__global__ void loss_scale_kernel(StepControl* control, LossScaleState* state, LossScaler::Config config,
                                  const double* sum_of_squares, double mean, double clip) {
    decide(*control, *state, config, *sum_of_squares, mean, clip);
}

}  // namespace
}  // namespace cuda

void loss_scale_update(StepControl* control, LossScaleState* state, const LossScaler& scaler,
                       const double* sum_of_squares, double mean, double clip, Stream stream) {
    cuda::launch<cuda::loss_scale_kernel>("loss_scale_update", stream, 1, 1, control, state, scaler.config(),
                                          sum_of_squares, mean, clip);
}

}  // namespace partita
