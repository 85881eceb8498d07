// Numbers in memory, several per access, and one at a time in a register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "simd/element.h"

namespace partita::cuda {

// Neighbouring elements that are read or written by one instruction.
template <class T, int width>
struct alignas(sizeof(T) * width) Vector {
    T values[width];
};

// The widest type of an operation moves 16 bytes per access, so that each access of a warp covers whole lines of
// memory.
template <class A, class B = A>
inline constexpr int vector_width = static_cast<int>(16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B)));

template <class T, int width>
__device__ Vector<T, width> load(const T* from, std::int64_t vector) {
    return reinterpret_cast<const Vector<T, width>*>(from)[vector];
}

template <class T, int width>
__device__ void store(T* to, std::int64_t vector, const Vector<T, width>& values) {
    reinterpret_cast<Vector<T, width>*>(to)[vector] = values;
}

template <int width, class T>
__device__ bool is_aligned(const T* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(Vector<T, width>) == 0;
}

// One float; every operation is rounded once and never contracted.
struct Lane {
    float x;

    static __device__ Lane broadcast(float value) { return {value}; }
    static __device__ Lane load(float from) { return {from}; }
    static __device__ Lane load(f16 from) { return {__half2float(__ushort_as_half(from.bits))}; }
    static __device__ Lane load(bf16 from) { return {__uint_as_float(std::uint32_t{from.bits} << 16)}; }
    __device__ void store(float& to) const { to = x; }
    __device__ void store(f16& to) const { to.bits = __half_as_ushort(__float2half_rn(x)); }
    __device__ void store(bf16& to) const { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

    // See [Note: split masters].
    __device__ void store_high(bf16& to) const {
        const std::uint32_t bits = __float_as_uint(x);
        to.bits = static_cast<std::uint16_t>((x != x ? bits | 0x400000u : bits + 0x8000u) >> 16);
    }
    __device__ void store_low(std::uint16_t& to) const {
        to = static_cast<std::uint16_t>(x != x ? 0u : __float_as_uint(x));
    }
    static __device__ Lane load_joined(bf16 high, std::uint16_t low) {
        const auto remainder = static_cast<std::uint32_t>(static_cast<std::int16_t>(low));
        return {__uint_as_float((std::uint32_t{high.bits} << 16) + remainder)};
    }

    static __device__ Lane fma(Lane a, Lane b, Lane c) { return {__fmaf_rn(a.x, b.x, c.x)}; }
    __device__ Lane sqrt() const { return {__fsqrt_rn(x)}; }
    friend __device__ Lane operator+(Lane a, Lane b) { return {__fadd_rn(a.x, b.x)}; }
    friend __device__ Lane operator-(Lane a, Lane b) { return {__fsub_rn(a.x, b.x)}; }
    friend __device__ Lane operator*(Lane a, Lane b) { return {__fmul_rn(a.x, b.x)}; }
    friend __device__ Lane operator/(Lane a, Lane b) { return {__fdiv_rn(a.x, b.x)}; }
};

// A weight, as [Note: split masters] says when it is bf16.
template <class T>
__device__ void store_weight(Lane weight, T& to) {
    weight.store(to);
}
inline __device__ void store_weight(Lane weight, bf16& to) { weight.store_high(to); }

}  // namespace partita::cuda
