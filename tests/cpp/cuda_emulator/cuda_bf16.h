#pragma once

#include "half_formats.h"

struct __nv_bfloat16 {
    unsigned short bits;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {cuda_emulator::to_half_format(value, 7, -126)}; }
inline float __bfloat162float(__nv_bfloat16 value) { return cuda_emulator::from_half_format(value.bits, 7, -126); }
