// Runs a body over a number of blocks on OpenMP threads.
#pragma once

#include <cstdint>

namespace partita {

// Below this many elements, waking threads costs more than the work.
inline constexpr std::int64_t parallel_numel = 1 << 15;

template <class Body>
void for_each_block(std::int64_t blocks, std::int64_t numel, int threads, const Body& body) {
    if (threads <= 1 || blocks <= 1 || numel < parallel_numel) {
        for (std::int64_t i = 0; i < blocks; ++i) body(i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t i = 0; i < blocks; ++i) body(i);
}

}  // namespace partita
