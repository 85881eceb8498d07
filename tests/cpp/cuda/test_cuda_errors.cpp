// What the CUDA functions refuse, how errors of the runtime are told, and where work is queued.
#include <functional>
#include <stdexcept>

#include "cuda_support.h"
#include "partita/adam.h"
#include "partita/copy.h"
#include "partita/norm.h"
#include "partita/weights.h"
#ifdef PARTITA_CUDA_EMULATED
#include "emulator.h"
#endif

namespace partita {
namespace {

constexpr std::int64_t numel = 100;

// One call of each function, with arguments that fit.
class CudaErrors : public ::testing::Test {
  protected:
    struct Call {
        const char* name;
        std::function<void(Stream)> run;
    };

    Segments segments{{{0, numel, 0}}};
    LossScaler scaler{LossScaler::Config{}};
    DeviceBuffer f32 = zeros(DType::f32), grads = zeros(DType::f32), exp_avg = zeros(DType::f32),
                 exp_avg_sq = zeros(DType::f32), bf16 = zeros(DType::bf16), low = zeros(DType::bf16),
                 small = DeviceBuffer(Buffer(DType::f16, 4));
    DeviceArray<double> numbers{std::vector<double>(8, 0.0)};
    DeviceArray<StepControl> control{StepControl{0.0, 1.0f, 0, 1}};
    DeviceArray<LossScaleState> state{scaler.initial()};
    OwnStream stream;

    static DeviceBuffer zeros(DType dtype) {
        Buffer buffer(dtype, numel);
        buffer.fill(0.0f);
        return DeviceBuffer(buffer);
    }

    std::uint16_t* remainder() { return static_cast<std::uint16_t*>(low.span().data); }
    AdamBuffers buffers() { return {grads.span(), f32.span(), exp_avg.span(), exp_avg_sq.span(), bf16.span()}; }
    AdamBuffers split_buffers() {
        AdamBuffers result = buffers();
        result.master.data = nullptr;
        result.remainder = remainder();
        return result;
    }

    std::vector<Call> calls() {
        return {{"pack", [&](Stream s) { pack(f32.span(), {bf16.span()}, {0}, 1.0f, false, s); }},
                {"cast", [&](Stream s) { cast(f32.span(), bf16.span(), 1.0f, false, s); }},
                {"norm", [&](Stream s) { norm(numbers.data(), f32.span(), segments, numbers.data() + 1, s); }},
                {"adam", [&](Stream s) { adam(buffers(), segments, {AdamGroup{}}, control.data(), s); }},
                {"adam", [&](Stream s) { adam(split_buffers(), segments, {AdamGroup{}}, control.data(), s); }},
                {"split_master", [&](Stream s) { split_master(bf16.span(), remainder(), f32.span(), s); }},
                {"join_master", [&](Stream s) { join_master(f32.span(), bf16.span(), remainder(), s); }},
                {"loss_scale_update", [&](Stream s) {
                     loss_scale_update(control.data(), state.data(), scaler, numbers.data(), 1.0, 0.0, s);
                 }}};
    }

