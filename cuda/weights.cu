#include "checks.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "partita/weights.h"
#include "vectors.cuh"

namespace partita {
namespace cuda {
namespace {

constexpr int width = vector_width<float>;
constexpr int together = 4;  // vectors per thread and turn

template <class P>
__device__ void split_one(P& high, std::uint16_t& low, float master) {
    const Lane weight = Lane::load(master);
    store_weight(weight, high);
    weight.store_low(low);
}

// Whole vectors, when `aligned`: put(v, get(v)), with `together` of them under way. One by one, the elements that are
// left: one(i).
template <class Get, class Put, class ElementBody>
__device__ void for_each(std::int64_t numel, bool aligned, const Get& get, const Put& put, const ElementBody& one) {
    const std::int64_t vectors = aligned ? numel / width : 0;
    constexpr std::int64_t block_vectors = std::int64_t{block_threads} * together;
    for (std::int64_t first = blockIdx.x * block_vectors + threadIdx.x; first < vectors;
         first += gridDim.x * block_vectors) {
        decltype(get(first)) in[together];
#pragma unroll
        for (int u = 0; u < together; ++u) {
            const std::int64_t v = first + u * block_threads;
            if (v >= vectors) break;
            in[u] = get(v);
        }
#pragma unroll
        for (int u = 0; u < together; ++u) {
            const std::int64_t v = first + u * block_threads;
            if (v >= vectors) break;
            put(v, in[u]);
        }
    }
    const std::int64_t threads = std::int64_t{gridDim.x} * block_threads;
    for (std::int64_t i = vectors * width + std::int64_t{blockIdx.x} * block_threads + threadIdx.x; i < numel;
         i += threads) {
        one(i);
    }
}

template <class P>
__global__ void __launch_bounds__(block_threads, resident_blocks)
    split_kernel(P* params, std::uint16_t* remainder, const float* master, std::int64_t numel) {
    const bool aligned = is_aligned<width>(params) && is_aligned<width>(remainder) && is_aligned<width>(master);
    for_each(
        numel, aligned, [&](std::int64_t v) { return load<float, width>(master, v); },
        [&](std::int64_t v, const Vector<float, width>& in) {
            Vector<P, width> high;
            Vector<std::uint16_t, width> low;
            for (int k = 0; k < width; ++k) split_one(high.values[k], low.values[k], in.values[k]);
            store(params, v, high);
            if (remainder != nullptr) store(remainder, v, low);
        },
        [&](std::int64_t i) {
            std::uint16_t low;
            split_one(params[i], low, master[i]);
            if (remainder != nullptr) remainder[i] = low;
        });
}

struct Split {
    Vector<bf16, width> high;
    Vector<std::uint16_t, width> low;
};

__global__ void __launch_bounds__(block_threads, resident_blocks)
    join_kernel(float* master, const bf16* params, const std::uint16_t* remainder, std::int64_t numel) {
    const bool aligned = is_aligned<width>(params) && is_aligned<width>(remainder) && is_aligned<width>(master);
    for_each(
        numel, aligned,
        [&](std::int64_t v) { return Split{load<bf16, width>(params, v), load<std::uint16_t, width>(remainder, v)}; },
        [&](std::int64_t v, const Split& in) {
            Vector<float, width> out;
            for (int k = 0; k < width; ++k) Lane::load_joined(in.high.values[k], in.low.values[k]).store(out.values[k]);
            store(master, v, out);
        },
        [&](std::int64_t i) { Lane::load_joined(params[i], remainder[i]).store(master[i]); });
}

std::int64_t blocks_for(std::int64_t numel) {
    constexpr std::int64_t block_numel = block_threads * width * together;
    return (numel + block_numel - 1) / block_numel;
}

}  // namespace
}  // namespace cuda

void split_master(Span params, std::uint16_t* remainder, Span master, Stream stream) {
    check_split(params, remainder, master);
    cuda::with_type(params.dtype, [&](auto p) {
        using P = decltype(p);
        cuda::launch<cuda::split_kernel<P>>("split_master", stream, cuda::blocks_for(master.numel), cuda::block_threads,
                                            static_cast<P*>(params.data), remainder,
                                            static_cast<const float*>(master.data), master.numel);
    });
}

void join_master(Span master, Span params, const std::uint16_t* remainder, Stream stream) {
    check_join(master, params, remainder);
    cuda::launch<cuda::join_kernel>("join_master", stream, cuda::blocks_for(master.numel), cuda::block_threads,
                                    static_cast<float*>(master.data), static_cast<const bf16*>(params.data), remainder,
                                    master.numel);
}

}  // namespace partita
