// The core's view of memory: a pointer, a number of elements and their type. It owns nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace partita {

enum class DType : std::uint8_t { f32, f16, bf16 };
inline constexpr int dtype_count = 3;

constexpr std::int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct Span {
    void* data = nullptr;
    std::int64_t numel = 0;
    DType dtype = DType::f32;

    // The part [offset, offset + count); the caller keeps it inside the span.
    Span part(std::int64_t offset, std::int64_t count) const {
        return {static_cast<char*>(data) + offset * size_of(dtype), count, dtype};
    }
};

}  // namespace partita
