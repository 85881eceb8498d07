#pragma once

#include "half_formats.h"

struct __half {
    unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __float2half_rn(float value) { return {cuda_emulator::to_half_format(value, 10, -14)}; }
inline float __half2float(__half value) { return cuda_emulator::from_half_format(value.bits, 10, -14); }
