// Conversions between fp32 and the 16-bit formats, at every processor level.
#include "simd/kernels.h"
#include "support.h"

namespace partita {
namespace {

class Half : public ::testing::TestWithParam<CpuLevel> {
  protected:
    Buffer convert(Buffer from, DType to, CpuLevel level) const {
        Buffer result(to, from.numel());
        kernels(level).copy[index(from.dtype())][index(to)](result.span().data, from.span().data, from.numel(), 1.0f);
        return result;
    }
    Buffer convert(const Buffer& from, DType to) const { return convert(from, to, GetParam()); }
};

Buffer all_patterns(DType dtype) {
    Buffer result(dtype, 1 << 16);
    for (std::int64_t i = 0; i < result.numel(); ++i) result.set_bits(i, static_cast<std::uint32_t>(i));
    return result;
}

// Every number of the format, every point half-way between two, the floats next to these, and random bits: subnormal
// numbers, ties, infinities and NaN are all among them.
Buffer hard_floats(DType dtype) {
    const HalfFormat& format = half_format(dtype);
    std::vector<float> values = {std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min(),
                                 std::numeric_limits<float>::min()};
    for (int bits = 0; bits < format.infinity(); ++bits) {
        const double here = format.magnitude(bits), next = format.magnitude(bits + 1);
        for (const double x : {here, (here + next) / 2}) {
            const auto value = static_cast<float>(x);  // exact
            values.insert(values.end(), {value, std::nextafter(value, 0.0f), std::nextafter(value, INFINITY)});
        }
    }
    Random random;
    for (int i = 0; i < 200000; ++i) values.push_back(bits_float(random.bits()));
    for (std::uint32_t low = 0; low < 1000; ++low) values.push_back(bits_float(0x7f800000u + low * 0x20c5u));
    Buffer result(DType::f32, 2 * static_cast<std::int64_t>(values.size()));
    for (std::size_t i = 0; i < values.size(); ++i) {
        result.set(2 * static_cast<std::int64_t>(i), values[i]);
        result.set(2 * static_cast<std::int64_t>(i) + 1, -values[i]);
    }
    return result;
}

TEST(HalfFormat, KnownValues) {
    EXPECT_EQ(decode(DType::f16, 0x3c00), 1.0f);
    EXPECT_EQ(decode(DType::f16, 0x7bff), 65504.0f);
    EXPECT_EQ(decode(DType::f16, 0x0001), 0x1p-24f);
    EXPECT_EQ(decode(DType::f16, 0xfc00), -INFINITY);
    EXPECT_EQ(decode(DType::bf16, 0xbf80), -1.0f);
    EXPECT_EQ(decode(DType::bf16, 0x0001), 0x1p-133f);
    EXPECT_EQ(encode(DType::f16, 65519.0f), 0x7bffu);
    EXPECT_EQ(encode(DType::f16, 65520.0f), 0x7c00u);
    EXPECT_EQ(encode(DType::bf16, 1.00390625f), 0x3f80u);  // a tie goes to even bits
    EXPECT_EQ(encode(DType::bf16, 1.01171875f), 0x3f82u);
}

TEST_P(Half, EveryPatternSurvivesTheRoundTrip) {
    for (const DType dtype : {DType::f16, DType::bf16}) {
        const Buffer halves = all_patterns(dtype);
        const Buffer floats = convert(halves, DType::f32);
        const Buffer back = convert(floats, dtype);
        const std::uint32_t quiet = dtype == DType::f16 ? 0x0200u : 0x0040u;
        for (std::int64_t i = 0; i < halves.numel(); ++i) {
            const float expected = halves.at(i);
            if (std::isnan(expected)) {
                ASSERT_TRUE(std::isnan(floats.at(i))) << name_of(dtype) << " bits " << i;
                ASSERT_EQ(back.bits(i), halves.bits(i) | quiet) << name_of(dtype);
            } else {
                ASSERT_EQ(floats.bits(i), float_bits(expected)) << name_of(dtype) << " bits " << i;
                ASSERT_EQ(back.bits(i), halves.bits(i)) << name_of(dtype);
            }
        }
    }
}

TEST_P(Half, RoundsToTheNearestTiesToEven) {
    for (const DType dtype : {DType::f16, DType::bf16}) {
        const Buffer floats = hard_floats(dtype);
        const Buffer halves = convert(floats, dtype);
        for (std::int64_t i = 0; i < floats.numel(); ++i) {
            const float value = floats.at(i);
            if (std::isnan(value)) {
                ASSERT_TRUE(std::isnan(halves.at(i))) << name_of(dtype) << ", bits " << floats.bits(i);
            } else {
                ASSERT_EQ(halves.bits(i), encode(dtype, value)) << name_of(dtype) << " of " << value;
            }
        }
    }
}

TEST_P(Half, GivesTheBitsOfTheScalarLevel) {
    for (const DType dtype : {DType::f16, DType::bf16}) {
        const Buffer floats = hard_floats(dtype);
        EXPECT_EQ(convert(floats, dtype).bytes(), convert(floats, dtype, CpuLevel::scalar).bytes()) << name_of(dtype);
        const Buffer halves = all_patterns(dtype);
        for (const DType to : all_dtypes) {
            EXPECT_EQ(convert(halves, to).bytes(), convert(halves, to, CpuLevel::scalar).bytes())
                << name_of(dtype) << " to " << name_of(to);
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Levels, Half, ::testing::ValuesIn(levels()), level_name);

}  // namespace
}  // namespace partita
