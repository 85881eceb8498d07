// A table of pieces of work of any size, cut into chunks; small enough to be a kernel's argument (these may have 32764
// bytes since CUDA 12.1), so that it needs no device memory, no copy and no waiting.
#pragma once

#include <cstdint>
#include <vector>

namespace partita::cuda {

template <class Row>
struct Rows {
    static constexpr int capacity = 28000 / (sizeof(Row) + sizeof(std::int64_t));

    int count = 0;
    std::int64_t first_chunk[capacity + 1];  // of each row, and after the last one
    Row rows[capacity];

    Rows() { first_chunk[0] = 0; }
    std::int64_t chunks() const { return first_chunk[count]; }
    bool is_full() const { return count == capacity; }
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

// Hands `all` to `run` in tables; rows without elements are left out.
template <class Row, class Run>
void for_each_table(const std::vector<Row>& all, std::int64_t chunk_numel, const Run& run) {
    Rows<Row> table;
    for (const Row& row : all) {
        if (row.numel == 0) continue;
        if (table.is_full()) {
            run(table);
            table = Rows<Row>();
        }
        table.add(row, (row.numel + chunk_numel - 1) / chunk_numel);
    }
    if (table.count > 0) run(table);
}

}  // namespace partita::cuda
