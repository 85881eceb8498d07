// The emulator itself: it does what CUDA does where kernels are right, and shows what is wrong where they are not.
#include <gtest/gtest.h>

#include <vector>

#include "../support.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace {

constexpr int most_threads = 256;

cudaLaunchConfig_t config_of(unsigned blocks, unsigned threads) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    return config;
}

template <bool with_barrier>
__global__ void reverse_each_block(int* values) {
    __shared__ int kept[most_threads];
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    kept[threadIdx.x] = values[i];
    if (with_barrier) __syncthreads();
    values[i] = kept[blockDim.x - 1 - threadIdx.x];
}

template <bool with_barrier>
bool reverses() {
    std::vector<int> values(3 * 96);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i);
    const cudaLaunchConfig_t config = config_of(3, 96);
    EXPECT_EQ(cudaLaunchKernelEx(&config, reverse_each_block<with_barrier>, values.data()), cudaSuccess);
    for (int i = 0; i < 3 * 96; ++i) {
        if (values[static_cast<std::size_t>(i)] != i / 96 * 96 + 95 - i % 96) return false;
    }
    return true;
}

TEST(Emulator, ABarrierIsOneAndItsLackShows) {
    for (int launch = 0; launch < 6; ++launch) {
        EXPECT_TRUE(reverses<true>());
        EXPECT_FALSE(reverses<false>());
    }
}

// Adds up two rounds of numbers by warps; without the second barrier a warp that is ahead writes what thread 0 still
// reads.
template <bool with_barrier>
__global__ void sum_twice(int* result) {
    __shared__ int of_warp[2];
    for (int round = 1; round <= 2; ++round) {
        int value = round;
        for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
        __syncthreads();
        if (threadIdx.x == 0) result[round - 1] = of_warp[0] + of_warp[1];
        if (with_barrier) __syncthreads();
    }
}

TEST(Emulator, AWarpThatIsAheadShows) {
    const cudaLaunchConfig_t config = config_of(1, 64);
    int right = 0;
    for (int launch = 0; launch < 6; ++launch) {
        int result[2] = {};
        cudaLaunchKernelEx(&config, sum_twice<true>, &result[0]);
        EXPECT_EQ(result[0], 64);
        EXPECT_EQ(result[1], 128);
        cudaLaunchKernelEx(&config, sum_twice<false>, &result[0]);
        right += result[0] == 64 ? 1 : 0;
    }
    EXPECT_LT(right, 6) << "in one of the orders it must show";
}

// Reads what the block before has left if shared memory is not cleared.
__global__ void count_in_shared_memory(int* result) {
    __shared__ int count;
    if (blockIdx.x + 1 < gridDim.x) count = 5;
    __syncthreads();
    result[blockIdx.x * blockDim.x + threadIdx.x] = count;
}

TEST(Emulator, SharedMemoryDoesNotOutliveABlock) {
    std::vector<int> result(2 * 33);
    const cudaLaunchConfig_t config = config_of(2, 33);
    for (int launch = 0; launch < 3; ++launch) {
        cudaLaunchKernelEx(&config, count_in_shared_memory, result.data());
        EXPECT_EQ(result[0], 5);
        EXPECT_EQ(result[65], -1);
    }
}

template <class T>
__global__ void sum_by_shuffles(T* sums) {
    T down = static_cast<T>(threadIdx.x), xored = down;
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        down += __shfl_down_sync(0xffffffffu, down, static_cast<unsigned>(lanes));
        xored += __shfl_xor_sync(0xffffffffu, xored, lanes);
    }
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = down;
    if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32 + 2] = xored;
}

template <class T>
void expect_sums() {
    T sums[4] = {};
    const cudaLaunchConfig_t config = config_of(1, 64);
    for (int launch = 0; launch < 3; ++launch) {
        cudaLaunchKernelEx(&config, sum_by_shuffles<T>, &sums[0]);
        for (const int i : {0, 2}) {
            EXPECT_EQ(sums[i], T{496});
            EXPECT_EQ(sums[i + 1], T{1520});
        }
    }
}

