// pack and cast on a device against the same on the CPU, bit by bit.
#include <tuple>

#include "cuda_support.h"
#include "partita/copy.h"

namespace partita {
namespace {

struct Mode {
    float scale;
    double factor;  // in memory; 0: none
    bool accumulate;
};
constexpr Mode modes[] = {
    {1.0f, 0, false}, {0.5f, 0, true}, {1.0f / 3.0f, 0, false}, {0.7f, 0x1.123456789abcp-3, true}, {1.0f, 3, false}};

class CudaCopies : public ::testing::TestWithParam<std::tuple<DType, DType>> {
  protected:
    DType from = std::get<0>(GetParam());
    DType to = std::get<1>(GetParam());
    OwnStream stream;

    // Calls body(mode, scale on the host, scale on the device).
    template <class Body>
    void for_each_mode(const Body& body) {
        for (const Mode& mode : modes) {
            SCOPED_TRACE(::testing::Message()
                         << "scale " << mode.scale << " x " << mode.factor << ", accumulate " << mode.accumulate);
            const DeviceArray<double> factor(mode.factor);
            body(mode, Scale(mode.scale, mode.factor == 0 ? nullptr : &mode.factor),
                 Scale(mode.scale, mode.factor == 0 ? nullptr : factor.data()));
        }
    }

    void check_cast(std::int64_t numel, std::int64_t from_misalignment, std::int64_t to_misalignment) {
        SCOPED_TRACE(::testing::Message()
                     << numel << " elements, misaligned by " << from_misalignment << " and " << to_misalignment);
        Buffer source = wild(from, numel, from_misalignment);
        const Buffer before = wild(to, numel, to_misalignment, 1);
        DeviceBuffer device_source(source);
        for_each_mode([&](const Mode& mode, Scale host, Scale device) {
            Buffer expected = before;
            DeviceBuffer actual(before);
            cast(expected.span(), source.span(), host, mode.accumulate, 1);
            cast(actual.span(), device_source.span(), device, mode.accumulate, stream);
            EXPECT_TRUE(same(actual.read(), expected));
        });
        EXPECT_EQ(device_source.read().bytes(), source.bytes());
    }
};

TEST_P(CudaCopies, CastOfEverySize) {
    for (const std::int64_t numel : sizes_to_try()) check_cast(numel, 0, 0);
}

TEST_P(CudaCopies, CastOfEveryAlignment) {
    for (std::int64_t source = 0; source < 9; ++source) {
        for (std::int64_t destination = 0; destination < 9; ++destination) {
            for (const std::int64_t numel : {1, 17, 1000, 4099}) check_cast(numel, source, destination);
        }
    }
}

// Tensors of these sizes side by side in a flat buffer, with gaps that must not be touched.
struct Layout {
    std::vector<std::int64_t> sizes, offsets;
    std::int64_t numel = 3;

    explicit Layout(std::vector<std::int64_t> sizes_) : sizes(std::move(sizes_)) {
        for (const std::int64_t size : sizes) {
            offsets.push_back(numel);
            numel += size + static_cast<std::int64_t>(offsets.size()) % 4;
        }
    }
};

// Empty tensors in front, in the middle and at the end; tensors longer than any chunk; very many.
std::vector<Layout> layouts() {
    std::vector<std::int64_t> many, very_many;
    for (std::int64_t i = 0; i < 1037; ++i) many.push_back(i % 41);
    for (std::int64_t i = 0; i < 2100; ++i) very_many.push_back(i % 7 == 0 ? 0 : 1 + i % 5);
    return {Layout({}),     Layout({0}),       Layout({5}),
            Layout({0, 0}), Layout({0, 7, 0}), Layout({0, 1, 15, 0, 0, 16, 17, 31, 33, 1000, 70000, 0}),
            Layout(many),   Layout(very_many), Layout({4095, 4096, 4097, 8192, 0, 16384, 32769})};
}

// The tensors of a layout, one in thirteen of them without data.
struct Tensors {
    std::vector<Buffer> buffers;
    std::vector<bool> missing;
    std::vector<DeviceBuffer> on_device;

    Tensors(const Layout& layout, DType dtype) {
        for (const std::int64_t size : layout.sizes) {
            const auto i = static_cast<std::int64_t>(buffers.size());
            buffers.push_back(wild(dtype, size, i % 5, i));
            missing.push_back(i % 13 == 4);
            on_device.emplace_back(buffers.back());
        }
    }