    // `call` throws a std::runtime_error that begins with the function's name and tells CUDA's message.
    static void expect_error(const Call& call, Stream where, const std::string& message) {
        try {
            call.run(where);
            ADD_FAILURE() << call.name << " did not notice: " << message;
        } catch (const std::runtime_error& error) {
            const std::string text = error.what();
            EXPECT_EQ(text.rfind(std::string(call.name) + ":", 0), 0u) << text;
            EXPECT_NE(text.find(message), std::string::npos) << text;
        }
        EXPECT_EQ(cudaGetLastError(), cudaSuccess) << call.name << " leaves its error to the next one who asks";
        int device = -1;
        check_cuda(cudaGetDevice(&device));
        EXPECT_EQ(device, 0) << call.name;
    }
};

TEST_F(CudaErrors, ADeviceThatDoesNotExist) {
    for (const Call& call : calls()) {
        expect_error(call, Stream{1000, nullptr}, cudaGetErrorString(cudaErrorInvalidDevice));
    }
}

TEST_F(CudaErrors, CallsThatFitDoNotThrow) {
    for (const Call& call : calls()) {
        EXPECT_NO_THROW(call.run(stream)) << call.name;
        EXPECT_NO_THROW(call.run(Stream{})) << call.name;
    }
    check_cuda(cudaDeviceSynchronize());
}

#ifdef PARTITA_CUDA_EMULATED
TEST_F(CudaErrors, WhateverFailsIsTold) {
    for (const Call& call : calls()) {
        for (const char* function : {"cudaGetDevice", "cudaLaunchKernelEx"}) {
            SCOPED_TRACE(::testing::Message() << call.name << ", " << function);
            cuda_emulator::fail_next(function);
            expect_error(call, stream, function);
            cuda_emulator::fail_next(function);
            expect_error(call, stream, cudaGetErrorString(cudaErrorUnknown));
        }
        cuda_emulator::fail_next("cudaSetDevice");
        expect_error(call, Stream{1, nullptr}, "cudaSetDevice");
        expect_error(call, Stream{1, Stream(stream).handle}, cudaGetErrorString(cudaErrorInvalidResourceHandle));
        EXPECT_NO_THROW(call.run(stream)) << "after an error";
    }
}

TEST_F(CudaErrors, WorkGoesToTheStreamAndItsDevice) {
    for (const Call& call : calls()) {
        call.run(stream);
        EXPECT_EQ(cuda_emulator::last_launch().stream, Stream(stream).handle) << call.name;
        EXPECT_EQ(cuda_emulator::last_launch().device, 0) << call.name;
        call.run(Stream{1, nullptr});
        EXPECT_EQ(cuda_emulator::last_launch().stream, nullptr) << call.name;
        EXPECT_EQ(cuda_emulator::last_launch().device, 1) << call.name;
        int device = -1;
        check_cuda(cudaGetDevice(&device));
        EXPECT_EQ(device, 0) << call.name << " leaves the current device as it was";
    }
}
#endif

TEST_F(CudaErrors, CopiesThatDoNotFit) {
    const Buffer before = f32.read();
    for (const std::int64_t offset : {-1LL, 97LL, 1LL << 62}) {
        EXPECT_THROW(pack(f32.span(), {small.span()}, {offset}, 1.0f, false, stream), std::invalid_argument);
    }
    const Span negative{small.span().data, -1, DType::f16}, huge{small.span().data, INT64_MAX, DType::f16};
    EXPECT_THROW(pack(f32.span(), {negative}, {0}, 1.0f, false, stream), std::invalid_argument);
    EXPECT_THROW(pack(f32.span(), {huge}, {1}, 1.0f, false, stream), std::invalid_argument);
    EXPECT_THROW(pack(f32.span(), {small.span()}, {}, 1.0f, false, stream), std::invalid_argument);
    EXPECT_THROW(pack(f32.span(), {}, {0}, 1.0f, false, stream), std::invalid_argument);
    EXPECT_THROW(cast(f32.span(), small.span(), 1.0f, false, stream), std::invalid_argument);
    EXPECT_THROW(pack(f32.span(), {small.span(), small.span()}, {0, 97}, 1.0f, false, stream), std::invalid_argument);
    EXPECT_TRUE(same(f32.read(), before)) << "the first source would have fitted";
}

TEST_F(CudaErrors, NormBeyondTheBuffer) {
    for (const Segment row : {Segment{0, numel + 1, 0}, Segment{numel, 1, 0}}) {
        EXPECT_THROW(norm(numbers.data(), f32.span(), Segments({row}), numbers.data() + 1, stream),
                     std::invalid_argument);
    }
}

TEST_F(CudaErrors, AdamOfBuffersThatDoNotMatch) {
    const auto refuses = [&](AdamBuffers all, Span AdamBuffers::* field, Span span) {
        all.*field = span;
        EXPECT_THROW(adam(all, segments, {AdamGroup{}}, control.data(), stream), std::invalid_argument);
        EXPECT_THROW(adam(all, segments, {AdamGroup{}}, control.data(), 1), std::invalid_argument) << "CPU";
    };
    for (const auto field : {&AdamBuffers::grads, &AdamBuffers::master, &AdamBuffers::exp_avg, &AdamBuffers::exp_avg_sq,
                             &AdamBuffers::params}) {
        refuses(buffers(), field, f32.span().part(0, 3));
    }
    for (const auto field : {&AdamBuffers::master, &AdamBuffers::exp_avg, &AdamBuffers::exp_avg_sq}) {
        refuses(buffers(), field, bf16.span());
    }
    refuses(split_buffers(), &AdamBuffers::params, f32.span());  // only bf16 has a remainder
    refuses(split_buffers(), &AdamBuffers::params, Span{});
    refuses(split_buffers(), &AdamBuffers::params, bf16.span().part(0, 3));
    EXPECT_THROW(adam(buffers(), segments, {}, control.data(), stream), std::invalid_argument);
    EXPECT_THROW(adam(buffers(), Segments({{0, numel + 1, 0}}), {AdamGroup{}}, control.data(), stream),
                 std::invalid_argument);
}

TEST_F(CudaErrors, AdamWithNeitherMastersNorRemainder) {
    AdamBuffers without_remainder = split_buffers();
    without_remainder.remainder = nullptr;
    EXPECT_THROW(adam(without_remainder, segments, {AdamGroup{}}, control.data(), stream), std::invalid_argument);
}

TEST_F(CudaErrors, WeightsThatDoNotMatch) {
    EXPECT_THROW(split_master(bf16.span().part(0, 3), remainder(), f32.span(), stream), std::invalid_argument);
    EXPECT_THROW(split_master(exp_avg.span(), remainder(), f32.span(), stream), std::invalid_argument);
    EXPECT_THROW(split_master(bf16.span(), nullptr, low.span(), stream), std::invalid_argument);
    EXPECT_THROW(join_master(f32.span(), bf16.span(), nullptr, stream), std::invalid_argument);
    EXPECT_THROW(join_master(f32.span(), exp_avg.span(), remainder(), stream), std::invalid_argument);
    EXPECT_THROW(join_master(low.span(), bf16.span(), remainder(), stream), std::invalid_argument);
    EXPECT_THROW(join_master(f32.span(), bf16.span().part(0, 3), remainder(), stream), std::invalid_argument);
}

}  // namespace
}  // namespace partita
