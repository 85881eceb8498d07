// For tests: what the emulated machine is like, what it did last, and how to make it fail.
//
// [Note: emulated CUDA]
// Kernels are compiled by the host's compiler and run on one of its threads: block after block, the threads of a block
// as fibers (fibers.h). Blocks and threads start in an order that changes from launch to launch: ascending, descending,
// shuffled. Shared memory is static and filled with 0xff (NaN, -1) before each block. What is not emulated: several
// blocks at once, dynamic shared memory, shuffles with a part of a warp, asynchrony, and memory that only one side can
// reach (a kernel that reads host memory is not noticed).
#pragma once

#include <cuda_runtime.h>

namespace cuda_emulator {

// The next call of this function of the CUDA runtime (any name of cuda_runtime.h) returns this error.
void fail_next(const char* function, cudaError_t error = cudaErrorUnknown);

// Devices by their number of multiprocessors; each of these holds two blocks. The last one is for a test that needs a
// device which nothing was asked about.
inline constexpr int multiprocessors[] = {3, 3, 1, 2, 200, 5};
inline constexpr int untouched_device = 5;

struct Launch {
    const void* kernel;
    std::size_t argument_bytes;
    bool was_loaded;  // before this launch, on this device
    int device;
    cudaStream_t stream;
    unsigned blocks;
    unsigned threads;
};
Launch last_launch();

}  // namespace cuda_emulator