    std::vector<Span> spans(bool device) {
        std::vector<Span> result;
        for (std::size_t i = 0; i < buffers.size(); ++i) {
            result.push_back(device ? on_device[i].span() : buffers[i].span());
            if (missing[i]) result.back().data = nullptr;
        }
        return result;
    }
};

TEST_P(CudaCopies, Pack) {
    for (const Layout& layout : layouts()) {
        SCOPED_TRACE(::testing::Message() << layout.sizes.size() << " tensors");
        Tensors sources(layout, from);
        const Buffer before = wild(to, layout.numel, 1);
        for_each_mode([&](const Mode& mode, Scale host, Scale device) {
            Buffer expected = before;
            DeviceBuffer actual(before);
            pack(expected.span(), sources.spans(false), layout.offsets, host, mode.accumulate, 1);
            pack(actual.span(), sources.spans(true), layout.offsets, device, mode.accumulate, stream);
            EXPECT_TRUE(same(actual.read(), expected));
        });
    }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaCopies,
                         ::testing::Combine(::testing::ValuesIn(all_dtypes), ::testing::ValuesIn(all_dtypes)),
                         pair_name);

// A small table has 62 rows, a large one 875; empty rows count for none.
TEST(CudaCopy, AroundTheSizesOfTables) {
    const OwnStream stream;
    for (const int rows : {1, 62, 63, 64, 875, 876, 937, 938, 939}) {
        Layout layout(std::vector<std::int64_t>(static_cast<std::size_t>(rows), 3));
        Buffer source = wild(DType::f32, 3 * rows + 5), expected = wild(DType::bf16, layout.numel, 1);
        DeviceBuffer device_source(source), actual(expected);
        std::vector<Span> here, there;
        for (std::int64_t i = 0; i < rows; ++i) {
            const std::int64_t numel = i % 50 == 7 ? 0 : 3;
            here.push_back(source.span().part(3 * i, numel));
            there.push_back(device_source.span().part(3 * i, numel));
        }
        pack(expected.span(), here, layout.offsets, 0.5f, false, 1);
        pack(actual.span(), there, layout.offsets, 0.5f, false, stream);
        EXPECT_TRUE(same(actual.read(), expected)) << rows << " rows";
    }
}

// Zeros are written as vectors where they can be.
TEST(CudaCopy, ZerosOfEverySizeAndAlignment) {
    const OwnStream stream;
    for (const DType dtype : all_dtypes) {
        for (std::int64_t begin = 0; begin < 9; ++begin) {
            for (const std::int64_t numel : {0, 1, 7, 8, 9, 2047, 2048, 2049, 16384, 16393}) {
                Buffer expected = wild(dtype, begin + numel + 9);
                DeviceBuffer actual(expected);
                const std::vector<Span> none = {{nullptr, numel, DType::f32}};
                pack(expected.span(), none, {begin}, 0.5f, false, 1);
                pack(actual.span(), none, {begin}, 0.5f, false, stream);
                EXPECT_TRUE(same(actual.read(), expected)) << numel << " from " << begin;
            }
        }
    }
}

TEST(CudaCopy, ASourceWithoutDataIsZeros) {
    const OwnStream stream;
    Buffer flat(DType::bf16, 5000);
    flat.fill(1.0f);
    Buffer half_zero = flat;
    for (std::int64_t i = 0; i < 4500; ++i) half_zero.set(i, 0.0f);
    const Span none{nullptr, 4500, DType::f32};
    DeviceBuffer packed(flat), whole(flat);
    pack(packed.span(), {none}, {0}, 0.5f, false, stream);
    EXPECT_TRUE(same(packed.read(), half_zero));
    pack(packed.span(), {none}, {500}, 0.5f, true, stream);
    EXPECT_TRUE(same(packed.read(), half_zero));
    cast(whole.span().part(0, 4500), none, 0.5f, false, stream);
    EXPECT_TRUE(same(whole.read(), half_zero));
    cast(whole.span().part(500, 4500), none, 0.5f, true, stream);
    EXPECT_TRUE(same(whole.read(), half_zero));
}

TEST(CudaCopy, SourcesOfSeveralTypesInOneCall) {
    const OwnStream stream;
    Buffer a = wild(DType::f32, 33), b = wild(DType::f16, 17), c = wild(DType::bf16, 5), expected(DType::f32, 60);
    DeviceBuffer device_a(a), device_b(b), device_c(c), actual(expected);
    pack(expected.span(), {a.span(), b.span(), c.span()}, {0, 33, 55}, 0.5f, false, 1);
    pack(actual.span(), {device_a.span(), device_b.span(), device_c.span()}, {0, 33, 55}, 0.5f, false, stream);
    EXPECT_TRUE(same(actual.read(), expected));
}

// In place, as gradients are unscaled.
TEST(CudaCopy, OntoItself) {
    const OwnStream stream;
    for (const DType dtype : all_dtypes) {
        Buffer expected = wild(dtype, 9001);
        DeviceBuffer actual(expected);
        cast(expected.span(), expected.span(), 1.0f / 3.0f, false, 1);
        cast(actual.span(), actual.span(), 1.0f / 3.0f, false, stream);
        EXPECT_TRUE(same(actual.read(), expected));
    }
}

}  // namespace
}  // namespace partita
