// The sum of squares against a plain loop in extended precision.
#include <stdexcept>

#include "partita/norm.h"
#include "simd/kernels.h"
#include "support.h"

namespace partita {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float inf = std::numeric_limits<float>::infinity();

double norm_of(Buffer& values, const Segments& segments, int threads = 1) {
    double sum = 0;
    norm(&sum, values.span(), segments, threads);
    return sum;
}

long double plain_sum_of_squares(const Buffer& values, std::int64_t begin, std::int64_t end) {
    long double sum = 0;
    for (std::int64_t i = begin; i < end; ++i) sum += static_cast<long double>(values.at(i)) * values.at(i);
    return sum;
}

class Norm : public ::testing::TestWithParam<DType> {};

TEST_P(Norm, EqualsThePlainSumOfEverySegment) {
    std::vector<Segment> rows;
    std::int64_t end = 1;
    for (const std::int64_t numel : {0, 1, 15, 16, 17, 31, 33, 1000, 70000}) {
        rows.push_back({end, numel, 0});
        end += numel + static_cast<std::int64_t>(rows.size()) % 3;
    }
    for (std::int64_t misalignment = 0; misalignment < 4; ++misalignment) {
        Buffer values(GetParam(), end + 7, misalignment), wide(GetParam(), end + 7, misalignment);
        Random random;
        for (std::int64_t i = 0; i < values.numel(); ++i) wide.set(i, random.wide());
        values.fill(nan);  // what lies between the segments must not reach the sum
        long double expected = 0;
        for (const Segment& row : rows) {
            for (std::int64_t i = row.offset; i < row.offset + row.numel; ++i) values.set_bits(i, wide.bits(i));
            expected += plain_sum_of_squares(values, row.offset, row.offset + row.numel);
        }
        const Buffer before = values;
        const double actual = norm_of(values, Segments(rows), 1);
        EXPECT_NEAR(actual, static_cast<double>(expected), 1e-12 * static_cast<double>(expected));
        EXPECT_EQ(norm_of(values, Segments(rows), 2), actual);
        EXPECT_EQ(values.bytes(), before.bytes());
    }
}

TEST_P(Norm, EveryLevelAndSize) {
    Random random;
    for (std::int64_t numel = 0; numel < 100; ++numel) {
        Buffer values(GetParam(), numel, numel % 4);
        random.fill_uniform(values);
        const auto expected = static_cast<double>(plain_sum_of_squares(values, 0, numel));
        for (const CpuLevel level : levels()) {
            const double actual = kernels(level).sum_of_squares[index(GetParam())](values.span().data, numel);
            EXPECT_NEAR(actual, expected, 1e-13 * expected) << name_of(level) << ", numel " << numel;
        }
    }
}

TEST_P(Norm, AnInfinityOrNanAnywhereShows) {
    Random random;
    for (const std::int64_t numel : {1, 15, 16, 17, 31, 33, 67}) {
        Buffer values(GetParam(), numel);
        random.fill_uniform(values);
        for (const CpuLevel level : levels()) {
            for (std::int64_t i = 0; i < numel; ++i) {
                for (const float bad : {inf, -inf, nan}) {
                    const std::uint32_t kept = values.bits(i);
                    values.set(i, bad);
                    EXPECT_FALSE(
                        std::isfinite(kernels(level).sum_of_squares[index(GetParam())](values.span().data, numel)))
                        << name_of(level) << ", element " << i << " of " << numel;
                    values.set_bits(i, kept);
                }
            }
        }
    }
}

TEST_P(Norm, TheLargestNumbersDoNotOverflow) {
    const float largest = GetParam() == DType::f32 ? std::numeric_limits<float>::max()
                                                   : decode(GetParam(), GetParam() == DType::f16 ? 0x7bff : 0x7f7f);
    Buffer values(GetParam(), 100000);
    values.fill(largest);
    const double expected = 1e5 * largest * static_cast<double>(largest);
    EXPECT_NEAR(norm_of(values, Segments({{0, values.numel(), 0}})), expected, 1e-11 * expected);
}

INSTANTIATE_TEST_SUITE_P(DTypes, Norm, ::testing::ValuesIn(all_dtypes),
                         [](const auto& dtype) { return std::string(name_of(dtype.param)); });

TEST(Norm, AnInfinityOrNanAtEveryPlaceOfABlockShows) {
    Buffer values(DType::f32, Segments::block_numel + 20);
    values.fill(0.0f);
    const Segments segments({{0, values.numel(), 0}});
    for (std::int64_t i = 0; i < values.numel(); ++i) {
        values.set(i, i % 2 == 0 ? nan : inf);
        ASSERT_FALSE(std::isfinite(norm_of(values, segments))) << i;
        values.set(i, 0.0f);
    }
    EXPECT_EQ(norm_of(values, segments), 0.0);
}

TEST(Norm, SmallSquaresAreNotFlushedToZero) {
    Buffer values(DType::f32, 50);
    values.fill(std::numeric_limits<float>::denorm_min());
    EXPECT_EQ(norm_of(values, Segments({{0, 50, 0}})), 50 * 0x1p-298);
}

TEST(Norm, AddsToWhatIsThere) {
    Buffer values(DType::f16, 3);
    values.fill(2.0f);
    double sum = 1.0;
    norm(&sum, values.span(), Segments({{0, 3, 0}}), 1);
    norm(&sum, values.span(), Segments({{1, 1, 0}}), 1);
    norm(&sum, values.span(), Segments(std::vector<Segment>{}), 1);
    EXPECT_EQ(sum, 1.0 + 12.0 + 4.0);
}

TEST(Norm, RefusesSegmentsBeyondTheBuffer) {
    Buffer values(DType::f32, 10);
    EXPECT_THROW(norm_of(values, Segments({{0, 11, 0}})), std::invalid_argument);
    EXPECT_THROW(norm_of(values, Segments({{10, 1, 0}})), std::invalid_argument);
}

}  // namespace
}  // namespace partita
