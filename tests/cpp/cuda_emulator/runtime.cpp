#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim, gridDim;

// All variables declared __shared__; the linker names the ends of the section.
extern "C" {
__attribute__((weak)) extern unsigned char __start_cuda_shared[];
__attribute__((weak)) extern unsigned char __stop_cuda_shared[];
}

namespace cuda_emulator {
namespace {

constexpr int device_count = sizeof(multiprocessors) / sizeof(multiprocessors[0]);

struct Machine {
    int device = 0;
    int launches = 0;
    cudaError_t last_error = cudaSuccess;
    std::string fails_next;
    cudaError_t fails_with = cudaSuccess;
    std::set<std::pair<int, const void*>> loaded;  // devices and kernels
    std::map<cudaStream_t, int> streams;           // and the device of each
    Launch last_launch{};
};

Machine& machine() {
    static Machine result;
    return result;
}

// What a function of the runtime returns: `error`, unless a test wants it to fail.
cudaError_t finish(const char* function, cudaError_t error = cudaSuccess) {
    if (machine().fails_next == function) {
        machine().fails_next.clear();
        error = machine().fails_with;
    }
    if (error != cudaSuccess) machine().last_error = error;
    return error;
}

bool usable(cudaStream_t stream) {
    const auto found = machine().streams.find(stream);
    return stream == nullptr || (found != machine().streams.end() && found->second == machine().device);
}

// Ascending, descending, or shuffled: by `seed`.
std::vector<int> order_of(unsigned count, int seed) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (seed % 3 == 1) std::reverse(order.begin(), order.end());
    if (seed % 3 == 2) std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(seed)));
    return order;
}

// Not instrumented: the sanitizer keeps gaps between the variables.
__attribute__((no_sanitize_address)) void forget_shared_memory() {
    for (volatile unsigned char* byte = __start_cuda_shared; byte != __stop_cuda_shared; ++byte) *byte = 0xff;
}

}  // namespace

void fail_next(const char* function, cudaError_t error) {
    machine().fails_next = function;
    machine().fails_with = error;
}
Launch last_launch() { return machine().last_launch; }

void require_full_mask(unsigned mask) {
    if (mask == 0xffffffffu) return;
    std::fprintf(stderr, "cuda_emulator: a shuffle with mask %x; only all lanes are emulated\n", mask);
    std::abort();
}

cudaError_t allocate(void** memory, std::size_t bytes) {
    const bool failed = bytes > 0 && posix_memalign(memory, 256, bytes) != 0;
    return finish("cudaMalloc", failed ? cudaErrorMemoryAllocation : cudaSuccess);
}

cudaError_t occupancy(int* blocks, int block_size, std::size_t shared_bytes) {
    const bool fits = block_size >= 1 && block_size <= 1024 && shared_bytes == 0;
    *blocks = fits ? 2 : 0;
    return finish("cudaOccupancyMaxActiveBlocksPerMultiprocessor", fits ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::size_t argument_bytes,
                   const std::function<void()>& thread) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    if (!usable(config.stream)) return finish("cudaLaunchKernelEx", cudaErrorInvalidResourceHandle);
    const bool valid = grid.x >= 1 && grid.x <= 0x7fffffffu && block.x >= 1 && block.x <= 1024 && grid.y == 1 &&
                       grid.z == 1 && block.y == 1 && block.z == 1 && config.dynamicSmemBytes == 0 &&
                       config.numAttrs == 0 && argument_bytes <= 32764;
    const cudaError_t error = finish("cudaLaunchKernelEx", valid ? cudaSuccess : cudaErrorInvalidConfiguration);
    if (error != cudaSuccess) return error;
    const bool was_loaded = !machine().loaded.emplace(machine().device, kernel).second;
    machine().last_launch = {kernel, argument_bytes, was_loaded, machine().device, config.stream, grid.x, block.x};
    gridDim = grid;
    blockDim = block;
    const int seed = machine().launches++;
    for (const int i : order_of(grid.x, seed)) {
        blockIdx.x = static_cast<unsigned>(i);
        forget_shared_memory();
        run_block(order_of(block.x, seed + i), [](int t) { threadIdx.x = static_cast<unsigned>(t); }, thread);
    }
    return cudaSuccess;
}

}  // namespace cuda_emulator

using cuda_emulator::finish;
using cuda_emulator::machine;

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "cudaSuccess";
        case cudaErrorInvalidValue:
            return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation:
            return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration:
            return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDevice:
            return "cudaErrorInvalidDevice";
        case cudaErrorNoKernelImageForDevice:
            return "cudaErrorNoKernelImageForDevice";
        case cudaErrorInvalidResourceHandle:
            return "cudaErrorInvalidResourceHandle";
        default:
            return "cudaErrorUnknown";
    }
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorNoKernelImageForDevice:
            return "no kernel image is available for execution on the device";
        case cudaErrorInvalidResourceHandle:
            return "invalid resource handle";
        default:
            return "unknown error";
    }
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = finish("cudaGetLastError", machine().last_error);
    machine().last_error = cudaSuccess;
    return error;
}

cudaError_t cudaGetDevice(int* device) {
    *device = machine().device;
    return finish("cudaGetDevice");
}

cudaError_t cudaSetDevice(int device) {
    const bool exists = device >= 0 && device < cuda_emulator::device_count;
    const cudaError_t error = finish("cudaSetDevice", exists ? cudaSuccess : cudaErrorInvalidDevice);
    if (error == cudaSuccess) machine().device = device;
    return error;
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = cuda_emulator::device_count;
    return finish("cudaGetDeviceCount");
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = 13010;
    return finish("cudaDriverGetVersion");
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 12080;
    return finish("cudaRuntimeGetVersion");
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    *attributes = {};
    machine().loaded.emplace(machine().device, kernel);
    return finish("cudaFuncGetAttributes");
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    const bool exists = device >= 0 && device < cuda_emulator::device_count;
    if (exists) *value = cuda_emulator::multiprocessors[device];
    return finish("cudaDeviceGetAttribute", exists ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceSynchronize() { return finish("cudaDeviceSynchronize"); }

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    *stream = static_cast<cudaStream_t>(std::malloc(1));  // an address of its own
    machine().streams[*stream] = machine().device;
    return finish("cudaStreamCreate");
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const bool known = machine().streams.erase(stream) == 1;
    if (known) std::free(stream);
    return finish("cudaStreamDestroy", known ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const bool known = stream == nullptr || machine().streams.count(stream) == 1;
    return finish("cudaStreamSynchronize", known ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return finish("cudaFree");
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return finish("cudaMemcpy");
}

cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
    if (bytes > 0) std::memset(to, value, bytes);
    return finish("cudaMemset");
}
