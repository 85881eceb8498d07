// What is known of a device before anything runs on it, and that all kernels are loaded by then.
#include <algorithm>
#include <set>

#include "cuda_support.h"
#include "partita/adam.h"
#include "partita/copy.h"
#include "partita/cuda_device.h"
#include "partita/loss_scale.h"
#include "partita/norm.h"
#include "partita/weights.h"
#ifdef PARTITA_CUDA_EMULATED
#include "emulator.h"
#endif

namespace partita {
namespace {

TEST(CudaDevice, VersionsOfDriverAndBuild) {
    const CudaVersions versions = cuda_versions();
    EXPECT_GE(versions.driver, 12010);
    EXPECT_GE(versions.runtime, 12010);
}

TEST(CudaDevice, LoadsTheSameKernelsEachTime) {
    const int count = load_cuda_kernels(0);
    EXPECT_GT(count, 50);
    EXPECT_EQ(load_cuda_kernels(0), count);
    EXPECT_THROW(load_cuda_kernels(1000), std::runtime_error);
    int device = -1;
    check_cuda(cudaGetDevice(&device));
    EXPECT_EQ(device, 0);
}

#ifdef PARTITA_CUDA_EMULATED
constexpr int here = cuda_emulator::untouched_device;

TEST(CudaDevice, WhatFailsIsTold) {
    cuda_emulator::fail_next("cudaFuncGetAttributes", cudaErrorNoKernelImageForDevice);
    try {
        load_cuda_kernels(1);
        FAIL() << "it did not notice";
    } catch (const std::runtime_error& error) {
        EXPECT_STREQ(error.what(),
                     "load_cuda_kernels: cudaFuncGetAttributes failed: cudaErrorNoKernelImageForDevice "
                     "(no kernel image is available for execution on the device)");
    }
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    for (const char* function : {"cudaDriverGetVersion", "cudaRuntimeGetVersion"}) {
        cuda_emulator::fail_next(function);
        EXPECT_THROW(cuda_versions(), std::runtime_error);
    }
    cuda_emulator::fail_next("cudaGetDeviceCount");
    EXPECT_EQ(cuda_device_count(), 0);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

// A device is asked for its multiprocessors at the first launch on it, and again if that failed.
TEST(CudaDevice, IsAskedOnce) {
    const OwnStream stream;
    Buffer values(DType::f32, 10);
    const auto call = [&] { cast(values.span(), values.span(), 1.0f, false, Stream{here, nullptr}); };
    cuda_emulator::fail_next("cudaDeviceGetAttribute");
    EXPECT_THROW(call(), std::runtime_error);
    EXPECT_NO_THROW(call());
    cuda_emulator::fail_next("cudaDeviceGetAttribute");
    EXPECT_NO_THROW(call());
    int count = 0;
    EXPECT_EQ(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), cudaErrorUnknown);
    cudaGetLastError();
}

// Every kernel that the functions launch: all types, few rows and many.
class CudaLaunches : public ::testing::Test {
  protected:
    static constexpr std::int64_t numel = 300;  // elements, and rows of one element: more than a small table has
    Segments one_row{{{0, numel, 0}}}, many_rows{rows()};
    std::set<const void*> kernels;
    std::size_t smallest = SIZE_MAX;

    void SetUp() override { load_cuda_kernels(here); }

    static std::vector<Segment> rows() {
        std::vector<Segment> result;
        for (std::int64_t i = 0; i < numel; ++i) result.push_back({i, 1, static_cast<std::int32_t>(i % 2)});
        return result;
    }

    template <class Call>
    void expect_loaded(const char* name, const Call& call) {
        call(Stream{here, nullptr});
        const cuda_emulator::Launch launch = cuda_emulator::last_launch();
        EXPECT_TRUE(launch.was_loaded) << name;
        kernels.insert(launch.kernel);
        smallest = std::min(smallest, launch.argument_bytes);
    }

    void launch_copies(DType from, DType to) {
        Buffer source(from, numel), destination(to, numel);
        std::vector<Span> sources;
        std::vector<std::int64_t> offsets;
        for (std::int64_t i = 0; i < numel; ++i) {
            sources.push_back(source.span().part(i, 1));
            offsets.push_back(i);
        }
        for (const bool accumulate : {false, true}) {
            expect_loaded("cast", [&](Stream s) { cast(destination.span(), source.span(), 1.0f, accumulate, s); });
            expect_loaded("pack", [&](Stream s) { pack(destination.span(), sources, offsets, 1.0f, accumulate, s); });
        }
    }

    void launch_adam(DType grads, DType params, bool splits) {
        Buffer g(grads, numel), p(params, numel), low(DType::bf16, numel), master(DType::f32, numel),
            m(DType::f32, numel), v(DType::f32, numel);
        for (Buffer* buffer : {&g, &p, &low, &master, &m, &v}) buffer->fill(0.0f);
        AdamBuffers buffers{g.span(), master.span(), m.span(), v.span(), p.span()};
        if (splits) {
            buffers.master.data = nullptr;
            buffers.remainder = static_cast<std::uint16_t*>(low.span().data);
        }
        const StepControl control{0.0, 1.0f, 0, 1};
        for (const Segments* segments : {&one_row, &many_rows}) {
            expect_loaded("adam", [&](Stream s) { adam(buffers, *segments, {{}, {}}, &control, s); });
        }
    }
};

TEST_F(CudaLaunches, NoKernelIsLoadedLater) {
    const int count = load_cuda_kernels(here);
    for (const DType a : all_dtypes) {
        for (const DType b : all_dtypes) {
            launch_copies(a, b);
            launch_adam(a, b, false);
        }
        launch_adam(a, DType::bf16, true);
        Buffer values(a, numel), master(DType::f32, numel), low(DType::bf16, numel);
        auto* remainder = static_cast<std::uint16_t*>(low.span().data);
        for (Buffer* buffer : {&values, &master, &low}) buffer->fill(0.0f);
        expect_loaded("split_master", [&](Stream s) { split_master(values.span(), nullptr, master.span(), s); });
        if (a == DType::bf16) {
            expect_loaded("join_master", [&](Stream s) { join_master(master.span(), values.span(), remainder, s); });
        }
        // Two kernels each: the one that adds up the blocks is the last.
        double sum = 0;
        std::vector<double> scratch(numel);
        for (const Segments* segments : {&one_row, &many_rows}) {
            expect_loaded("norm", [&](Stream s) { norm(&sum, values.span(), *segments, scratch.data(), s); });
        }
    }
    const LossScaler scaler{LossScaler::Config{}};
    StepControl control{};
    LossScaleState state = scaler.initial();
    const double sum = 1.0;
    expect_loaded("loss_scale_update",
                  [&](Stream s) { loss_scale_update(&control, &state, scaler, &sum, 1.0, 0.0, s); });
    const int norms = 6;  // of which only the last kernel was seen
    EXPECT_EQ(static_cast<int>(kernels.size()) + norms, count) << "kernels that nothing launches, or not for all types";
}

// The host copies a kernel's arguments: few rows take few bytes.
TEST_F(CudaLaunches, FewRowsAreSmallArguments) {
    launch_copies(DType::bf16, DType::f32);
    EXPECT_LE(smallest, 2500u);
    smallest = SIZE_MAX;
    launch_adam(DType::bf16, DType::bf16, true);
    EXPECT_LE(smallest, 2500u);
}
#endif

}  // namespace
}  // namespace partita
