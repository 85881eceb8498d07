// A table of pieces of work of any size, cut into chunks; small enough to be a kernel's argument (these may have 32764
// bytes since CUDA 12.1), so that it needs no device memory, no copy and no waiting.
//
// A launch copies the whole argument, however few rows are in it: so there are tables of two sizes.
#pragma once

#include <cstdint>
#include <vector>

namespace partita::cuda {

inline constexpr int small_table = 2000;  // bytes
inline constexpr int large_table = 28000;

template <class Row, int bytes>
struct Rows {
    static constexpr int capacity = bytes / (sizeof(Row) + sizeof(std::int64_t));

    int count = 0;
    std::int64_t first_chunk[capacity + 1];  // of each row, and after the last one
    Row rows[capacity];

    Rows() { first_chunk[0] = 0; }
    std::int64_t chunks() const { return first_chunk[count]; }
    void add(const Row& row, std::int64_t chunk_count) {
        rows[count] = row;
        first_chunk[count + 1] = first_chunk[count] + chunk_count;
        ++count;
    }

    // The row that a chunk belongs to.
    __host__ __device__ int find(std::int64_t chunk) const {
        int low = 0, high = count;  // first_chunk[low] <= chunk < first_chunk[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (first_chunk[middle] <= chunk) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

// Calls `run` with `count` rows from `first` on, in a table of `bytes`.
template <int bytes, class Row, class Run>
void run_table(const Row* first, std::size_t count, std::int64_t chunk_numel, const Run& run) {
    Rows<Row, bytes> table;
    for (std::size_t i = 0; i < count; ++i) table.add(first[i], (first[i].numel + chunk_numel - 1) / chunk_numel);
    run(table);
}

// Hands `all` to `run` in tables: large ones, and a small one when what is left fits into it, unless there must not be
// any. No row may be empty.
template <class Row, class Run>
void for_each_table(const std::vector<Row>& all, std::int64_t chunk_numel, const Run& run, bool with_small = true) {
    constexpr std::size_t few = Rows<Row, small_table>::capacity, many = Rows<Row, large_table>::capacity;
    for (std::size_t first = 0; first < all.size();) {
        const std::size_t left = all.size() - first, count = left < many ? left : many;
        if (with_small && count <= few) {
            run_table<small_table>(&all[first], count, chunk_numel, run);
        } else {
            run_table<large_table>(&all[first], count, chunk_numel, run);
        }
        first += count;
    }
}

}  // namespace partita::cuda
