// XXH3-64 against the vectors that its authors publish, however the bytes come, and its loop at each processor level.
#include <array>

#include "partita/digest.h"
#include "simd/kernels.h"
#include "support.h"

namespace partita {
namespace {

// Bytes as xxHash's own check makes them: the top bytes of a product that grows by a factor.
std::vector<unsigned char> bytes_of_vectors(std::size_t size) {
    std::vector<unsigned char> bytes;
    for (std::uint64_t product = 2654435761; bytes.size() < size; product *= 11400714785074694797u) {
        bytes.push_back(static_cast<unsigned char>(product >> 56));
    }
    return bytes;
}

std::vector<unsigned char> random_bytes(std::size_t size) {
    Random random;
    std::vector<unsigned char> bytes(size);
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random.bits());
    return bytes;
}

// A copy with a misaligned address and nothing behind it, so that the address sanitizer sees who reads beyond the end.
std::vector<unsigned char> behind_gap(const std::vector<unsigned char>& bytes, std::size_t gap, std::int64_t nbytes) {
    std::vector<unsigned char> copy(gap + static_cast<std::size_t>(nbytes));
    std::copy_n(bytes.begin(), nbytes, copy.begin() + static_cast<std::ptrdiff_t>(gap));
    return copy;
}

// All classes of lengths, and both ends of most of them.
TEST(Digest, PublishedVectors) {
    struct Vector {
        std::int64_t nbytes;
        std::uint64_t digest;
    };
    const std::vector<Vector> vectors = {
        {0, 0x2D06800538D394C2},    {1, 0xC44BDFF4074EECDB},   {2, 0x7A9978044CB8A8BB},   {3, 0x54247382A8D6B94D},
        {4, 0xE5DC74BC51848A51},    {6, 0x27B56A84CD2D7325},   {8, 0x24CCC9ACAA9F65E4},   {9, 0x14D5001C15DD3F2B},
        {12, 0xA713DAF0DFBB77E7},   {16, 0x981B17D36C7498C9},  {17, 0x796F5ACD3A60F862},  {24, 0xA3FE70BF9D3510EB},
        {48, 0x397DA259ECBA1F11},   {64, 0x9CB48487720EC49D},  {80, 0xBCDEFBBB2C47C90A},  {128, 0xFCFF24126754D861},
        {129, 0x98F1B0A679A2CA29},  {195, 0xCD94217EE362EC3A}, {222, 0xB9163B558664D356}, {240, 0x81C3C2B67F568CCF},
        {241, 0xC5A639ECD2030E5E},  {403, 0xCDEB804D65C6DEA4}, {512, 0x617E49599013CB6B}, {2048, 0xDD59E2C3A5F038E0},
        {2240, 0x6E73A90539CF2948}, {2367, 0xCB37AEB9E5D361ED}};
    const auto bytes = bytes_of_vectors(2367);
    for (const Vector& vector : vectors) {
        for (const std::size_t gap : {0, 1, 3, 8, 13}) {
            const auto copy = behind_gap(bytes, gap, vector.nbytes);
            EXPECT_EQ(xxh3_64(copy.data() + gap, vector.nbytes), vector.digest) << vector.nbytes << " bytes";
        }
    }
}

TEST(Digest, NoBytesNeedNoMemory) {
    Xxh3 digest(nullptr, 0);
    digest.advance(0);
    EXPECT_EQ(digest.digest(), 0x2D06800538D394C2u);
}

// Every length, with a stop at every place on the way.
TEST(Digest, AStopAnywhere) {
    const auto bytes = random_bytes(2200);
    std::vector<std::uint64_t> digests;
    for (std::int64_t nbytes = 0; nbytes <= 2200; nbytes += nbytes < 1100 ? 1 : 37) {
        digests.push_back(xxh3_64(bytes.data(), nbytes));
        for (std::int64_t stop = 0; stop <= nbytes; stop += nbytes < 300 ? 1 : 11) {
            Xxh3 digest(bytes.data(), nbytes);
            digest.advance(stop);
            ASSERT_EQ(digest.digest(), digests.back()) << nbytes << " bytes, stop at " << stop;
            digest.advance(nbytes);
            ASSERT_EQ(digest.digest(), digests.back()) << nbytes << " bytes, stop at " << stop << " and at the end";
        }
    }
    std::sort(digests.begin(), digests.end());
    EXPECT_EQ(std::unique(digests.begin(), digests.end()), digests.end());
}

// The bytes come while they are digested: what has not come yet has other values until then.
TEST(Digest, BytesThatComeInRandomPieces) {
    const auto bytes = random_bytes((3 << 20) + 13);
    const auto size = static_cast<std::int64_t>(bytes.size());
    const std::uint64_t whole = xxh3_64(bytes.data(), size);
    for (std::uint32_t seed = 1; seed <= 3; ++seed) {
        Random random(seed);
        std::vector<unsigned char> memory(bytes.size(), 0xa5);
        Xxh3 digest(memory.data(), size);
        for (std::int64_t begin = 0; begin < size;) {
            const std::int64_t piece =
                std::min<std::int64_t>(random.bits() % (random.bits() % 2 == 0 ? 3000 : 1 << 20), size - begin);
            std::copy_n(bytes.begin() + begin, piece, memory.begin() + begin);
            begin += piece;
            digest.advance(begin);
        }
        EXPECT_EQ(digest.digest(), whole);
    }
}

TEST(Digest, OneBitChangesIt) {
    for (const std::int64_t nbytes : {3, 8, 16, 100, 200, 1500}) {
        auto bytes = random_bytes(static_cast<std::size_t>(nbytes));
        const std::uint64_t before = xxh3_64(bytes.data(), nbytes);
        for (std::size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
            bytes[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
            EXPECT_NE(xxh3_64(bytes.data(), nbytes), before) << "bit " << bit << " of " << nbytes << " bytes";
            bytes[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
        }
    }
}

using Sums = std::array<std::uint64_t, 8>;

std::uint64_t number(const unsigned char* bytes) {
    std::uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value |= std::uint64_t{bytes[i]} << (8 * i);
    return value;
}

// The specification's "accumulate" and "round_scramble", a number at a time.
void plain_digest(Sums& sums, const unsigned char* data, std::int64_t stripes, const unsigned char* secret) {
    for (std::int64_t stripe = 0; stripe < stripes; ++stripe) {
        for (std::size_t i = 0; i < 8; ++i) {
            const std::uint64_t input = number(data + 64 * stripe + 8 * i);
            const std::uint64_t keyed = input ^ number(secret + 8 * (stripe % 16) + 8 * i);
            sums[i ^ 1] += input;
            sums[i] += (keyed & 0xffffffff) * (keyed >> 32);
        }
        if (stripe % 16 != 15) continue;
        for (std::size_t i = 0; i < 8; ++i) {
            sums[i] = (sums[i] ^ sums[i] >> 47 ^ number(secret + 128 + 8 * i)) * 0x9E3779B1;
        }
    }
}

class DigestLevels : public ::testing::TestWithParam<CpuLevel> {};

TEST_P(DigestLevels, TheLoopEqualsThePlainOne) {
    const auto bytes = random_bytes(64 * 100), secret = bytes_of_vectors(192);
    for (std::int64_t stripes = 0; stripes <= 100; ++stripes) {
        for (const std::size_t gap : {0, 1, 4, 8, 40}) {
            const auto data = behind_gap(bytes, gap, 64 * stripes);
            Sums sums{1, 2, 3, ~std::uint64_t{0}, 5, 6, 7, 8}, expected = sums;
            plain_digest(expected, bytes.data(), stripes, secret.data());
            kernels(GetParam()).digest(sums.data(), data.data() + gap, stripes, secret.data());
            ASSERT_EQ(sums, expected) << stripes << " stripes";
        }
    }
}

TEST_P(DigestLevels, OneStripeNeedsSixtyFourBytesOfTheSecret) {
    const auto bytes = random_bytes(64), secret = bytes_of_vectors(64);
    Sums sums{}, expected{};
    plain_digest(expected, bytes.data(), 1, secret.data());
    kernels(GetParam()).digest(sums.data(), bytes.data(), 1, secret.data());
    EXPECT_EQ(sums, expected);
}

INSTANTIATE_TEST_SUITE_P(Levels, DigestLevels, ::testing::ValuesIn(levels()), level_name);

}  // namespace
}  // namespace partita