TEST(Emulator, Shuffles) {
    expect_sums<double>();
    expect_sums<float>();
    expect_sums<int>();
}

__global__ void barrier_for_some() {
    if (threadIdx.x < 40) __syncthreads();
}
__global__ void shuffle_for_some(unsigned mask) {
    if (threadIdx.x < 40) __shfl_xor_sync(mask, 1, 1);
}
__global__ void shuffle_beyond_the_block() { __shfl_xor_sync(0xffffffffu, 1, 16); }

TEST(EmulatorDeathTest, WhatNeverArrives) {
    const cudaLaunchConfig_t config = config_of(1, 64);
    EXPECT_DEATH(cudaLaunchKernelEx(&config, barrier_for_some), "part of the block reaches __syncthreads");
    EXPECT_DEATH(cudaLaunchKernelEx(&config, shuffle_for_some, 0xffffffffu), "part of a warp reaches a shuffle");
    EXPECT_DEATH(cudaLaunchKernelEx(&config, shuffle_for_some, 0xffu), "mask ff");
    const cudaLaunchConfig_t small = config_of(1, 8);
    EXPECT_DEATH(cudaLaunchKernelEx(&small, shuffle_beyond_the_block), "lane that does not exist");
}

__global__ void nothing() {}

TEST(Emulator, RefusesLaunchesThatCudaRefuses) {
    for (const auto& [blocks, threads] : {std::pair{0u, 32u}, {1u, 0u}, {1u, 1025u}}) {
        const cudaLaunchConfig_t config = config_of(blocks, threads);
        EXPECT_EQ(cudaLaunchKernelEx(&config, nothing), cudaErrorInvalidConfiguration);
        EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
        EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    }
    cudaLaunchConfig_t config = config_of(2, 1024);
    cudaStream_t stream = nullptr;
    ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
    config.stream = stream;
    EXPECT_EQ(cudaLaunchKernelEx(&config, nothing), cudaSuccess);
    EXPECT_EQ(cuda_emulator::last_launch().stream, stream);
    EXPECT_EQ(cudaSetDevice(1), cudaSuccess);
    EXPECT_EQ(cudaLaunchKernelEx(&config, nothing), cudaErrorInvalidResourceHandle) << "a stream of another device";
    EXPECT_EQ(cudaSetDevice(6), cudaErrorInvalidDevice);
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    EXPECT_EQ(cudaLaunchKernelEx(&config, nothing), cudaErrorInvalidResourceHandle);
    cudaGetLastError();
}

TEST(Emulator, FailsWhenTold) {
    cuda_emulator::fail_next("cudaSetDevice");
    EXPECT_EQ(cudaSetDevice(0), cudaErrorUnknown);
    EXPECT_EQ(cudaGetLastError(), cudaErrorUnknown);
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
}

// Against the other reading of the formats: every number of them, and what lies between.
TEST(Emulator, HalfFormats) {
    using partita::DType;
    for (unsigned bits = 0; bits < 65536; ++bits) {
        const auto low = static_cast<unsigned short>(bits);
        const float f16 = partita::decode(DType::f16, bits), bf16 = partita::decode(DType::bf16, bits);
        if (!std::isnan(f16)) {
            ASSERT_EQ(__half2float(__ushort_as_half(low)), f16);
        }
        if (!std::isnan(bf16)) {
            ASSERT_EQ(__bfloat162float(__ushort_as_bfloat16(low)), bf16);
        }
        for (const unsigned rest : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
            for (const float value : {partita::bits_float(bits << 16 | rest), f16 * (1 + (rest & 1) * 0x1p-11f)}) {
                ASSERT_EQ(__half_as_ushort(__float2half_rn(value)) & 0x7fffu,
                          partita::encode(DType::f16, value) & 0x7fffu)
                    << value;
                ASSERT_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(value)) & 0x7fffu,
                          partita::encode(DType::bf16, value) & 0x7fffu)
                    << value;
            }
        }
    }
    EXPECT_EQ(__half_as_ushort(__float2half_rn(-1.0f)), 0xbc00);
    EXPECT_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(-0.0f)), 0x8000);
}

}  // namespace
