// The threads of one block, as fibers on the one thread of the host. Each runs until it has to wait for others, so that
// one that does not wait where it should meets the others' memory as it was before.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace cuda_emulator {

inline constexpr int warp_size = 32;

// Runs `body` once per thread of a block. `order`, a permutation of the threads, says who starts first, and who goes on
// first after a barrier; `enter` is told who runs from now on.
void run_block(const std::vector<int>& order, const std::function<void(int)>& enter, const std::function<void()>& body);

// For the threads. All of the block, or of the warp, must arrive: otherwise the program ends with a message.
void block_barrier();
void warp_exchange(void* value, std::size_t bytes, int lane);  // `value` becomes that of another lane; 8 bytes at most
int own_lane();

}  // namespace cuda_emulator
