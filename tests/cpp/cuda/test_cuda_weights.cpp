// Weights from masters and back, on a device against the CPU.
#include "cuda_support.h"
#include "partita/weights.h"

namespace partita {
namespace {

std::uint16_t* remainder_of(Span span) { return static_cast<std::uint16_t*>(span.data); }

// Splits on both sides and joins again; `misaligned` says by how many elements params, remainder and master are.
void check(Buffer master, DType params_dtype, bool with_remainder, const std::int64_t (&misaligned)[3]) {
    SCOPED_TRACE(::testing::Message() << master.numel() << " elements, params " << name_of(params_dtype)
                                      << ", misaligned by " << misaligned[0] << ", " << misaligned[1] << ", "
                                      << misaligned[2]);
    const OwnStream stream;
    // The remainder is no float: its bits are what counts.
    Buffer params(params_dtype, master.numel(), misaligned[0]), low(DType::bf16, master.numel(), misaligned[1]);
    DeviceBuffer device_master(master), device_params(params), device_low(low);
    split_master(params.span(), with_remainder ? remainder_of(low.span()) : nullptr, master.span(), 1);
    split_master(device_params.span(), with_remainder ? remainder_of(device_low.span()) : nullptr, device_master.span(),
                 stream);
    EXPECT_TRUE(same(device_params.read(), params));
    EXPECT_EQ(device_low.read().bytes(), low.bytes());
    EXPECT_EQ(device_master.read().bytes(), master.bytes());
    if (!with_remainder) return;
    const Buffer joined(DType::f32, master.numel(), misaligned[2]);
    DeviceBuffer device_joined(joined);
    join_master(device_joined.span(), device_params.span(), remainder_of(device_low.span()), stream);
    EXPECT_TRUE(same(device_joined.read(), master));
    EXPECT_TRUE(same(device_params.read(), params));
}

TEST(CudaWeights, EverySize) {
    for (const DType dtype : all_dtypes) {
        for (const std::int64_t numel : sizes_to_try()) {
            check(wild(DType::f32, numel), dtype, false, {0, 0, 0});
            if (dtype == DType::bf16) check(wild(DType::f32, numel), dtype, true, {0, 0, 0});
        }
    }
}

TEST(CudaWeights, EveryAlignment) {
    for (std::int64_t a = 0; a < 5; ++a) {
        for (std::int64_t b = 0; b < 5; ++b) {
            for (std::int64_t c = 0; c < 5; ++c) {
                for (const DType dtype : all_dtypes) {
                    for (const std::int64_t numel : {3, 1030}) {
                        check(wild(DType::f32, numel, c), dtype, dtype == DType::bf16, {a, b, c});
                    }
                }
            }
        }
    }
}

// All upper halves, each with the lower ones where rounding changes.
TEST(CudaWeights, EveryWeight) {
    constexpr std::uint32_t lows[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    Buffer master(DType::f32, 65536 * 6);
    for (std::uint32_t i = 0; i < 65536 * 6; ++i) master.set_bits(i, i / 6 << 16 | lows[i % 6]);
    for (const DType dtype : all_dtypes) check(master, dtype, dtype == DType::bf16, {0, 0, 0});
}

// Whatever params and remainder hold, also what no master is split into.
TEST(CudaWeights, JoinsAnyBits) {
    const OwnStream stream;
    Random random(5);
    Buffer params(DType::bf16, 70001), low(DType::bf16, 70001), expected(DType::f32, 70001);
    for (std::int64_t i = 0; i < params.numel(); ++i) {
        params.set_bits(i, random.bits() & 0xffff);
        low.set_bits(i, random.bits() & 0xffff);
    }
    DeviceBuffer device_params(params), device_low(low), actual(expected);
    join_master(expected.span(), params.span(), remainder_of(low.span()), 1);
    join_master(actual.span(), device_params.span(), remainder_of(device_low.span()), stream);
    EXPECT_TRUE(same(actual.read(), expected));
}

}  // namespace
}  // namespace partita
