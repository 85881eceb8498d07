#include "partita/digest.h"

#include <algorithm>
#include <cstring>

#include "simd/kernels.h"

namespace partita {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "XXH3 reads its input as little-endian numbers");

constexpr std::uint64_t prime32_1 = 0x9E3779B1, prime32_2 = 0x85EBCA77, prime32_3 = 0xC2B2AE3D;
constexpr std::uint64_t prime64_1 = 0x9E3779B185EBCA87, prime64_2 = 0xC2B2AE3D27D4EB4F, prime64_3 = 0x165667B19E3779F9;
constexpr std::uint64_t prime64_4 = 0x85EBCA77C2B2AE63, prime64_5 = 0x27D4EB2F165667C5;
constexpr std::uint64_t prime_mix_1 = 0x165667919E3779F9, prime_mix_2 = 0x9FB21C651E98DF25;

constexpr unsigned char secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,  // 0
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,  //
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,  //
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,  //
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,  // 64
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,  //
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,  //
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,  //
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,  // 128
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,  //
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,  //
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,  //
};

constexpr std::int64_t stripe_bytes = 64, block_bytes = 16 * stripe_bytes;

template <class Number = std::uint64_t>
std::uint64_t read(const unsigned char* data) {
    Number number;
    std::memcpy(&number, data, sizeof number);
    return number;
}

// Two numbers of the secret as one.
template <class Number = std::uint64_t>
std::uint64_t secret_pair(int offset) {
    return read<Number>(secret + offset) ^ read<Number>(secret + offset + sizeof(Number));
}

constexpr std::uint64_t rotate_left(std::uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

// The halves of the product of 128 bits, one upon the other.
std::uint64_t fold_product(std::uint64_t a, std::uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(a) * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

constexpr std::uint64_t avalanche(std::uint64_t value) {
    value = (value ^ value >> 37) * prime_mix_1;
    return value ^ value >> 32;
}

constexpr std::uint64_t avalanche_of_xxh64(std::uint64_t value) {
    value = (value ^ value >> 33) * prime64_2;
    value = (value ^ value >> 29) * prime64_3;
    return value ^ value >> 32;
}

std::uint64_t digest_1_to_3(const unsigned char* data, std::uint64_t nbytes) {
    const std::uint64_t first = data[0], middle = data[nbytes / 2], last = data[nbytes - 1];
    return avalanche_of_xxh64(secret_pair<std::uint32_t>(0) ^ (last | nbytes << 8 | first << 16 | middle << 24));
}

std::uint64_t digest_4_to_8(const unsigned char* data, std::uint64_t nbytes) {
    const std::uint64_t first = read<std::uint32_t>(data), last = read<std::uint32_t>(data + nbytes - 4);
    std::uint64_t value = secret_pair(8) ^ (last | first << 32);
    value ^= rotate_left(value, 49) ^ rotate_left(value, 24);
    value *= prime_mix_2;
    value ^= (value >> 35) + nbytes;
    value *= prime_mix_2;
    return value ^ value >> 28;
}

std::uint64_t digest_9_to_16(const unsigned char* data, std::uint64_t nbytes) {
    const std::uint64_t low = secret_pair(24) ^ read(data), high = secret_pair(40) ^ read(data + nbytes - 8);
    return avalanche(nbytes + __builtin_bswap64(low) + high + fold_product(low, high));
}

// Of 16 bytes.
std::uint64_t mix(const unsigned char* data, std::uint64_t secret_offset) {
    return fold_product(read(data) ^ read(secret + secret_offset), read(data + 8) ^ read(secret + secret_offset + 8));
}

// 16 bytes each from the front and from the back, until they meet.
std::uint64_t digest_17_to_128(const unsigned char* data, std::uint64_t nbytes) {
    std::uint64_t sum = nbytes * prime64_1;
    for (std::uint64_t i = 0; i <= (nbytes - 1) / 32; ++i) {
        sum += mix(data + 16 * i, 32 * i) + mix(data + nbytes - 16 * (i + 1), 32 * i + 16);
    }
    return avalanche(sum);
}

std::uint64_t digest_129_to_240(const unsigned char* data, std::uint64_t nbytes) {
    std::uint64_t sum = nbytes * prime64_1;
    for (std::uint64_t i = 0; i < 8; ++i) sum += mix(data + 16 * i, 16 * i);
    sum = avalanche(sum);
    for (std::uint64_t i = 8; i < nbytes / 16; ++i) sum += mix(data + 16 * i, 16 * (i - 8) + 3);
    return avalanche(sum + mix(data + nbytes - 16, 119));
}

}  // namespace

Xxh3::Xxh3(const void* data, std::int64_t nbytes)
    : data_(static_cast<const unsigned char*>(data)),
      nbytes_(nbytes),
      lanes_{prime32_3, prime64_1, prime64_2, prime64_3, prime64_4, prime32_2, prime64_5, prime32_1} {}

// The last block is another matter, even a whole one; so the last byte does not count here.
void Xxh3::advance(std::int64_t end) {
    const std::int64_t blocks = (std::min(end, nbytes_ - 1) - done_bytes_) / block_bytes;
    kernels().digest(lanes_.data(), data_ + done_bytes_, blocks * (block_bytes / stripe_bytes), secret);
    done_bytes_ += blocks * block_bytes;
}

std::uint64_t Xxh3::digest() const {
    const auto nbytes = static_cast<std::uint64_t>(nbytes_);
    if (nbytes == 0) return avalanche_of_xxh64(secret_pair(56));
    if (nbytes <= 3) return digest_1_to_3(data_, nbytes);
    if (nbytes <= 8) return digest_4_to_8(data_, nbytes);
    if (nbytes <= 16) return digest_9_to_16(data_, nbytes);
    if (nbytes <= 128) return digest_17_to_128(data_, nbytes);
    if (nbytes <= 240) return digest_129_to_240(data_, nbytes);
    return digest_of_many();
}

// The last stripe ends with the last byte, wherever the one before it ends.
std::uint64_t Xxh3::digest_of_many() const {
    Lanes lanes = lanes_;
    const auto digest_stripes = kernels().digest;
    digest_stripes(lanes.data(), data_ + done_bytes_, (nbytes_ - 1 - done_bytes_) / stripe_bytes, secret);
    digest_stripes(lanes.data(), data_ + nbytes_ - stripe_bytes, 1, secret + 121);
    std::uint64_t sum = static_cast<std::uint64_t>(nbytes_) * prime64_1;
    for (std::size_t i = 0; i < lanes.size(); i += 2) {
        const unsigned char* const pair = secret + 11 + 8 * i;
        sum += fold_product(lanes[i] ^ read(pair), lanes[i + 1] ^ read(pair + 8));
    }
    return avalanche(sum);
}

std::uint64_t xxh3_64(const void* data, std::int64_t nbytes) { return Xxh3(data, nbytes).digest(); }

}  // namespace partita
