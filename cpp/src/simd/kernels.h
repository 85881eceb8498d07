// Single-threaded loops over contiguous memory, one set per processor level. Callers split the work and choose the
// level.
#pragma once

#include <cstdint>

#include "adam_update.h"
#include "partita/cpu_level.h"
#include "partita/span.h"

namespace partita {

struct AdamRange {
    const void* grads;
    float* master;
    float* exp_avg;
    float* exp_avg_sq;
    void* params;              // null: not written
    std::uint16_t* remainder;  // of split masters
    std::int64_t numel;
};

struct Kernels {
    using Convert = void (*)(void* to, const void* from, std::int64_t numel, float scale);
    using SumOfSquares = double (*)(const void* values, std::int64_t numel);
    // to[i] = reduction over the sources s of from[s][begin + i], times factor
    using Reduce = void (*)(void* to, const void* const* from, int sources, std::int64_t begin, std::int64_t numel,
                            float factor);
    // params, and remainder if not null, from master; and back
    using Split = void (*)(void* params, std::uint16_t* remainder, const float* master, std::int64_t numel);
    using Join = void (*)(float* master, const void* params, const std::uint16_t* remainder, std::int64_t numel);
    using Adam = void (*)(const AdamRange& range, const AdamFactors& factors);
    // Of XXH3: takes stripes of 64 bytes into its 8 sums, the first of them with secret[0, 64), each other one with
    // what begins 8 bytes further on. After every 16th of them scrambles the sums with secret[128, 192) and begins
    // anew.
    using Digest = void (*)(std::uint64_t* sums, const unsigned char* data, std::int64_t stripes,
                            const unsigned char* secret);

    Convert copy[dtype_count][dtype_count];        // [from][to]: to = from * scale
    Convert accumulate[dtype_count][dtype_count];  // [from][to]: to += from * scale
    SumOfSquares sum_of_squares[dtype_count];
    Reduce sum[dtype_count];
    Reduce max[dtype_count];
    Split split[dtype_count];             // [params]
    Join join;                            // bf16
    Adam adam[dtype_count][dtype_count];  // [grads][params]
    Adam split_adam[dtype_count];         // [grads]
    Digest digest;
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
