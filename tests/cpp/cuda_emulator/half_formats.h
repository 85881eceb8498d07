// Rounding of fp32 to 16-bit formats, to nearest and ties to even, by the host's arithmetic: no tricks with bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace cuda_emulator {

// A format with `fraction_bits` whose smallest normal number is 2^lowest.
inline unsigned short to_half_format(float value, int fraction_bits, int lowest) {
    if (std::isnan(value)) return 0x7fff;  // as the hardware has it
    const int infinity = 0x7fff >> fraction_bits << fraction_bits;
    const float magnitude = std::fabs(value);
    int bits = infinity;
    if (std::isfinite(value)) {
        const int exponent = magnitude == 0 ? lowest : std::max(std::ilogb(magnitude), lowest);
        const float units = std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent));
        bits = std::min(infinity, static_cast<int>(units) + ((exponent - lowest) << fraction_bits));
    }
    return static_cast<unsigned short>((std::signbit(value) ? 0x8000 : 0) | bits);
}

inline float from_half_format(unsigned short bits, int fraction_bits, int lowest) {
    const int infinity = 0x7fff >> fraction_bits << fraction_bits;
    const int magnitude = bits & 0x7fff, exponent = magnitude >> fraction_bits;
    const int fraction = magnitude & ((1 << fraction_bits) - 1);
    const int units = exponent == 0 ? fraction : fraction | 1 << fraction_bits;
    const float value = magnitude > infinity ? std::numeric_limits<float>::quiet_NaN()
                        : magnitude == infinity
                            ? std::numeric_limits<float>::infinity()
                            : std::ldexp(static_cast<float>(units), std::max(exponent, 1) - 1 + lowest - fraction_bits);
    return (bits & 0x8000) != 0 ? -value : value;
}

}  // namespace cuda_emulator
