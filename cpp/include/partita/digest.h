// XXH64, a fast digest that finds damage; it does not keep out a forger.
//
// After "XXH64 algorithm description", Yann Collet, version 0.1.1:
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace partita {

// The digest of bytes that come in pieces; how they are cut does not matter.
class Xxh64 {
  public:
    explicit Xxh64(std::uint64_t seed = 0);

    void update(const void* data, std::int64_t nbytes);
    // Of the bytes so far; more may follow.
    std::uint64_t digest() const;

  private:
    static constexpr std::size_t stripe_bytes = 32;

    std::uint64_t seed_;
    std::array<std::uint64_t, 4> lanes_;
    std::array<unsigned char, stripe_bytes>
        rest_{};  // the first total_bytes_ % stripe_bytes of it: no whole stripe yet
    std::uint64_t total_bytes_ = 0;
};

// The digest of one piece.
std::uint64_t xxh64(const void* data, std::int64_t nbytes, std::uint64_t seed = 0);

}  // namespace partita
