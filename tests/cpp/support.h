// What the tests share: plain readings of the 16-bit formats, buffers with guards, random numbers.
//
// Nothing here uses the conversions of the core, so that an error there cannot hide itself.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "partita/adam.h"
#include "partita/cpu_level.h"
#include "partita/norm.h"
#include "partita/span.h"

namespace partita {

inline constexpr DType all_dtypes[] = {DType::f32, DType::f16, DType::bf16};

inline const char* name_of(DType dtype) { return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16"; }

// How GoogleTest prints parameters.
inline void PrintTo(DType dtype, std::ostream* out) { *out << name_of(dtype); }
inline void PrintTo(CpuLevel level, std::ostream* out) { *out << name_of(level); }

// "f32_bf16" for a test with two dtypes as its parameter.
inline std::string pair_name(const ::testing::TestParamInfo<std::tuple<DType, DType>>& pair) {
    return std::string(name_of(std::get<0>(pair.param))) + "_" + name_of(std::get<1>(pair.param));
}

inline std::string level_name(const ::testing::TestParamInfo<CpuLevel>& level) { return name_of(level.param); }

// The levels that this machine can run, from the scalar one on.
inline std::vector<CpuLevel> levels() {
    std::vector<CpuLevel> result;
    for (const CpuLevel level : {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}) {
        if (level <= best_cpu_level()) result.push_back(level);
    }
    return result;
}

// A 16-bit format as the list of its magnitudes in ascending order: entry i is the value of the bits i. The last entry
// has the bits of infinity and holds the number that would follow the largest finite one.
class HalfFormat {
  public:
    explicit HalfFormat(int fraction_bits)
        : fraction_bits_(fraction_bits), infinity_(0x7fff >> fraction_bits << fraction_bits) {
        const int bias = (1 << (14 - fraction_bits)) - 1;
        for (int bits = 0; bits <= infinity_; ++bits) {
            const int exponent = bits >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
            const int significand = exponent == 0 ? fraction : fraction + (1 << fraction_bits);
            magnitudes_.push_back(std::ldexp(significand, std::max(exponent, 1) - bias - fraction_bits));
        }
    }

    int infinity() const { return infinity_; }
    double magnitude(int bits) const { return magnitudes_[static_cast<std::size_t>(bits)]; }

    float decode(std::uint32_t bits) const {
        const int low = static_cast<int>(bits & 0x7fff);
        const float value = low > infinity_    ? std::numeric_limits<float>::quiet_NaN()
                            : low == infinity_ ? std::numeric_limits<float>::infinity()
                                               : static_cast<float>(magnitude(low));
        return (bits & 0x8000) != 0 ? -value : value;
    }

    // The nearest number by search; of two equally near, the one with even bits, or the larger magnitude.
    std::uint32_t encode(float value, bool ties_away = false) const {
        const std::uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
        if (std::isnan(value)) return sign | 0x7fffu;
        const double x = std::fabs(static_cast<double>(value));
        const auto above = std::upper_bound(magnitudes_.begin(), magnitudes_.end(), x);
        if (above == magnitudes_.end()) return sign | static_cast<std::uint32_t>(infinity_);
        const auto bits = static_cast<std::uint32_t>(above - magnitudes_.begin() - 1);
        const double down = x - above[-1], up = *above - x;
        return sign | (up < down || (up == down && (ties_away || bits % 2 == 1)) ? bits + 1 : bits);
    }

  private:
    int fraction_bits_;
    int infinity_;
    std::vector<double> magnitudes_;
};

inline const HalfFormat& half_format(DType dtype) {
    static const HalfFormat f16_format(10), bf16_format(7);
    return dtype == DType::f16 ? f16_format : bf16_format;
}

inline std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A float rounded to `dtype`, as the bits of one element; and back.
inline std::uint32_t encode(DType dtype, float value) {
    return dtype == DType::f32 ? float_bits(value) : half_format(dtype).encode(value);
}
inline float decode(DType dtype, std::uint32_t bits) {
    return dtype == DType::f32 ? bits_float(bits) : half_format(dtype).decode(bits);
}

// A master weight as the bits of its parameter: bf16 has ties away from zero.
inline std::uint32_t encode_weight(DType dtype, float master) {
    return dtype == DType::bf16 ? half_format(dtype).encode(master, true) : encode(dtype, master);
}

// Elements between guard bytes, `misalignment` elements off a 16-byte boundary. Comparing two buffers compares the
// guards too. With the address sanitizer nothing follows the last element, so that reading beyond it is seen as well.
class Buffer {
  public:
    Buffer(DType dtype, std::int64_t numel, std::int64_t misalignment = 0)
        : dtype_(dtype),
          numel_(numel),
          start_(static_cast<std::size_t>(16 + misalignment * size_of(dtype))),
          bytes_(start_ + static_cast<std::size_t>(numel * size_of(dtype)) + guard_bytes, 0xa5) {}

    Span span() { return {bytes_.data() + start_, numel_, dtype_}; }
    DType dtype() const { return dtype_; }
    std::int64_t numel() const { return numel_; }
    const std::vector<unsigned char>& bytes() const { return bytes_; }

    std::uint32_t bits(std::int64_t i) const {
        std::uint32_t bits = 0;  // the low bytes come first
        std::memcpy(&bits, bytes_.data() + start_ + i * size_of(dtype_), static_cast<std::size_t>(size_of(dtype_)));
        return bits;
    }
    void set_bits(std::int64_t i, std::uint32_t bits) {
        std::memcpy(bytes_.data() + start_ + i * size_of(dtype_), &bits, static_cast<std::size_t>(size_of(dtype_)));
    }
    float at(std::int64_t i) const { return decode(dtype_, bits(i)); }
    void set(std::int64_t i, float value) { set_bits(i, encode(dtype_, value)); }
    void fill(float value) {
        for (std::int64_t i = 0; i < numel_; ++i) set(i, value);
    }

  private:
#ifdef __SANITIZE_ADDRESS__
    static constexpr std::size_t guard_bytes = 0;
#else
    static constexpr std::size_t guard_bytes = 64;
#endif
    DType dtype_;
    std::int64_t numel_;
    std::size_t start_;
    std::vector<unsigned char> bytes_;
};

// Equal bit by bit, guards included; a NaN equals every other NaN.
inline ::testing::AssertionResult same(const Buffer& actual, const Buffer& expected) {
    if (actual.bytes() == expected.bytes()) return ::testing::AssertionSuccess();
    Buffer repaired = actual;  // with the elements that are right made equal bit by bit
    for (std::int64_t i = 0; i < expected.numel(); ++i) {
        const bool nans = std::isnan(actual.at(i)) && std::isnan(expected.at(i));
        if (nans) repaired.set_bits(i, expected.bits(i));
        if (nans || actual.bits(i) == expected.bits(i)) continue;
        return ::testing::AssertionFailure() << name_of(actual.dtype()) << " element " << i << " of " << actual.numel()
                                             << " is " << actual.at(i) << ", expected " << expected.at(i);
    }
    if (repaired.bytes() == expected.bytes()) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "bytes outside of the " << actual.numel() << " elements were written";
}

// A norm or an update of one part.
template <class... Where>
void norm(double* sum_of_squares, Span values, const Segments& segments, const Where&... where) {
    norm(sum_of_squares, {{values, &segments}}, where...);
}
template <class Where>
void adam(const AdamBuffers& buffers, const Segments& segments, const std::vector<AdamGroup>& groups,
          const StepControl* control, const Where& where) {
    adam({{buffers, &segments}}, groups, control, where);
}

class Random {
  public:
    explicit Random(std::uint32_t seed = 1) : engine_(seed) {}

    std::uint32_t bits() { return static_cast<std::uint32_t>(engine_()); }
    float uniform(float low, float high) { return low + (high - low) * static_cast<float>(bits() >> 8) * 0x1p-24f; }
    // Of either sign and of any size that f16 has.
    float wide() { return std::ldexp(uniform(-1.0f, 1.0f), static_cast<int>(bits() % 40) - 24); }
    void fill_uniform(Buffer& buffer, float low = -1.0f, float high = 1.0f) {
        for (std::int64_t i = 0; i < buffer.numel(); ++i) buffer.set(i, uniform(low, high));
    }
    // Mostly ordinary numbers; now and then zeros, infinities, NaN and the extremes.
    void fill_wild(Buffer& buffer) {
        constexpr float inf = std::numeric_limits<float>::infinity();
        constexpr float rare[] = {0.0f,  -0.0f,    inf,   -inf, std::numeric_limits<float>::quiet_NaN(),
                                  3e38f, 65504.0f, 1e-40f};
        for (std::int64_t i = 0; i < buffer.numel(); ++i) buffer.set(i, bits() % 16 == 0 ? rare[bits() % 8] : wide());
    }

  private:
    std::mt19937 engine_;
};

}  // namespace partita
