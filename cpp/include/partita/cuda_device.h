#pragma once

namespace partita {

// Whether the build has CUDA code. One of cuda/device.cu and cuda/no_cuda.cpp is linked.
bool built_with_cuda();
// GPUs that the CUDA runtime reports; 0 without a GPU, a driver or a CUDA build. Creates no context.
int cuda_device_count();

// Versions of CUDA as 1000 x major + 10 x minor: what the driver supports (0: there is no driver), and with which one
// the build was made. Zeros without a CUDA build.
struct CudaVersions {
    int driver = 0;
    int runtime = 0;
};
CudaVersions cuda_versions();
// What GPUs the build has code for, as CMAKE_CUDA_ARCHITECTURES has it: "80-real;90". Empty without a CUDA build.
const char* cuda_architectures();
// Loads every kernel of the build on a device and returns how many there are: CUDA does it at the first launch else,
// see [Note: kernels are loaded at once]. Errors of the CUDA runtime are thrown as std::runtime_error with their name;
// a build without CUDA throws.
int load_cuda_kernels(int device);

}  // namespace partita
