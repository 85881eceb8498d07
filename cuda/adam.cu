// Adam: every byte of weights, moments and gradients is read once and written once.
#include <type_traits>

#include "adam_update.h"
#include "checks.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "partita/adam.h"
#include "rows.cuh"
#include "vectors.cuh"

namespace partita {
namespace cuda {
namespace {

constexpr std::int64_t chunk_numel = 4096;
constexpr int width = vector_width<float>;
constexpr int small_groups = 8;   // optimizer groups of a launch with few rows
constexpr int table_groups = 64;  // of any launch

struct AdamRow {
    const void* grads;
    float* master;
    float* exp_avg;
    float* exp_avg_sq;
    void* params;
    std::uint16_t* remainder;
    std::int64_t numel;
    std::int32_t group;  // of the launch
};

// The optimizer groups of a launch, and the control block of its step.
struct AdamStep {
    const AdamGroup* groups;
    int group_count;
    const StepControl* control;
};

template <int table_bytes>
struct AdamTable {
    Rows<AdamRow, table_bytes> rows;
    AdamGroup groups[table_bytes == small_table ? small_groups : table_groups];
    int group_count;
    const StepControl* control;

    AdamTable(const Rows<AdamRow, table_bytes>& some, const AdamStep& step)
        : rows(some), group_count(step.group_count), control(step.control) {
        std::copy_n(step.groups, step.group_count, groups);
    }
};
static_assert(sizeof(AdamTable<large_table>) <= 32764, "more than a kernel's arguments may have");

// Where a weight is: an fp32 master, with or without a parameter beside it ...
template <class P>
struct WholeMasters {
    struct Loaded {
        Vector<float, width> master;
    };
    float* master;
    P* params;

    __device__ WholeMasters(const AdamRow& row, std::int64_t begin)
        : master(row.master + begin), params(row.params == nullptr ? nullptr : static_cast<P*>(row.params) + begin) {}
    __device__ bool are_aligned() const { return is_aligned<width>(master) && is_aligned<width>(params); }
    __device__ Loaded load_vector(int v) const { return {load<float, width>(master, v)}; }
    static __device__ Lane weight(const Loaded& loaded, int k) { return Lane::load(loaded.master.values[k]); }
    __device__ void store_vector(int v, const Lane* weights) const {
        Vector<float, width> whole;
        Vector<P, width> rounded;
        for (int k = 0; k < width; ++k) {
            weights[k].store(whole.values[k]);
            store_weight(weights[k], rounded.values[k]);
        }
        store(master, v, whole);
        if (params != nullptr) store(params, v, rounded);
    }
    __device__ Lane load_one(int i) const { return Lane::load(master[i]); }
    __device__ void store_one(int i, Lane weight) const {
        weight.store(master[i]);
        if (params != nullptr) store_weight(weight, params[i]);
    }
};

// ... or a bf16 parameter and the remainder of its master.
struct SplitMasters {
    struct Loaded {
        Vector<bf16, width> high;
        Vector<std::uint16_t, width> low;
    };
    bf16* params;
    std::uint16_t* remainder;

