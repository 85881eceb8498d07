// How kernels are launched: on the stream's device, with a grid of its size, and with errors thrown.
//
// Every kernel runs on a fixed number of blocks per multiprocessor, which walk over the work in strides; work is cut
// into chunks by its size alone, so that no result depends on the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "partita/stream.h"

namespace partita::cuda {

inline constexpr int block_threads = 256;
// With 16 to 64 bytes under way per thread, 1024 threads keep the memory of a multiprocessor busy.
inline constexpr int resident_blocks = 4;

inline void check(cudaError_t error, const char* function, const char* call) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // it is told here, and not again by whoever asks next
    throw std::runtime_error(std::string(function) + ": " + call + " failed: " + cudaGetErrorName(error) + " (" +
                             cudaGetErrorString(error) + ")");
}

// Makes a device the current one, and then the former one again.
class OnDevice {
  public:
    OnDevice(int device, const char* function) : device_(device) {
        check(cudaGetDevice(&former_), function, "cudaGetDevice");
        if (former_ != device_) check(cudaSetDevice(device_), function, "cudaSetDevice");
    }
    ~OnDevice() {
        if (former_ != device_) (void)cudaSetDevice(former_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int device_;
    int former_ = 0;
};

// Queues `kernel` on at most `most_blocks` blocks of `threads` threads.
template <class... Parameters, class... Arguments>
void launch(const char* function, Stream stream, std::int64_t most_blocks, int threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
    if (most_blocks == 0) return;
    const OnDevice here(stream.device, function);
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, stream.device), function,
          "cudaDeviceGetAttribute");
    const std::int64_t blocks = std::min(most_blocks, std::int64_t{processors} * resident_blocks);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(stream.handle);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), function, "cudaLaunchKernelEx");
}

}  // namespace partita::cuda
