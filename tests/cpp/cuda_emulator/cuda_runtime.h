// The part of CUDA that the project's kernels use, on the host; see [Note: emulated CUDA] in emulator.h.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#include "fibers.h"

// The language.

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { cuda_emulator::block_barrier(); }

namespace cuda_emulator {
void require_full_mask(unsigned mask);

template <class T>
T shuffle(unsigned mask, T value, int lane) {
    require_full_mask(mask);
    warp_exchange(&value, sizeof value, lane);
    return value;
}

template <class To, class From>
To reinterpret(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace cuda_emulator

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return cuda_emulator::shuffle(mask, value, cuda_emulator::own_lane() ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
    const int own = cuda_emulator::own_lane(), other = own + static_cast<int>(lanes);
    return cuda_emulator::shuffle(mask, value, other < cuda_emulator::warp_size ? other : own);
}

// Arithmetic, each operation rounded once.

inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return ::sqrtf(a); }
inline double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline unsigned __float_as_uint(float value) { return cuda_emulator::reinterpret<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return cuda_emulator::reinterpret<float>(bits); }
template <class T>
T __ldg(const T* address) {
    return *address;
}

// The runtime.

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorUnknown = 999
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaFuncAttributes {
    std::size_t sharedSizeBytes;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemset(void* to, int value, std::size_t bytes);

namespace cuda_emulator {
cudaError_t allocate(void** memory, std::size_t bytes);
cudaError_t occupancy(int* blocks, int block_size, std::size_t shared_bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::size_t argument_bytes,
                   const std::function<void()>& thread);
}  // namespace cuda_emulator

template <class T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes) {
    void* result = nullptr;
    const cudaError_t error = cuda_emulator::allocate(&result, bytes);
    *memory = static_cast<T*>(result);
    return error;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int block_size,
                                                          std::size_t shared_bytes) {
    return cuda_emulator::occupancy(blocks, block_size, shared_bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
    return cuda_emulator::launch(*config, reinterpret_cast<const void*>(kernel), (sizeof(Parameters) + ... + 0),
                                 [&] { std::apply(kernel, parameters); });
}
