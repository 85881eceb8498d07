#include "partita/digest.h"

#include <algorithm>
#include <cstring>

namespace partita {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "XXH64 reads its input as little-endian numbers");

constexpr std::uint64_t prime1 = 0x9E3779B185EBCA87;
constexpr std::uint64_t prime2 = 0xC2B2AE3D27D4EB4F;
constexpr std::uint64_t prime3 = 0x165667B19E3779F9;
constexpr std::uint64_t prime4 = 0x85EBCA77C2B2AE63;
constexpr std::uint64_t prime5 = 0x27D4EB2F165667C5;

using Lanes = std::array<std::uint64_t, 4>;

template <class Number>
std::uint64_t read(const unsigned char* data) {
    Number number;
    std::memcpy(&number, data, sizeof number);
    return number;
}

constexpr std::uint64_t rotate_left(std::uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

constexpr std::uint64_t round_of(std::uint64_t lane, std::uint64_t input) {
    return rotate_left(lane + input * prime2, 31) * prime1;
}

constexpr std::uint64_t merge(std::uint64_t hash, std::uint64_t lane) {
    return (hash ^ round_of(0, lane)) * prime1 + prime4;
}

// The stripes of 32 bytes in [data, end).
void consume(Lanes& lanes, const unsigned char* data, const unsigned char* end) {
    std::uint64_t a = lanes[0], b = lanes[1], c = lanes[2], d = lanes[3];  // in registers
    for (; data != end; data += 32) {
        a = round_of(a, read<std::uint64_t>(data));
        b = round_of(b, read<std::uint64_t>(data + 8));
        c = round_of(c, read<std::uint64_t>(data + 16));
        d = round_of(d, read<std::uint64_t>(data + 24));
    }
    lanes = {a, b, c, d};
}

std::uint64_t converge(const Lanes& lanes) {
    std::uint64_t hash =
        rotate_left(lanes[0], 1) + rotate_left(lanes[1], 7) + rotate_left(lanes[2], 12) + rotate_left(lanes[3], 18);
    for (const std::uint64_t lane : lanes) hash = merge(hash, lane);
    return hash;
}

// What is left of the input, less than a stripe.
std::uint64_t consume_rest(std::uint64_t hash, const unsigned char* data, std::size_t nbytes) {
    for (; nbytes >= 8; data += 8, nbytes -= 8) {
        hash = rotate_left(hash ^ round_of(0, read<std::uint64_t>(data)), 27) * prime1 + prime4;
    }
    if (nbytes >= 4) {
        hash = rotate_left(hash ^ read<std::uint32_t>(data) * prime1, 23) * prime2 + prime3;
        data += 4;
        nbytes -= 4;
    }
    for (; nbytes > 0; ++data, --nbytes) hash = rotate_left(hash ^ *data * prime5, 11) * prime1;
    return hash;
}

constexpr std::uint64_t avalanche(std::uint64_t hash) {
    hash = (hash ^ hash >> 33) * prime2;
    hash = (hash ^ hash >> 29) * prime3;
    return hash ^ hash >> 32;
}

}  // namespace

Xxh64::Xxh64(std::uint64_t seed) : seed_(seed), lanes_{seed + prime1 + prime2, seed + prime2, seed, seed - prime1} {}

void Xxh64::update(const void* data, std::int64_t nbytes) {
    const auto* begin = static_cast<const unsigned char*>(data);
    auto left = static_cast<std::size_t>(nbytes);
    const std::size_t kept = total_bytes_ % stripe_bytes;
    total_bytes_ += left;
    if (kept > 0 && left > 0) {
        const std::size_t taken = std::min(stripe_bytes - kept, left);
        std::memcpy(rest_.data() + kept, begin, taken);
        begin += taken;
        left -= taken;
        if (kept + taken < stripe_bytes) return;
        consume(lanes_, rest_.data(), rest_.data() + stripe_bytes);
    }
    const std::size_t whole = left - left % stripe_bytes;
    if (whole > 0) consume(lanes_, begin, begin + whole);
    if (left > whole) std::memcpy(rest_.data(), begin + whole, left - whole);
}

std::uint64_t Xxh64::digest() const {
    const std::uint64_t start = total_bytes_ >= stripe_bytes ? converge(lanes_) : seed_ + prime5;
    return avalanche(consume_rest(start + total_bytes_, rest_.data(), total_bytes_ % stripe_bytes));
}

std::uint64_t xxh64(const void* data, std::int64_t nbytes, std::uint64_t seed) {
    Xxh64 hash(seed);
    hash.update(data, nbytes);
    return hash.digest();
}

}  // namespace partita
