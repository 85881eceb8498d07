// Buffers beyond 2^31 elements: right at both ends and around 2^31. For GPUs alone.
#include "cuda_support.h"
#include "partita/adam.h"
#include "partita/copy.h"
#include "partita/norm.h"
#include "partita/weights.h"

namespace partita {
namespace {

constexpr std::int64_t numel = (std::int64_t{1} << 31) + 1001;
constexpr std::int64_t window = 64;
constexpr std::int64_t windows[] = {0, numel / 2, (std::int64_t{1} << 31) - 40, numel - window};  // apart
static_assert(windows[2] + window <= windows[3] && windows[3] + window == numel);

class CudaLarge : public ::testing::Test {
  protected:
    OwnStream stream;
    std::vector<void*> memory;

    void SetUp() override {
#ifdef PARTITA_CUDA_EMULATED
        GTEST_SKIP() << "too large for the emulated device";
#endif
    }
    void TearDown() override {
        for (void* each : memory) (void)cudaFree(each);
    }

    // `numel` zeros; no data when the device has no room for them.
    Span zeros(DType dtype) {
        void* data = nullptr;
        const auto bytes = static_cast<std::size_t>(numel * size_of(dtype));
        if (cudaMalloc(&data, bytes) != cudaSuccess) {
            (void)cudaGetLastError();
            return {nullptr, numel, dtype};
        }
        memory.push_back(data);
        check_cuda(cudaMemset(data, 0, bytes));
        return {data, numel, dtype};
    }

    static void write(Span span, std::int64_t begin, Buffer& from) {
        const auto bytes = static_cast<std::size_t>(from.numel() * size_of(from.dtype()));
        check_cuda(cudaMemcpy(span.part(begin, from.numel()).data, from.span().data, bytes, cudaMemcpyHostToDevice));
    }
    static Buffer read(Span span, std::int64_t begin, std::int64_t count = window) {
        Buffer result(span.dtype, count);
        check_cuda(cudaDeviceSynchronize());
        check_cuda(cudaMemcpy(result.span().data, span.part(begin, count).data,
                              static_cast<std::size_t>(count * size_of(span.dtype)), cudaMemcpyDeviceToHost));
        return result;
    }
};

TEST_F(CudaLarge, Cast) {
    const Span from = zeros(DType::bf16), to = zeros(DType::bf16);
    if (from.data == nullptr || to.data == nullptr) GTEST_SKIP() << "too little memory";
    for (const std::int64_t begin : windows) {
        Buffer source = wild(DType::bf16, window, 0, begin % 1000);
        write(from, begin, source);
    }
    cast(to, from, 0.3f, false, stream);
    for (const std::int64_t begin : windows) {
        Buffer source = wild(DType::bf16, window, 0, begin % 1000), expected(DType::bf16, window);
        cast(expected.span(), source.span(), 0.3f, false, 1);
        EXPECT_TRUE(same(read(to, begin), expected)) << "from " << begin;
    }
}

TEST_F(CudaLarge, Pack) {
    const Span to = zeros(DType::bf16);
    if (to.data == nullptr) GTEST_SKIP() << "too little memory";
    Buffer source = wild(DType::f32, window), expected(DType::bf16, window);
    DeviceBuffer device_source(source);
    pack(to, {device_source.span(), device_source.span()}, {0, numel - window}, 0.3f, false, stream);
    cast(expected.span(), source.span(), 0.3f, false, 1);
    for (const std::int64_t begin : {std::int64_t{0}, numel - window}) {
        EXPECT_TRUE(same(read(to, begin), expected)) << "from " << begin;
    }
}

TEST_F(CudaLarge, Norm) {
    const Span values = zeros(DType::bf16);
    if (values.data == nullptr) GTEST_SKIP() << "too little memory";
    Buffer two(DType::bf16, 1);
    two.fill(2.0f);
    for (const std::int64_t place : {std::int64_t{0}, std::int64_t{1} << 31, numel - 1}) write(values, place, two);
    for (const std::int64_t begin : {0, 1}) {
        const Segments segments({{begin, numel - begin, 0}});
        const DeviceArray<double> sum(0.0), scratch(std::vector<double>(segments.blocks().size()));
        norm(sum.data(), values, segments, scratch.data(), stream);
        EXPECT_EQ(sum.value(), begin == 0 ? 12.0 : 8.0);
    }
}

// About 30 GB.
TEST_F(CudaLarge, AdamWithSplitMasters) {
    const Span grads = zeros(DType::bf16), params = zeros(DType::bf16), low = zeros(DType::bf16),
               exp_avg = zeros(DType::f32), exp_avg_sq = zeros(DType::f32);
    for (const Span& span : {grads, params, low, exp_avg, exp_avg_sq}) {
        if (span.data == nullptr) GTEST_SKIP() << "too little memory";
    }
    const std::vector<AdamGroup> groups = {{0.05, 0.9, 0.999, 1e-8, 0.1, true}};
    const StepControl control{0.0, 0.5f, 0, 1};
    const DeviceArray<StepControl> device_control(control);
    Buffer host_grads(DType::bf16, window);
    Random random;
    random.fill_uniform(host_grads);
    for (const std::int64_t begin : windows) write(grads, begin, host_grads);
    adam({grads, {nullptr, numel, DType::f32}, exp_avg, exp_avg_sq, params, static_cast<std::uint16_t*>(low.data)},
         Segments({{0, numel, 0}}), groups, device_control.data(), stream);
    Buffer host_params(DType::bf16, window), host_low(DType::bf16, window), m(DType::f32, window),
        v(DType::f32, window);
    for (Buffer* buffer : {&host_params, &host_low, &m, &v}) buffer->fill(0.0f);
    adam({host_grads.span(),
          {nullptr, window, DType::f32},
          m.span(),
          v.span(),
          host_params.span(),
          static_cast<std::uint16_t*>(host_low.span().data)},
         Segments({{0, window, 0}}), groups, &control, 1);
    for (const std::int64_t begin : windows) {
        EXPECT_TRUE(same(read(params, begin), host_params)) << "from " << begin;
        EXPECT_EQ(read(low, begin).bytes(), host_low.bytes()) << "from " << begin;
        EXPECT_TRUE(same(read(exp_avg, begin), m)) << "from " << begin;
        EXPECT_TRUE(same(read(exp_avg_sq, begin), v)) << "from " << begin;
    }
    const Span master = zeros(DType::f32);
    if (master.data == nullptr) return;
    join_master(master, params, static_cast<std::uint16_t*>(low.data), stream);
    Buffer host_master(DType::f32, window);
    join_master(host_master.span(), host_params.span(), static_cast<std::uint16_t*>(host_low.span().data), 1);
    for (const std::int64_t begin : windows) {
        EXPECT_TRUE(same(read(master, begin), host_master)) << "from " << begin;
    }
}

}  // namespace
}  // namespace partita
