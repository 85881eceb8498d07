// The table of segments, and offsets beyond 2^31 elements in everything that takes offsets.
#include <stdexcept>

#include "partita/adam.h"
#include "partita/copy.h"
#include "partita/norm.h"
#include "partita/segments.h"
#include "support.h"

namespace partita {

bool operator==(const Segment& a, const Segment& b) {
    return a.offset == b.offset && a.numel == b.numel && a.group == b.group;
}
void PrintTo(const Segment& s, std::ostream* out) {
    *out << "{" << s.offset << ", " << s.numel << ", " << s.group << "}";
}

namespace {

constexpr std::int64_t block = Segments::block_numel;
constexpr std::int64_t far = (std::int64_t{1} << 31) + 3;

using Rows = std::vector<Segment>;

TEST(Segments, JoinsNeighboursOfOneGroup) {
    EXPECT_EQ(Segments({{0, 3, 0}, {3, 4, 0}}).blocks(), (Rows{{0, 7, 0}}));
    EXPECT_EQ(Segments({{0, 3, 0}, {3, 4, 1}}).blocks(), (Rows{{0, 3, 0}, {3, 4, 1}})) << "another group";
    EXPECT_EQ(Segments({{0, 3, 0}, {4, 4, 0}}).blocks(), (Rows{{0, 3, 0}, {4, 4, 0}})) << "padding between";
    EXPECT_EQ(Segments({{0, 0, 0}, {0, 3, 0}, {3, 0, 1}, {3, 4, 0}, {9, 0, 0}}).blocks(), (Rows{{0, 7, 0}}))
        << "empty segments";
}

TEST(Segments, CutsBlocksFromTheStartOfASegment) {
    EXPECT_EQ(Segments({{5, block, 0}}).blocks(), (Rows{{5, block, 0}}));
    EXPECT_EQ(Segments({{5, block + 1, 0}}).blocks(), (Rows{{5, block, 0}, {5 + block, 1, 0}}));
    EXPECT_EQ(Segments({{0, block - 1, 2}, {block - 1, block, 2}}).blocks(),
              (Rows{{0, block, 2}, {block, block - 1, 2}}));
}

TEST(Segments, KnowsItsTotals) {
    const Segments segments({{2, 3, 1}, {7, 0, 4}, {10, 5, 0}});
    EXPECT_EQ(segments.numel(), 8);
    EXPECT_EQ(segments.end(), 15);
    EXPECT_EQ(segments.groups(), 5);
    const Segments empty(Rows{});
    EXPECT_EQ(empty.numel() + empty.end() + empty.groups(), 0);
    EXPECT_TRUE(empty.blocks().empty());
}

TEST(Segments, RefusesWhatIsNotAscendingAndDisjoint) {
    const std::vector<Rows> bad = {
        {{-1, 3, 0}},
        {{0, -3, 0}},
        {{0, 3, -1}},
        {{0, 3, 0}, {2, 3, 0}},
        {{5, 3, 0}, {0, 3, 0}},
        {{0, 3, 0}, {0, 3, 0}},
        {{INT64_MAX - 4, 5 + 5, 0}},  // its end is no 64-bit number
    };
    for (const Rows& rows : bad) EXPECT_THROW(Segments{rows}, std::invalid_argument) << ::testing::PrintToString(rows);
    EXPECT_THROW(Segments({{0, 1, INT32_MAX}}), std::invalid_argument);
}

TEST(Far, SegmentsAndBlocks) {
    const Segments segments({{1, far, 0}, {2 * far, 10, 1}});
    EXPECT_EQ(segments.numel(), far + 10);
    EXPECT_EQ(segments.end(), 2 * far + 10);
    const auto& blocks = segments.blocks();
    ASSERT_EQ(blocks.size(), static_cast<std::size_t>(far / block + 2));
    EXPECT_EQ(blocks[blocks.size() - 2], (Segment{1 + far / block * block, far % block, 0}));
    EXPECT_EQ(blocks.back(), (Segment{2 * far, 10, 1}));
}

TEST(Far, PartsOfASpan) {
    char byte;
    for (const DType dtype : all_dtypes) {
        const Span part = Span{&byte, 3 * far, dtype}.part(2 * far, 5);
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(part.data) - reinterpret_cast<std::uintptr_t>(&byte),
                  static_cast<std::uintptr_t>(2 * far * size_of(dtype)));
        EXPECT_EQ(part.numel, 5);
    }
}

// A small buffer seen as the end of one of more than 2^31 elements: only the elements from `far` on exist.
Span end_of_far(Buffer& buffer) {
    const auto address = reinterpret_cast<std::uintptr_t>(buffer.span().data);
    return {reinterpret_cast<void*>(address - static_cast<std::uintptr_t>(far * size_of(buffer.dtype()))),
            far + buffer.numel(), buffer.dtype()};
}

TEST(Far, Pack) {
    Random random;
    Buffer source(DType::bf16, 100), flat(DType::f16, 100), expected(DType::f16, 100);
    random.fill_uniform(source);
    pack(end_of_far(flat), {source.span()}, {far}, 1.0f, false, 1);
    for (std::int64_t i = 0; i < 100; ++i) expected.set(i, source.at(i));
    EXPECT_TRUE(same(flat, expected));
    EXPECT_THROW(pack(end_of_far(flat), {source.span()}, {far + 1}, 1.0f, false, 1), std::invalid_argument);
}

TEST(Far, Norm) {
    Buffer values(DType::f16, 100);
    values.fill(2.0f);
    double sum = 0;
    norm(&sum, end_of_far(values), Segments({{far + 10, 90, 0}}), 1);
    EXPECT_EQ(sum, 360.0);
    EXPECT_THROW(norm(&sum, end_of_far(values), Segments({{far + 10, 91, 0}}), 1), std::invalid_argument);
}

TEST(Far, Adam) {
    Random random;
    Buffer grads(DType::bf16, 100), params(DType::f16, 100);
    Buffer master(DType::f32, 100), exp_avg(DType::f32, 100), exp_avg_sq(DType::f32, 100);
    random.fill_uniform(grads);
    random.fill_uniform(master);
    exp_avg.fill(0.0f);
    exp_avg_sq.fill(0.0f);
    params.fill(0.0f);
    Buffer near_master = master, near_params = params, near_avg = exp_avg, near_avg_sq = exp_avg_sq;
    const StepControl control{0.0, 1.0f, 0, 1};
    adam({grads.span(), near_master.span(), near_avg.span(), near_avg_sq.span(), near_params.span()},
         Segments({{3, 97, 0}}), {AdamGroup{}}, &control, 1);
    adam({end_of_far(grads), end_of_far(master), end_of_far(exp_avg), end_of_far(exp_avg_sq), end_of_far(params)},
         Segments({{far + 3, 97, 0}}), {AdamGroup{}}, &control, 1);
    EXPECT_TRUE(same(master, near_master));
    EXPECT_TRUE(same(params, near_params));
    EXPECT_TRUE(same(exp_avg, near_avg));
    EXPECT_TRUE(same(exp_avg_sq, near_avg_sq));
}

}  // namespace
}  // namespace partita
