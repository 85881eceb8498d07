// XXH3-64 with seed 0 and the default secret: a fast digest that finds damage; it does not keep out a forger.
//
// After "XXH3 Algorithm Overview", Yann Collet and Adrien Wu, version 0.2.0 of
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
#pragma once

#include <array>
#include <cstdint>

namespace partita {

// The digest of memory whose bytes come, or are wanted in the cache, from the front to the back.
class Xxh3 {
  public:
    // Reads nothing.
    Xxh3(const void* data, std::int64_t nbytes);

    // The first `end` bytes have their final values: digests nearly all of them. `end` must not be less than in the
    // call before.
    void advance(std::int64_t end);
    // Of all bytes, which have their final values. Digests what advance() has not digested.
    std::uint64_t digest() const;

  private:
    // Sums over the stripes of 64 bytes, a lane for every 8th byte of them.
    using Lanes = std::array<std::uint64_t, 8>;

    std::uint64_t digest_of_many() const;

    const unsigned char* data_;
    std::int64_t nbytes_;
    std::int64_t done_bytes_ = 0;  // in the lanes; whole blocks
    Lanes lanes_;
};

// The digest of bytes that are there.
std::uint64_t xxh3_64(const void* data, std::int64_t nbytes);

}  // namespace partita
