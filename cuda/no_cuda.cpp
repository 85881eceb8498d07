// Linked in place of the CUDA sources when the build has no nvcc.
#include <stdexcept>
#include <string>

#include "partita/adam.h"
#include "partita/copy.h"
#include "partita/cuda_device.h"
#include "partita/loss_scale.h"
#include "partita/norm.h"
#include "partita/weights.h"

namespace partita {
namespace {

[[noreturn]] void refuse(const char* function) {
    throw std::runtime_error(std::string(function) +
                             ": this build of Partita has no CUDA code; build it again with nvcc in PATH");
}

}  // namespace

bool built_with_cuda() { return false; }
int cuda_device_count() { return 0; }
CudaVersions cuda_versions() { return {}; }
const char* cuda_architectures() { return ""; }
int load_cuda_kernels(int) { refuse("load_cuda_kernels"); }

void pack(Span, const std::vector<Span>&, const std::vector<std::int64_t>&, Scale, bool, Stream) { refuse("pack"); }
void cast(Span, Span, Scale, bool, Stream) { refuse("cast"); }
void norm(double*, const std::vector<NormPart>&, double*, Stream) { refuse("norm"); }
void adam(const std::vector<AdamPart>&, const std::vector<AdamGroup>&, const StepControl*, Stream) { refuse("adam"); }
void loss_scale_update(StepControl*, LossScaleState*, const LossScaler&, const double*, double, double, Stream) {
    refuse("loss_scale_update");
}
void split_master(Span, std::uint16_t*, Span, Stream) { refuse("split_master"); }
void join_master(Span, Span, const std::uint16_t*, Stream) { refuse("join_master"); }

}  // namespace partita
