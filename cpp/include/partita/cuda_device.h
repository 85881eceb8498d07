#pragma once

namespace partita {

// Whether the build has CUDA code. One of cuda/device.cu and cuda/no_cuda.cpp is linked.
bool built_with_cuda();
// GPUs that the CUDA runtime reports; 0 without a GPU, a driver or a CUDA build. Creates no context.
int cuda_device_count();

}  // namespace partita
