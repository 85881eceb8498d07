// pack and cast against a plain loop that computes in fp32 and rounds once.
#include <stdexcept>
#include <tuple>

#include "partita/copy.h"
#include "simd/kernels.h"
#include "support.h"

namespace partita {
namespace {

constexpr std::int64_t sizes[] = {0, 1, 15, 16, 17, 31, 33, 1000, 70000};
constexpr float scales[] = {1.0f, 0.5f, 1.0f / 3.0f};

// destination[at + i] = [destination[at + i] +] source[from + i] * scale for `numel` elements.
void plain_copy(Buffer& destination, std::int64_t at, const Buffer& source, std::int64_t from, std::int64_t numel,
                float scale, bool accumulate) {
    for (std::int64_t i = 0; i < numel; ++i) {
        const float value = source.at(from + i) * scale;
        destination.set(at + i, accumulate ? destination.at(at + i) + value : value);
    }
}

Buffer wild(Random& random, DType dtype, std::int64_t numel, std::int64_t misalignment = 0) {
    Buffer result(dtype, numel, misalignment);
    random.fill_wild(result);
    return result;
}

class Copies : public ::testing::TestWithParam<std::tuple<DType, DType>> {
  protected:
    DType from = std::get<0>(GetParam());
    DType to = std::get<1>(GetParam());
    Random random;

    // Calls body(scale, accumulate) for each combination.
    template <class Body>
    void for_each_mode(const Body& body) {
        for (const float scale : scales) {
            for (const bool accumulate : {false, true}) {
                SCOPED_TRACE(::testing::Message() << "scale " << scale << ", accumulate " << accumulate);
                body(scale, accumulate);
            }
        }
    }
};

TEST_P(Copies, Cast) {
    for (const std::int64_t numel : sizes) {
        for (std::int64_t offset = 0; offset < 4; ++offset) {
            Buffer source = wild(random, from, numel, offset);
            const Buffer before = wild(random, to, numel, 3 - offset);
            for_each_mode([&](float scale, bool accumulate) {
                Buffer expected = before, one = before, two = before;
                plain_copy(expected, 0, source, 0, numel, scale, accumulate);
                cast(one.span(), source.span(), scale, accumulate, 1);
                EXPECT_TRUE(same(one, expected)) << "misalignment " << offset;
                cast(two.span(), source.span(), scale, accumulate, 2);
                EXPECT_EQ(two.bytes(), one.bytes());
            });
        }
    }
}

// All sizes in one flat buffer, with gaps that must not be touched.
struct Layout {
    std::vector<std::int64_t> offsets;
    std::int64_t numel = 3;

