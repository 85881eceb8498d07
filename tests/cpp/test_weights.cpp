// Masters and their 16-bit parameters, against a plain reading of the formats.
#include <stdexcept>
#include <string>

#include "partita/weights.h"
#include "simd/kernels.h"
#include "support.h"

namespace partita {
namespace {

// Every upper half of a float, with lower halves around the ties, and some random ones.
std::vector<std::uint32_t> interesting_bits() {
    std::vector<std::uint32_t> result;
    Random random(11);
    for (std::uint32_t high = 0; high < 0x10000; ++high) {
        for (const std::uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
            result.push_back(high << 16 | low);
        }
        result.push_back(high << 16 | (random.bits() & 0xffffu));
    }
    return result;
}

Buffer buffer_of(const std::vector<std::uint32_t>& bits) {
    Buffer result(DType::f32, static_cast<std::int64_t>(bits.size()), 1);
    for (std::size_t i = 0; i < bits.size(); ++i) result.set_bits(static_cast<std::int64_t>(i), bits[i]);
    return result;
}

TEST(Weights, EveryMasterComesBackFromItsTwoHalves) {
    Buffer master = buffer_of(interesting_bits()), joined(DType::f32, master.numel(), 1);
    Buffer params(DType::bf16, master.numel(), 3);
    for (const int threads : {1, 2}) {
        std::vector<std::uint16_t> remainder(static_cast<std::size_t>(master.numel()));
        split_master(params.span(), remainder.data(), master.span(), threads);
        for (std::int64_t i = 0; i < master.numel(); ++i) {
            if (std::isnan(master.at(i))) {
                ASSERT_TRUE(std::isnan(params.at(i))) << std::hex << master.bits(i);
            } else {
                ASSERT_EQ(params.bits(i), encode_weight(DType::bf16, master.at(i))) << std::hex << master.bits(i);
            }
        }
        join_master(joined.span(), params.span(), remainder.data(), threads);
        EXPECT_TRUE(same(joined, master));
    }
}

TEST(Weights, EveryLevelGivesTheBitsOfTheScalarLevel) {
    const auto bits = interesting_bits();
    Buffer master = buffer_of(bits);
    for (const DType dtype : all_dtypes) {
        for (std::int64_t numel = 0; numel < 70; ++numel) {
            const Span part = master.span().part(1000 * numel, numel);
            const auto split = [&](CpuLevel level, Buffer& params, std::vector<std::uint16_t>& remainder) {
                kernels(level).split[index(dtype)](params.span().data,
                                                   dtype == DType::bf16 ? remainder.data() : nullptr,
                                                   static_cast<const float*>(part.data), numel);
            };
            Buffer expected(dtype, numel, numel % 4);
            std::vector<std::uint16_t> expected_remainder(static_cast<std::size_t>(numel) + 1, 0x1234);
            split(CpuLevel::scalar, expected, expected_remainder);
            for (const CpuLevel level : levels()) {
                SCOPED_TRACE(::testing::Message() << name_of(level) << ", numel " << numel);
                Buffer params(dtype, numel, numel % 4), joined(DType::f32, numel);
                std::vector<std::uint16_t> remainder(static_cast<std::size_t>(numel) + 1, 0x1234);
                split(level, params, remainder);
                EXPECT_TRUE(same(params, expected));
                EXPECT_EQ(remainder, expected_remainder);
                if (dtype != DType::bf16) continue;
                kernels(level).join(static_cast<float*>(joined.span().data), params.span().data, remainder.data(),
                                    numel);
                for (std::int64_t i = 0; i < numel; ++i) {
                    const float whole = master.at(1000 * numel + i);
                    EXPECT_TRUE(std::isnan(whole) ? std::isnan(joined.at(i))
                                                  : joined.bits(i) == master.bits(1000 * numel + i));
                }
            }
        }
    }
}

TEST(Weights, WithoutRemainderOnlyTheParametersAreWritten) {
    Buffer master = buffer_of(interesting_bits()), with(DType::bf16, master.numel()), without = with;
    std::vector<std::uint16_t> remainder(static_cast<std::size_t>(master.numel()));
    split_master(with.span(), remainder.data(), master.span(), 1);
    split_master(without.span(), nullptr, master.span(), 1);
    EXPECT_TRUE(same(without, with));
    Buffer half(DType::f16, master.numel()), expected = half;
    split_master(half.span(), nullptr, master.span(), 1);
    for (std::int64_t i = 0; i < master.numel(); ++i) expected.set(i, master.at(i));
    EXPECT_TRUE(same(half, expected));
}

TEST(Weights, RefusesWhatDoesNotMatch) {
    Buffer master(DType::f32, 4), params(DType::bf16, 4), half(DType::f16, 4), small(DType::bf16, 3);
    std::uint16_t remainder[4];
    EXPECT_THROW(split_master(small.span(), remainder, master.span(), 1), std::invalid_argument);
    EXPECT_THROW(split_master(half.span(), remainder, master.span(), 1), std::invalid_argument);
    EXPECT_THROW(split_master(params.span(), remainder, half.span(), 1), std::invalid_argument);
    EXPECT_THROW(join_master(master.span(), small.span(), remainder, 1), std::invalid_argument);
    EXPECT_THROW(join_master(master.span(), half.span(), remainder, 1), std::invalid_argument);
    EXPECT_THROW(join_master(master.span(), params.span(), nullptr, 1), std::invalid_argument);
}

}  // namespace
}  // namespace partita
