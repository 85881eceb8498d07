#include "launch.cuh"
#include "partita/cuda_device.h"

#ifndef PARTITA_CUDA_ARCHITECTURES
#define PARTITA_CUDA_ARCHITECTURES ""
#endif

namespace partita {

bool built_with_cuda() { return true; }

int cuda_device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    (void)cudaGetLastError();
    return 0;
}

CudaVersions cuda_versions() {
    CudaVersions versions;
    cuda::check(cudaDriverGetVersion(&versions.driver), "cuda_versions", "cudaDriverGetVersion");
    cuda::check(cudaRuntimeGetVersion(&versions.runtime), "cuda_versions", "cudaRuntimeGetVersion");
    return versions;
}

const char* cuda_architectures() { return PARTITA_CUDA_ARCHITECTURES; }

int load_cuda_kernels(int device) {
    const cuda::OnDevice here(device, "load_cuda_kernels");
    int count = 0;
    cuda::KnownKernel::for_each([&](const void* kernel) {
        cudaFuncAttributes attributes{};  // asking for these loads the kernel
        cuda::check(cudaFuncGetAttributes(&attributes, kernel), "load_cuda_kernels", "cudaFuncGetAttributes");
        ++count;
    });
    return count;
}

}  // namespace partita
