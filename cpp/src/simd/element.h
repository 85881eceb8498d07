// 16-bit floating-point storage types.
#pragma once

#include <cstdint>

#include "partita/span.h"

namespace partita {

struct f16 {
    std::uint16_t bits;
};
struct bf16 {
    std::uint16_t bits;
};

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
    static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<f16> {
    static constexpr DType value = DType::f16;
};
template <>
struct dtype_of<bf16> {
    static constexpr DType value = DType::bf16;
};

}  // namespace partita
