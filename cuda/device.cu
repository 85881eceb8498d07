#include <cuda_runtime_api.h>

#include "partita/cuda_device.h"

namespace partita {

bool built_with_cuda() { return true; }

int cuda_device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace partita
