// Conversions of 16-bit floats bit by bit, rounding to nearest, ties to even. Not for the files that are compiled for
// one processor level: the linker could take their instance of an inline function for all.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/element.h"

namespace partita {

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return float_of(std::uint32_t{value.bits} << 16); }
inline float to_float(f16 value) {
    const std::uint32_t sign = std::uint32_t{value.bits & 0x8000u} << 16;
    const std::uint32_t exponent = (value.bits >> 10) & 0x1f;
    const std::uint32_t fraction = value.bits & 0x3ffu;
    if (exponent == 0x1f)  // infinity, or a NaN made quiet as the hardware does
        return float_of(sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0u));
    if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
    const float magnitude = static_cast<float>(fraction) * float_of(0x33800000u);  // fraction x 2^-24
    return float_of(sign | bits_of(magnitude));
}

inline void from_float(float& to, float value) { to = value; }

inline void from_float(bf16& to, float value) {
    const std::uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        to.bits = static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // a NaN stays one
    } else {
        to.bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}

inline void from_float(f16& to, float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t result;
    if (magnitude > 0x7f800000u) {
        result = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // from 65520 on everything rounds to infinity
        result = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, one unit is 2^-24
        // Next to 0.5 floats are 2^-24 apart, so the addition rounds to a multiple of it and leaves it in the low bits.
        result = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        result = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    }
    to.bits = static_cast<std::uint16_t>(sign | result);
}

}  // namespace partita
