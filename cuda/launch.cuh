// How kernels are launched: on the stream's device, with a grid of its size, and with errors thrown.
//
// Every kernel runs on a fixed number of blocks per multiprocessor, which walk over the work in strides; work is cut
// into chunks by its size alone, so that no result depends on the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "partita/stream.h"

namespace partita::cuda {

inline constexpr int block_threads = 256;
// With 64 bytes under way per thread, 1024 threads keep the memory of a multiprocessor busy.
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

// A kernel of this build, in the list of all of them.
//
// [Note: kernels are loaded at once]
// CUDA loads a kernel when it is launched first. That may wait until the device is idle; the kernel of a collective,
// which spins until another rank has begun the same one, would be waited for, while that other rank may wait for this
// one. So all kernels are loaded before there is any collective. What launch() can launch is in the list: its template
// puts every kernel there when the program starts.
class KnownKernel {
  public:
    explicit KnownKernel(const void* kernel) : kernel_(kernel), next_(first_) { first_ = this; }

    // Calls visit(kernel) for each.
    template <class Visit>
    static void for_each(const Visit& visit) {
        for (const KnownKernel* known = first_; known != nullptr; known = known->next_) visit(known->kernel_);
    }

  private:
    inline static const KnownKernel* first_ = nullptr;
    const void* kernel_;
    const KnownKernel* next_;
};

template <auto kernel>
inline const KnownKernel known_kernel{reinterpret_cast<const void*>(kernel)};

// Multiprocessors of a device; it is asked once.
inline int multiprocessors_of(int device, const char* function) {
    static std::array<std::atomic<int>, 64> known{};
    const bool is_kept = device >= 0 && device < static_cast<int>(known.size());
    int count = is_kept ? known[static_cast<std::size_t>(device)].load(std::memory_order_relaxed) : 0;
    if (count == 0) {
        check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), function,
              "cudaDeviceGetAttribute");
        if (is_kept) known[static_cast<std::size_t>(device)].store(count, std::memory_order_relaxed);
    }
    return count;
}

// Queues `kernel` on at most `most_blocks` blocks of `threads` threads, `resident` of them per multiprocessor.
template <auto kernel, int resident = resident_blocks, class... Arguments>
void launch(const char* function, Stream stream, std::int64_t most_blocks, int threads, const Arguments&... arguments) {
    (void)&known_kernel<kernel>;
    if (most_blocks == 0) return;
    const OnDevice here(stream.device, function);
    const std::int64_t resident_here = std::int64_t{multiprocessors_of(stream.device, function)} * resident;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min(most_blocks, resident_here)));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(stream.handle);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), function, "cudaLaunchKernelEx");
}

}  // namespace partita::cuda