    __device__ SplitMasters(const AdamRow& row, std::int64_t begin)
        : params(static_cast<bf16*>(row.params) + begin), remainder(row.remainder + begin) {}
    __device__ bool are_aligned() const { return is_aligned<width>(params) && is_aligned<width>(remainder); }
    __device__ Loaded load_vector(int v) const {
        return {load<bf16, width>(params, v), load<std::uint16_t, width>(remainder, v)};
    }
    static __device__ Lane weight(const Loaded& loaded, int k) {
        return Lane::load_joined(loaded.high.values[k], loaded.low.values[k]);
    }
    __device__ void store_vector(int v, const Lane* weights) const {
        Loaded split;
        for (int k = 0; k < width; ++k) {
            weights[k].store_high(split.high.values[k]);
            weights[k].store_low(split.low.values[k]);
        }
        store(params, v, split.high);
        store(remainder, v, split.low);
    }
    __device__ Lane load_one(int i) const { return Lane::load_joined(params[i], remainder[i]); }
    __device__ void store_one(int i, Lane weight) const {
        weight.store_high(params[i]);
        weight.store_low(remainder[i]);
    }
};

// Vectors per thread and turn, and blocks per multiprocessor: as many as need no memory in place of registers. To split
// weights takes more of these than to round them.
template <class G, class Masters>
struct Shape {
    static constexpr bool splits = std::is_same_v<Masters, SplitMasters>;
    static constexpr int together = splits && sizeof(G) == 4 ? 1 : 2;
    static constexpr int resident = splits && sizeof(G) == 2 ? 3 : resident_blocks;
};

template <class G, class Masters>
__device__ void adam_chunk(const G* grads, const Masters& masters, float* exp_avg, float* exp_avg_sq, int numel,
                           const AdamVectors<Lane>& f) {
    constexpr int together = Shape<G, Masters>::together;
    const bool aligned = is_aligned<width>(grads) && masters.are_aligned() && is_aligned<width>(exp_avg) &&
                         is_aligned<width>(exp_avg_sq);
    const int vectors = aligned ? numel / width : 0;
    for (int first = threadIdx.x; first < vectors; first += block_threads * together) {
        Vector<G, width> grad[together];
        typename Masters::Loaded weight[together];
        Vector<float, width> m[together], v[together];
#pragma unroll
        for (int u = 0; u < together; ++u) {
            const int i = first + u * block_threads;
            if (i >= vectors) break;
            grad[u] = load<G, width>(grads, i);
            weight[u] = masters.load_vector(i);
            m[u] = load<float, width>(exp_avg, i);
            v[u] = load<float, width>(exp_avg_sq, i);
        }
#pragma unroll
        for (int u = 0; u < together; ++u) {
            const int i = first + u * block_threads;
            if (i >= vectors) break;
            Lane weights[width];
            for (int k = 0; k < width; ++k) {
                Lane m_k = Lane::load(m[u].values[k]), v_k = Lane::load(v[u].values[k]);
                weights[k] = Masters::weight(weight[u], k);
                adam_update(weights[k], m_k, v_k, Lane::load(grad[u].values[k]), f);
                m_k.store(m[u].values[k]);
                v_k.store(v[u].values[k]);
            }
            masters.store_vector(i, weights);
            store(exp_avg, i, m[u]);
            store(exp_avg_sq, i, v[u]);
        }
    }
    // Unrolled, this loop, which has next to nothing to do, would take the registers of the other one.
#pragma unroll 1
    for (int i = vectors * width + threadIdx.x; i < numel; i += block_threads) {
        Lane weight = masters.load_one(i), m = Lane::load(exp_avg[i]), v = Lane::load(exp_avg_sq[i]);
        adam_update(weight, m, v, Lane::load(grads[i]), f);
        masters.store_one(i, weight);
        m.store(exp_avg[i]);
        v.store(exp_avg_sq[i]);
    }
}

template <class G, class Masters, int table_bytes>
__global__ void __launch_bounds__(block_threads, Shape<G, Masters>::resident)
    adam_kernel(const __grid_constant__ AdamTable<table_bytes> table) {
    if (table.control->skip != 0) return;
    __shared__ AdamFactors factors[table_groups];
    if (static_cast<int>(threadIdx.x) < table.group_count) {
        factors[threadIdx.x] = adam_factors(table.groups[threadIdx.x], *table.control);
    }
    __syncthreads();
    const auto& rows = table.rows;
    for (std::int64_t chunk = blockIdx.x; chunk < rows.first_chunk[rows.count]; chunk += gridDim.x) {
        const int r = rows.find(chunk);
        const AdamRow& row = rows.rows[r];
        const std::int64_t begin = (chunk - rows.first_chunk[r]) * chunk_numel;
        const int numel = static_cast<int>(row.numel - begin < chunk_numel ? row.numel - begin : chunk_numel);
        adam_chunk(static_cast<const G*>(row.grads) + begin, Masters(row, begin), row.exp_avg + begin,
                   row.exp_avg_sq + begin, numel, AdamVectors<Lane>(factors[row.group]));
    }
}

template <class G, class Masters, int table_bytes>
void run(const AdamTable<table_bytes>& table, Stream stream) {
    launch<adam_kernel<G, Masters, table_bytes>, Shape<G, Masters>::resident>("adam", stream, table.rows.chunks(),
                                                                              block_threads, table);
}

template <class G, class Masters>
void run(const AdamStep& step, const std::vector<AdamRow>& rows, Stream stream) {
    for_each_table(
        rows, chunk_numel, [&](const auto& part) { run<G, Masters>(AdamTable(part, step), stream); },
        step.group_count <= small_groups);
}

// What one kernel does: gradients and parameters of one type each, masters whole or split.
struct Kind {
    DType grads;
    DType params;
    bool splits;

    bool operator==(const Kind& other) const {
        return grads == other.grads && params == other.params && splits == other.splits;
    }
};

Kind kind_of(const AdamBuffers& b) { return {b.grads.dtype, b.params.dtype, b.remainder != nullptr}; }

// The segments of one kind in the optimizer groups [first, first + count).
std::vector<AdamRow> rows_of(const std::vector<AdamPart>& parts, Kind kind, int first, int count) {
    std::vector<AdamRow> rows;
    for (const AdamPart& part : parts) {
        const AdamBuffers& b = part.buffers;
        if (!(kind_of(b) == kind)) continue;
        for (const Segment& s : part.segments->rows()) {
            if (s.group < first || s.group >= first + count) continue;
            const auto at = [&](Span span) {
                return span.data == nullptr ? nullptr : span.part(s.offset, s.numel).data;
            };
            rows.push_back({at(b.grads), static_cast<float*>(at(b.master)), static_cast<float*>(at(b.exp_avg)),
                            static_cast<float*>(at(b.exp_avg_sq)), at(b.params),
                            kind.splits ? b.remainder + s.offset : nullptr, s.numel, s.group - first});
        }
    }
    return rows;
}

void run(const AdamStep& step, const std::vector<AdamRow>& rows, Kind kind, Stream stream) {
    with_type(kind.grads, [&](auto g) {
        using G = decltype(g);
        if (kind.splits) return run<G, SplitMasters>(step, rows, stream);
        with_type(kind.params, [&](auto p) { run<G, WholeMasters<decltype(p)>>(step, rows, stream); });
    });
}

}  // namespace
}  // namespace cuda

void adam(const std::vector<AdamPart>& parts, const std::vector<AdamGroup>& groups, const StepControl* control,
          Stream stream) {
    check(parts, groups.size());
    std::vector<cuda::Kind> kinds;
    for (const AdamPart& part : parts) {
        const cuda::Kind kind = cuda::kind_of(part.buffers);
        if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) kinds.push_back(kind);
    }
    for (int first = 0; first < static_cast<int>(groups.size()); first += cuda::table_groups) {
        const int count = std::min(cuda::table_groups, static_cast<int>(groups.size()) - first);
        const cuda::AdamStep step{&groups[static_cast<std::size_t>(first)], count, control};
        for (const cuda::Kind& kind : kinds) {
            cuda::run(step, cuda::rows_of(parts, kind, first, count), kind, stream);
        }
    }
}

}  // namespace partita
