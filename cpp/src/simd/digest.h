// The loop of XXH3 over stripes of 64 bytes, written once over a vector type V and instantiated by one source file per
// processor level.
//
// V holds V::width numbers of 64 bits and has load, store, + and ^, shifted_right, swapped (neighbours change places),
// times (a number of 32 bits) and product_of_halves: the low 32 bits of each number times its high ones.
#pragma once

#include <cstdint>

namespace partita::loops {

constexpr std::uint32_t digest_prime = 0x9E3779B1;
constexpr int stripes_of_block = 16;
// How far ahead memory is asked for: processors do not look beyond the page of 4 KiB by themselves, and the loop is
// several times as fast as memory. Where the bytes end earlier, nothing happens.
constexpr int bytes_ahead = 4096;

template <class V>
struct DigestLanes {
    static constexpr int count = 8 / V::width;
    static constexpr int bytes = 8 * V::width;
    V lanes[count];

    void accumulate(const unsigned char* stripe, const unsigned char* secret) {
        __builtin_prefetch(stripe + bytes_ahead);
        for (int i = 0; i < count; ++i) {
            const V input = V::load(stripe + bytes * i);
            const V product = (input ^ V::load(secret + bytes * i)).product_of_halves();
            lanes[i] = lanes[i] + (product + input.swapped());
        }
    }
    void scramble(const unsigned char* secret) {
        for (int i = 0; i < count; ++i) {
            const V mixed = lanes[i] ^ lanes[i].template shifted_right<47>();
            lanes[i] = (mixed ^ V::load(secret + bytes * i)).times(digest_prime);
        }
    }
};

// See Kernels::Digest.
template <class V>
void digest(std::uint64_t* sums, const unsigned char* data, std::int64_t stripes, const unsigned char* secret) {
    auto* const bytes = reinterpret_cast<unsigned char*>(sums);
    DigestLanes<V> lanes;
    for (int i = 0; i < lanes.count; ++i) lanes.lanes[i] = V::load(bytes + lanes.bytes * i);
    for (; stripes >= stripes_of_block; stripes -= stripes_of_block, data += 64 * stripes_of_block) {
        for (int s = 0; s < stripes_of_block; ++s) lanes.accumulate(data + 64 * s, secret + 8 * s);
        lanes.scramble(secret + 8 * stripes_of_block);
    }
    for (std::int64_t s = 0; s < stripes; ++s) lanes.accumulate(data + 64 * s, secret + 8 * s);
    for (int i = 0; i < lanes.count; ++i) lanes.lanes[i].store(bytes + lanes.bytes * i);
}

}  // namespace partita::loops
