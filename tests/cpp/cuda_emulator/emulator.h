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

// The next call of this function of the CUDA runtime (any name of cuda_runtime.h) returns cudaErrorUnknown.
void fail_next(const char* function);

// Two devices of the same kind; each holds two blocks per multiprocessor. 3 multiprocessors unless told.
void set_multiprocessors(int count);

struct Launch {
    int device;
    cudaStream_t stream;
    unsigned blocks;
    unsigned threads;
};
Launch last_launch();

}  // namespace cuda_emulator
