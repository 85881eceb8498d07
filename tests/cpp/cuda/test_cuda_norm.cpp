// The sum of squares on a device against that of the CPU, and against itself.
#include "cuda_support.h"
#include "partita/norm.h"
#ifdef PARTITA_CUDA_EMULATED
#include "emulator.h"
#endif

namespace partita {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float inf = std::numeric_limits<float>::infinity();

double on_cpu(Buffer& values, const Segments& segments) {
    double sum = 0;
    norm(&sum, values.span(), segments, 1);
    return sum;
}

// Starts from `before`; nothing but the first blocks().size() numbers of the scratch may be written.
double on_device(DeviceBuffer& values, const Segments& segments, Stream stream, double before = 0.0) {
    std::vector<double> untouched(segments.blocks().size() + 1, 123.0);
    const DeviceArray<double> sum(before), scratch(untouched);
    norm(sum.data(), values.span(), segments, scratch.data(), stream);
    EXPECT_EQ(scratch.read().back(), 123.0);
    return sum.value();
}

class CudaNorm : public ::testing::TestWithParam<DType> {
  protected:
    DType dtype = GetParam();
    OwnStream stream;

    // Ordinary numbers in the segments, NaN elsewhere.
    Buffer values_for(const Segments& segments, std::int64_t misalignment) {
        Buffer values(dtype, segments.end() + 7, misalignment);
        values.fill(nan);
        Random random;
        for (const Segment& row : segments.rows()) {
            for (std::int64_t i = row.offset; i < row.offset + row.numel; ++i) values.set(i, random.uniform(-8, 8));
        }
        return values;
    }

    void check(const Segments& segments, std::int64_t misalignment) {
        SCOPED_TRACE(::testing::Message() << segments.rows().size() << " segments, misalignment " << misalignment);
        Buffer values = values_for(segments, misalignment);
        DeviceBuffer device_values(values);
        const double expected = on_cpu(values, segments), actual = on_device(device_values, segments, stream);
        EXPECT_NEAR(actual, expected, 1e-12 * expected);
        const OwnStream other;
        EXPECT_EQ(on_device(device_values, segments, other), actual) << "another stream";
        EXPECT_EQ(on_device(device_values, segments, Stream{}), actual) << "the default stream";
#ifdef PARTITA_CUDA_EMULATED
        for (const int device : {2, 3, 4}) {
            EXPECT_EQ(on_device(device_values, segments, Stream{device}), actual)
                << cuda_emulator::multiprocessors[device] << " multiprocessors";
        }
#endif
        EXPECT_EQ(device_values.read().bytes(), values.bytes());
    }
};

// With gaps of 0 to 2 elements; alternating groups keep neighbours apart.
Segments segments_of(const std::vector<std::int64_t>& sizes, std::int64_t align = 1) {
    std::vector<Segment> rows;
    std::int64_t end = 1;
    for (const std::int64_t numel : sizes) {
        end = (end + align - 1) / align * align;
        rows.push_back({end, numel, static_cast<std::int32_t>(rows.size() % 2)});
        end += numel + static_cast<std::int64_t>(rows.size()) % 3;
    }
    return Segments(rows);
}

TEST_P(CudaNorm, EqualsTheSumOfTheCpu) {
    for (std::int64_t misalignment = 0; misalignment < 5; ++misalignment) {
        check(segments_of({0, 1, 15, 16, 17, 31, 33, 1000, 70000, 0}), misalignment);
    }
    check(segments_of(sizes_to_try()), 0);
    check(segments_of(sizes_to_try(), 8), 0);
}

TEST_P(CudaNorm, EachSizeAlone) {
    for (const std::int64_t numel : sizes_to_try()) check(Segments({{8, numel, 0}}), 0);
}

TEST_P(CudaNorm, VeryManySegments) {
    std::vector<std::int64_t> sizes;
    for (std::int64_t i = 0; i < 2100; ++i) sizes.push_back(i % 7);
    check(segments_of(sizes), 0);
}

TEST_P(CudaNorm, AnInfinityOrNanAnywhereShows) {
    const std::int64_t block = Segments::block_numel;
    Buffer values = values_for(Segments({{0, block + 20, 0}}), 0);
    const Segments segments({{1, block + 18, 0}});
    std::vector<std::int64_t> places = {block - 1, block, block + 1, block + 17, block + 18};
    for (std::int64_t i = 1; i < 40; ++i) places.push_back(i);
    for (std::int64_t i = 40; i < block; i += 307) places.push_back(i);
    for (const std::int64_t i : places) {
        const std::uint32_t kept = values.bits(i);
        values.set(i, i % 3 == 0 ? nan : i % 3 == 1 ? inf : -inf);
        DeviceBuffer device_values(values);
        EXPECT_FALSE(std::isfinite(on_device(device_values, segments, stream))) << i;
        values.set_bits(i, kept);
    }
    for (const std::int64_t i : {std::int64_t{0}, block + 19}) values.set(i, nan);
    DeviceBuffer device_values(values);
    EXPECT_TRUE(std::isfinite(on_device(device_values, segments, stream))) << "NaN beside the segment";
}

TEST_P(CudaNorm, TheLargestNumbersDoNotOverflow) {
    const float largest =
        dtype == DType::f32 ? std::numeric_limits<float>::max() : decode(dtype, dtype == DType::f16 ? 0x7bff : 0x7f7f);
    Buffer values(dtype, 100000);
    values.fill(largest);
    DeviceBuffer device_values(values);
    const double expected = 1e5 * largest * static_cast<double>(largest);
    EXPECT_NEAR(on_device(device_values, Segments({{0, 100000, 0}}), stream), expected, 1e-11 * expected);
}

TEST_P(CudaNorm, SmallSquaresAreNotFlushedToZero) {
    Buffer values(dtype, 50);
    for (std::int64_t i = 0; i < 50; ++i) values.set_bits(i, 1);
    DeviceBuffer device_values(values);
    const double smallest = values.at(0);
    EXPECT_GT(smallest, 0.0);
    EXPECT_EQ(on_device(device_values, Segments({{0, 50, 0}}), stream), 50 * smallest * smallest);
}

TEST_P(CudaNorm, AddsToWhatIsThere) {
    Buffer values(dtype, 3);
    values.fill(2.0f);
    DeviceBuffer device_values(values);
    EXPECT_EQ(on_device(device_values, Segments({{0, 3, 0}}), stream, 1.0), 13.0);
    EXPECT_EQ(on_device(device_values, Segments({{1, 1, 0}}), stream, 0.5), 4.5);
    EXPECT_EQ(on_device(device_values, Segments(std::vector<Segment>{}), stream, 7.0), 7.0);
    EXPECT_EQ(on_device(device_values, Segments({{0, 0, 0}, {2, 0, 1}}), stream, 7.0), 7.0);
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaNorm, ::testing::ValuesIn(all_dtypes),
                         [](const auto& dtype) { return std::string(name_of(dtype.param)); });

}  // namespace
}  // namespace partita
