// From a DType to the element type that stands for it.
#pragma once

#include "simd/element.h"

namespace partita::cuda {

// Calls body(T{}) with the type of `dtype`.
template <class Body>
void with_type(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::f32:
            return body(float{});
        case DType::f16:
            return body(f16{});
        case DType::bf16:
            return body(bf16{});
    }
}

}  // namespace partita::cuda
