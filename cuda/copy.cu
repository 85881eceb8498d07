// pack and cast: every thread has several vectors under way.
#include "copy_pairs.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "partita/copy.h"
#include "rows.cuh"
#include "vectors.cuh"

namespace partita {
namespace cuda {
namespace {

constexpr std::int64_t chunk_numel = 16384;

struct CopyRow {
    void* to;
    const void* from;  // null: zeros
    std::int64_t numel;
};

template <bool accumulate, class From, class To>
__device__ void put(To& to, From from, Lane scale, To old) {
    Lane value = Lane::load(from) * scale;
    if constexpr (accumulate) value = Lane::load(old) + value;
    value.store(to);
}

template <bool accumulate, class From, class To>
__device__ void copy_chunk(To* to, const From* from, int numel, Lane scale) {
    constexpr int width = vector_width<From, To>;
    constexpr int together = accumulate && width == 8 ? 2 : 4;  // vectors per thread and turn; registers are limited
    const int vectors = is_aligned<width>(to) && is_aligned<width>(from) ? numel / width : 0;
    for (int first = threadIdx.x; first < vectors; first += block_threads * together) {
        Vector<From, width> in[together];
        Vector<To, width> old[together] = {};
#pragma unroll
        for (int u = 0; u < together; ++u) {
            const int v = first + u * block_threads;
            if (v >= vectors) break;
            in[u] = load<From, width>(from, v);
            if constexpr (accumulate) old[u] = load<To, width>(to, v);
        }
#pragma unroll
        for (int u = 0; u < together; ++u) {
            const int v = first + u * block_threads;
            if (v >= vectors) break;
            Vector<To, width> out;
            for (int k = 0; k < width; ++k) {
                put<accumulate>(out.values[k], in[u].values[k], scale, old[u].values[k]);
            }
            store(to, v, out);
        }
    }
    for (int i = vectors * width + threadIdx.x; i < numel; i += block_threads) {
        put<accumulate>(to[i], from[i], scale, accumulate ? to[i] : To{});
    }
}

template <class To>
__device__ void zero_chunk(To* to, int numel) {
    constexpr int width = vector_width<To>;
    const int vectors = is_aligned<width>(to) ? numel / width : 0;
    for (int v = threadIdx.x; v < vectors; v += block_threads) store(to, v, Vector<To, width>{});
    for (int i = vectors * width + threadIdx.x; i < numel; i += block_threads) to[i] = To{};
}

template <bool accumulate, class From, class To, int table_bytes>
__global__ void __launch_bounds__(block_threads, resident_blocks)
    copy_kernel(const __grid_constant__ Rows<CopyRow, table_bytes> table, const Scale scale) {
    const Lane factor = Lane::broadcast(product(scale));
    for (std::int64_t chunk = blockIdx.x; chunk < table.first_chunk[table.count]; chunk += gridDim.x) {
        const int r = table.find(chunk);
        const CopyRow& row = table.rows[r];
        const std::int64_t begin = (chunk - table.first_chunk[r]) * chunk_numel;
        const int numel = static_cast<int>(row.numel - begin < chunk_numel ? row.numel - begin : chunk_numel);
        To* to = static_cast<To*>(row.to) + begin;
        if (row.from != nullptr) {
            copy_chunk<accumulate>(to, static_cast<const From*>(row.from) + begin, numel, factor);
        } else if (!accumulate) {
            zero_chunk(to, numel);
        }
    }
}

template <class From, class To, int table_bytes>
void run(const char* function, const Rows<CopyRow, table_bytes>& table, Scale scale, bool accumulate, Stream stream) {
    if (accumulate) {
        launch<copy_kernel<true, From, To, table_bytes>>(function, stream, table.chunks(), block_threads, table, scale);
    } else {
        launch<copy_kernel<false, From, To, table_bytes>>(function, stream, table.chunks(), block_threads, table,
                                                          scale);
    }
}

void run(const char* function, const std::vector<CopyPair>& pairs, Scale scale, bool accumulate, Stream stream) {
    std::vector<CopyRow> rows[dtype_count][dtype_count];
    for (const CopyPair& pair : pairs) {
        if (pair.to.numel == 0) continue;
        rows[static_cast<int>(pair.from.dtype)][static_cast<int>(pair.to.dtype)].push_back(
            {pair.to.data, pair.from.data, pair.to.numel});
    }
    for (const DType from : {DType::f32, DType::f16, DType::bf16}) {
        for (const DType to : {DType::f32, DType::f16, DType::bf16}) {
            for_each_table(rows[static_cast<int>(from)][static_cast<int>(to)], chunk_numel, [&](const auto& table) {
                with_type(from, [&](auto f) {
                    with_type(
                        to, [&](auto t) { run<decltype(f), decltype(t)>(function, table, scale, accumulate, stream); });
                });
            });
        }
    }
}

}  // namespace
}  // namespace cuda

void pack(Span destination, const std::vector<Span>& sources, const std::vector<std::int64_t>& offsets, Scale scale,
          bool accumulate, Stream stream) {
    cuda::run("pack", pack_pairs(destination, sources, offsets), scale, accumulate, stream);
}

void cast(Span destination, Span source, Scale scale, bool accumulate, Stream stream) {
    cuda::run("cast", cast_pairs(destination, source), scale, accumulate, stream);
}

}  // namespace partita
