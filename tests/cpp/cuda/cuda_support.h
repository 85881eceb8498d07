// What the tests of the CUDA functions share: memory of the device, streams, and the numbers to try. The same sources
// run on a GPU and on the emulated one (PARTITA_CUDA_EMULATED).
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <utility>

#include "../support.h"
#include "partita/segments.h"
#include "partita/stream.h"

namespace partita {

inline void check_cuda(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("test: ") + cudaGetErrorString(error));
}

// `bytes` of the current device.
class DeviceMemory {
  public:
    explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) { check_cuda(cudaMalloc(&data_, bytes)); }
    DeviceMemory(const void* from, std::size_t bytes) : DeviceMemory(bytes) {
        check_cuda(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice));
    }
    DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    DeviceMemory& operator=(DeviceMemory&&) = delete;
    ~DeviceMemory() { (void)cudaFree(data_); }

    unsigned char* data() const { return static_cast<unsigned char*>(data_); }
    std::size_t bytes() const { return bytes_; }
    // Waits for all work of the device.
    void read(void* to) const {
        check_cuda(cudaDeviceSynchronize());
        check_cuda(cudaMemcpy(to, data_, bytes_, cudaMemcpyDeviceToHost));
    }

  private:
    void* data_ = nullptr;
    std::size_t bytes_;
};

// A Buffer's copy on the device, guards included, and misaligned like it.
class DeviceBuffer {
  public:
    explicit DeviceBuffer(const Buffer& host) : host_(host), memory_(host.bytes().data(), host.bytes().size()) {}

    Span span() { return {memory_.data() + start(), host_.numel(), host_.dtype()}; }
    Buffer read() {
        auto* begin = static_cast<unsigned char*>(host_.span().data) - start();
        memory_.read(begin);
        return host_;
    }

  private:
    std::ptrdiff_t start() { return static_cast<unsigned char*>(host_.span().data) - host_.bytes().data(); }

    Buffer host_;
    DeviceMemory memory_;
};

// Numbers or structs on the device.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(const std::vector<T>& values)
        : count_(values.size()), memory_(values.data(), values.size() * sizeof(T)) {}
    explicit DeviceArray(const T& value) : DeviceArray(std::vector<T>{value}) {}

    T* data() const { return reinterpret_cast<T*>(memory_.data()); }
    std::vector<T> read() const {
        std::vector<T> values(count_);
        memory_.read(values.data());
        return values;
    }
    T value() const { return read()[0]; }

  private:
    std::size_t count_;
    DeviceMemory memory_;
};

// A stream of its own on the current device.
class OwnStream {
  public:
    OwnStream() {
        check_cuda(cudaGetDevice(&stream_.device));
        cudaStream_t handle = nullptr;
        check_cuda(cudaStreamCreate(&handle));
        stream_.handle = handle;
    }
    OwnStream(const OwnStream&) = delete;
    OwnStream& operator=(const OwnStream&) = delete;
    ~OwnStream() { (void)cudaStreamDestroy(static_cast<cudaStream_t>(stream_.handle)); }

    operator Stream() const { return stream_; }

  private:
    Stream stream_;
};

// Around the widths of vectors, and around the powers of two that work may be cut by.
inline std::vector<std::int64_t> sizes_to_try() {
    std::vector<std::int64_t> sizes = {0, 1, 15, 16, 17, 31, 33, 1000, 70000};
    for (std::int64_t power = 64; power <= 32768; power *= 2) {
        for (const std::int64_t size : {power - 1, power, power + 1}) sizes.push_back(size);
    }
    return sizes;
}

// Wild numbers (Random::fill_wild); those of a dtype are made once, since rounding by search takes time.
inline Buffer wild(DType dtype, std::int64_t numel, std::int64_t misalignment = 0, std::int64_t variant = 0) {
    static constexpr std::int64_t period = 30011;
    static const std::vector<Buffer> pools = [] {
        std::vector<Buffer> result;
        for (const DType each : all_dtypes) {
            Random random(static_cast<std::uint32_t>(each) + 1);
            random.fill_wild(result.emplace_back(each, period));
        }
        return result;
    }();
    const Buffer& pool = pools[static_cast<std::size_t>(dtype)];
    Buffer result(dtype, numel, misalignment);
    for (std::int64_t i = 0; i < numel; ++i) result.set_bits(i, pool.bits((i + variant * 7919) % period));
    return result;
}

}  // namespace partita