    Layout() {
        for (const std::int64_t size : sizes) {
            offsets.push_back(numel);
            numel += size + static_cast<std::int64_t>(offsets.size()) % 4;
        }
    }
};

TEST_P(Copies, Pack) {
    const Layout layout;
    std::vector<Buffer> sources;
    std::vector<Span> spans;
    for (const std::int64_t size : sizes) {
        sources.push_back(wild(random, from, size, static_cast<std::int64_t>(sources.size()) % 4));
    }
    for (Buffer& source : sources) spans.push_back(source.span());
    constexpr std::size_t missing = 5;
    spans[missing].data = nullptr;
    sources[missing].fill(0.0f);
    const Buffer before = wild(random, to, layout.numel, 1);
    for_each_mode([&](float scale, bool accumulate) {
        Buffer expected = before, one = before, two = before;
        for (std::size_t i = 0; i < sources.size(); ++i) {
            if (i == missing && accumulate) continue;
            plain_copy(expected, layout.offsets[i], sources[i], 0, sources[i].numel(), scale, accumulate);
        }
        pack(one.span(), spans, layout.offsets, scale, accumulate, 1);
        EXPECT_TRUE(same(one, expected));
        pack(two.span(), spans, layout.offsets, scale, accumulate, 2);
        EXPECT_EQ(two.bytes(), one.bytes());
    });
}

TEST_P(Copies, EveryLevelGivesTheSameBits) {
    for (std::int64_t numel = 0; numel < 70; ++numel) {
        Buffer source = wild(random, from, numel, numel % 4);
        const Buffer before = wild(random, to, numel, numel % 3);
        for_each_mode([&](float scale, bool accumulate) {
            Buffer expected = before;
            plain_copy(expected, 0, source, 0, numel, scale, accumulate);
            for (const CpuLevel level : levels()) {
                const auto& table = accumulate ? kernels(level).accumulate : kernels(level).copy;
                Buffer actual = before;
                table[index(from)][index(to)](actual.span().data, source.span().data, numel, scale);
                EXPECT_TRUE(same(actual, expected)) << name_of(level);
            }
        });
    }
}

INSTANTIATE_TEST_SUITE_P(DTypes, Copies,
                         ::testing::Combine(::testing::ValuesIn(all_dtypes), ::testing::ValuesIn(all_dtypes)),
                         pair_name);

TEST(Copy, ASourceWithoutDataIsZeros) {
    Buffer flat(DType::bf16, 40);
    flat.fill(1.0f);
    Buffer half_zero = flat, unchanged = flat;
    for (std::int64_t i = 0; i < 20; ++i) half_zero.set(i, 0.0f);
    const Span none{nullptr, 20, DType::f32};
    Buffer packed = flat, whole = flat;
    pack(packed.span(), {none}, {0}, 0.5f, false, 1);
    EXPECT_TRUE(same(packed, half_zero));
    pack(packed.span(), {none}, {20}, 0.5f, true, 1);
    EXPECT_TRUE(same(packed, half_zero));
    cast(whole.span().part(0, 20), none, 0.5f, false, 1);
    EXPECT_TRUE(same(whole, half_zero));
}

TEST(Copy, SourcesOfSeveralTypesInOneCall) {
    Random random;
    Buffer a = wild(random, DType::f32, 33), b = wild(random, DType::f16, 17), c = wild(random, DType::bf16, 5);
    Buffer actual(DType::f32, 60), expected(DType::f32, 60);
    plain_copy(expected, 0, a, 0, 33, 0.5f, false);
    plain_copy(expected, 33, b, 0, 17, 0.5f, false);
    plain_copy(expected, 55, c, 0, 5, 0.5f, false);
    pack(actual.span(), {a.span(), b.span(), c.span()}, {0, 33, 55}, 0.5f, false, 1);
    EXPECT_TRUE(same(actual, expected));
}

// 256 micro-batches of gradients that would vanish beside the sum in bf16.
TEST(Copy, SmallGradientsAreNotLostInAnFp32Sum) {
    constexpr float tiny = 0x1.02p-12f;
    Buffer gradient(DType::bf16, 100), sum(DType::f32, 100);
    gradient.fill(tiny);
    sum.fill(1.0f);
    for (int micro_batch = 0; micro_batch < 256; ++micro_batch) cast(sum.span(), gradient.span(), 1.0f, true, 1);
    for (std::int64_t i = 0; i < 100; ++i) EXPECT_EQ(sum.at(i), 1.0f + 256 * tiny);
}

TEST(Copy, RefusesWhatDoesNotFit) {
    Buffer flat(DType::f32, 10), small(DType::f16, 4);
    const Buffer before = flat;
    for (const std::int64_t offset : {-1LL, 7LL, 1LL << 62}) {
        EXPECT_THROW(pack(flat.span(), {small.span()}, {offset}, 1.0f, false, 1), std::invalid_argument);
    }
    const Span negative{small.span().data, -1, DType::f16}, huge{small.span().data, INT64_MAX, DType::f16};
    EXPECT_THROW(pack(flat.span(), {negative}, {0}, 1.0f, false, 1), std::invalid_argument);
    EXPECT_THROW(pack(flat.span(), {huge}, {1}, 1.0f, false, 1), std::invalid_argument);
    EXPECT_THROW(pack(flat.span(), {small.span()}, {}, 1.0f, false, 1), std::invalid_argument);
    EXPECT_THROW(pack(flat.span(), {}, {0}, 1.0f, false, 1), std::invalid_argument);
    EXPECT_THROW(cast(flat.span(), small.span(), 1.0f, false, 1), std::invalid_argument);
    // The first source fits, the second does not: nothing is written.
    EXPECT_THROW(pack(flat.span(), {small.span(), small.span()}, {0, 7}, 1.0f, false, 1), std::invalid_argument);
    EXPECT_TRUE(same(flat, before));
}

}  // namespace
}  // namespace partita
