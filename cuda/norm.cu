// The sum of squares: one number per block of the segments, then their sum, each by a tree whose shape is fixed.
#include "checks.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "partita/norm.h"
#include "rows.cuh"
#include "vectors.cuh"

namespace partita {
namespace cuda {
namespace {

constexpr int together = 4;  // vectors per thread and turn
constexpr int resident = 3;  // of four blocks, some would keep registers in memory: those of many fp64 numbers
constexpr int warp_threads = 32;
constexpr int total_threads = 1024;  // of the one block that adds the blocks' sums

struct NormRow {
    const void* values;
    std::int64_t numel;
};

// The sum over a block's threads, in thread 0. All of them call it; none may call it again before a __syncthreads().
template <int threads>
__device__ double sum_of_block(double value) {
    __shared__ double of_warp[threads / warp_threads];
    for (int other = warp_threads / 2; other > 0; other /= 2) {
        value = __dadd_rn(value, __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(other)));
    }
    if (threadIdx.x % warp_threads == 0) of_warp[threadIdx.x / warp_threads] = value;
    __syncthreads();
    double total = 0;
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < threads / warp_threads; ++warp) total = __dadd_rn(total, of_warp[warp]);
    }
    return total;
}

template <class T>
__device__ double square_added(T value, double sum) {
    const double x = static_cast<double>(Lane::load(value).x);
    return __fma_rn(x, x, sum);
}

template <class T>
__device__ double sum_of_squares(const T* values, int numel) {
    constexpr int width = vector_width<T>;
    const int vectors = is_aligned<width>(values) ? numel / width : 0;
    double sums[together] = {};
    for (int first = threadIdx.x; first < vectors; first += block_threads * together) {
        Vector<T, width> in[together];
#pragma unroll
        for (int u = 0; u < together; ++u) {
            const int v = first + u * block_threads;
            in[u] = v < vectors ? load<T, width>(values, v) : Vector<T, width>{};
        }
#pragma unroll
        for (int u = 0; u < together; ++u) {
            for (int k = 0; k < width; ++k) sums[u] = square_added(in[u].values[k], sums[u]);
        }
    }
    for (int i = vectors * width + threadIdx.x; i < numel; i += block_threads) {
        sums[0] = square_added(values[i], sums[0]);
    }
    return __dadd_rn(__dadd_rn(sums[0], sums[1]), __dadd_rn(sums[2], sums[3]));
}

template <class T, int table_bytes>
__global__ void __launch_bounds__(block_threads, resident)
    norm_kernel(const __grid_constant__ Rows<NormRow, table_bytes> table, double* sums) {
    for (std::int64_t chunk = blockIdx.x; chunk < table.first_chunk[table.count]; chunk += gridDim.x) {
        const int r = table.find(chunk);
        const std::int64_t begin = (chunk - table.first_chunk[r]) * Segments::block_numel;
        const std::int64_t left = table.rows[r].numel - begin;
        const int numel = static_cast<int>(left < Segments::block_numel ? left : Segments::block_numel);
        const double sum =
            sum_of_block<block_threads>(sum_of_squares(static_cast<const T*>(table.rows[r].values) + begin, numel));
        if (threadIdx.x == 0) sums[chunk] = sum;
        __syncthreads();
    }
}

template <class T, int table_bytes>
void run(const Rows<NormRow, table_bytes>& table, double* sums, Stream stream) {
    launch<norm_kernel<T, table_bytes>, resident>("norm", stream, table.chunks(), block_threads, table, sums);
}

__global__ void __launch_bounds__(total_threads) total_kernel(double* total, const double* sums, std::int64_t count) {
    double mine = 0;
    for (std::int64_t i = threadIdx.x; i < count; i += total_threads) mine = __dadd_rn(mine, sums[i]);
    const double sum = sum_of_block<total_threads>(mine);
    if (threadIdx.x == 0) *total = __dadd_rn(*total, sum);
}

}  // namespace
}  // namespace cuda

void norm(double* sum_of_squares, const std::vector<NormPart>& parts, double* scratch, Stream stream) {
    check(parts);
    std::int64_t done = 0;
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        std::vector<cuda::NormRow> rows;
        for (const NormPart& part : parts) {
            if (part.values.dtype != dtype) continue;
            for (const Segment& s : part.segments->rows()) {
                rows.push_back({part.values.part(s.offset, s.numel).data, s.numel});
            }
        }
        cuda::for_each_table(rows, Segments::block_numel, [&](const auto& table) {
            cuda::with_type(dtype, [&](auto type) { cuda::run<decltype(type)>(table, scratch + done, stream); });
            done += table.chunks();
        });
    }
    cuda::launch<cuda::total_kernel>("norm", stream, done > 0 ? 1 : 0, cuda::total_threads, sum_of_squares, scratch,
                                     done);
}

}  // namespace partita
