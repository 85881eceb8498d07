// Single-threaded loops over contiguous memory, one set per processor level. Callers split the work and choose the
// level.
#pragma once

#include <cstdint>

#include "partita/cpu_level.h"
#include "partita/span.h"

namespace partita {

// Adam's per-element constants, worked out once per group and step.
struct AdamFactors {
    float grad_scale;
    float l2;    // weight decay that joins the gradient
    float keep;  // what decoupled decay leaves of the weight
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float inverse_sqrt_correction2;
    float eps;
    float step_size;  // lr / first bias correction
};

struct AdamRange {
    const void* grads;
    float* master;
    float* exp_avg;
    float* exp_avg_sq;
    void* params;  // null: not written
    std::int64_t numel;
};

struct Kernels {
    using Convert = void (*)(void* to, const void* from, std::int64_t numel, float scale);
    using SumOfSquares = double (*)(const void* values, std::int64_t numel);
    // to[i] = reduction over the sources s of from[s][begin + i], times factor
    using Reduce = void (*)(void* to, const void* const* from, int sources, std::int64_t begin, std::int64_t numel,
                            float factor);
    using Adam = void (*)(const AdamRange& range, const AdamFactors& factors);

    Convert copy[dtype_count][dtype_count];        // [from][to]: to = from * scale
    Convert accumulate[dtype_count][dtype_count];  // [from][to]: to += from * scale
    SumOfSquares sum_of_squares[dtype_count];
    Reduce sum[dtype_count];
    Reduce max[dtype_count];
    Adam adam[dtype_count][dtype_count];  // [grads][params]
};

constexpr int index(DType dtype) { return static_cast<int>(dtype); }

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// The set of one level; the level must not exceed best_cpu_level().
const Kernels& kernels(CpuLevel level);
// The set that this process uses.
const Kernels& kernels();

}  // namespace partita
