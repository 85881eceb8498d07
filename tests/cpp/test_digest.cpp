// XXH64 against the vectors that its authors publish, and however the bytes come.
#include "partita/digest.h"
#include "support.h"

namespace partita {
namespace {

constexpr std::uint64_t seed = 2654435761;

std::vector<unsigned char> random_bytes(std::size_t size) {
    Random random;
    std::vector<unsigned char> bytes(size);
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random.bits());
    return bytes;
}

// Over bytes that are made as in xxHash's own check: the top bytes of a product that grows by a factor.
TEST(Digest, PublishedVectors) {
    std::vector<unsigned char> bytes;
    for (std::uint64_t product = seed; bytes.size() < 222; product *= 11400714785074694797u) {
        bytes.push_back(static_cast<unsigned char>(product >> 56));
    }
    struct Vector {
        std::int64_t nbytes;
        std::uint64_t seed, digest;
    };
    for (const Vector& vector : std::vector<Vector>{{0, 0, 0xEF46DB3751D8E999},
                                                    {0, seed, 0xAC75FDA2929B17EF},
                                                    {1, 0, 0xE934A84ADB052768},
                                                    {1, seed, 0x5014607643A9B4C3},
                                                    {4, 0, 0x9136A0DCA57457EE},
                                                    {14, 0, 0x8282DCC4994E35C8},
                                                    {14, seed, 0xC3BD6BF63DEB6DF0},
                                                    {222, 0, 0xB641AE8CB691C174},
                                                    {222, seed, 0x20CB8AB7AE10C14A}}) {
        EXPECT_EQ(xxh64(bytes.data(), vector.nbytes, vector.seed), vector.digest)
            << vector.nbytes << " bytes, seed " << vector.seed;
    }
    EXPECT_EQ(xxh64("abc", 3), 0x44BC2CF5AD770999u);
    EXPECT_EQ(xxh64("Nobody inspects the spammish repetition", 39), 0xFBCEA83C8A378BF1u);
}

// Every length is cut at every place, and is its own, without and with a misaligned address.
TEST(Digest, PiecesOfAnySize) {
    const auto bytes = random_bytes(301);
    std::vector<std::uint64_t> digests;
    for (std::int64_t nbytes = 0; nbytes <= 300; ++nbytes) {
        digests.push_back(xxh64(bytes.data() + 1, nbytes));
        for (std::int64_t cut = 0; cut <= nbytes; ++cut) {
            Xxh64 hash;
            hash.update(bytes.data() + 1, cut);
            ASSERT_EQ(hash.digest(), digests[static_cast<std::size_t>(cut)]) << "the digest so far";
            hash.update(bytes.data() + 1 + cut, nbytes - cut);
            ASSERT_EQ(hash.digest(), digests.back()) << nbytes << " bytes cut at " << cut;
        }
        Xxh64 by_one;
        for (std::int64_t i = 0; i < nbytes; ++i) by_one.update(bytes.data() + 1 + i, 1);
        ASSERT_EQ(by_one.digest(), digests.back()) << nbytes << " single bytes";
    }
    std::sort(digests.begin(), digests.end());
    EXPECT_EQ(std::unique(digests.begin(), digests.end()), digests.end());
}

TEST(Digest, ManyBytesInRandomPieces) {
    const auto bytes = random_bytes((5 << 20) + 13);
    const auto size = static_cast<std::int64_t>(bytes.size());
    const std::uint64_t whole = xxh64(bytes.data(), size);
    for (std::uint32_t s = 1; s <= 3; ++s) {
        Random random(s);
        Xxh64 hash;
        for (std::int64_t begin = 0; begin < size;) {
            const std::int64_t piece =
                std::min<std::int64_t>(random.bits() % (random.bits() % 2 == 0 ? 70 : 1 << 20), size - begin);
            hash.update(bytes.data() + begin, piece);
            begin += piece;
        }
        EXPECT_EQ(hash.digest(), whole);
    }
}

TEST(Digest, OneBitChangesIt) {
    auto bytes = random_bytes(100);
    const std::uint64_t before = xxh64(bytes.data(), 100);
    for (std::size_t bit = 0; bit < 800; ++bit) {
        bytes[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
        EXPECT_NE(xxh64(bytes.data(), 100), before) << bit;
        bytes[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
    }
}

}  // namespace
}  // namespace partita
