// Adam on a device against the CPU's, bit by bit: whole and split masters, all kinds of layouts.
#include <array>
#include <tuple>

#include "cuda_support.h"
#include "partita/adam.h"
#include "partita/norm.h"
#include "partita/weights.h"

namespace partita {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

const std::vector<AdamGroup> groups = {{0.05, 0.9, 0.999, 1e-8, 0.1, false},
                                       {0.02, 0.8, 0.95, 1e-6, 0.2, true},
                                       {0.1, 0.0, 0.5, 0.25, 0.0, true},
                                       {0.05, 0.9, 0.99, 1e-6, 0.1, true, false}};

// Segments for several launches: one takes 388 that are not empty. Emulated, each costs a block of threads.
#ifdef PARTITA_CUDA_EMULATED
constexpr int very_many = 700;
#else
constexpr int very_many = 2100;
#endif

std::vector<AdamGroup> many_groups(int count) {
    std::vector<AdamGroup> result;
    for (int i = 0; i < count; ++i) {
        result.push_back(groups[static_cast<std::size_t>(i) % groups.size()]);
        result.back().lr *= 1.0 + 0.01 * i;
    }
    return result;
}

// Segments of these sizes, from multiples of `align` on, in gaps of up to 3 elements; groups in turn.
std::vector<Segment> layout(const std::vector<std::int64_t>& sizes, std::int64_t align = 1, int group_count = 4) {
    std::vector<Segment> rows;
    std::int64_t offset = 2;
    for (const std::int64_t numel : sizes) {
        const auto i = static_cast<std::int64_t>(rows.size());
        offset = (offset + align - 1) / align * align;
        rows.push_back({offset, numel, static_cast<std::int32_t>(i % group_count)});
        offset += numel + i % 4;
    }
    return rows;
}

const std::vector<std::int64_t> some_sizes = {0, 1, 15, 16, 17, 31, 33, 0, 1000, 4097, 0};

enum class Masters { whole, whole_without_params, split };
constexpr Masters all_masters[] = {Masters::whole, Masters::whole_without_params, Masters::split};
enum Index { grads, master, exp_avg, exp_avg_sq, params, remainder, buffer_count };
using Misalignments = std::array<std::int64_t, buffer_count>;

template <class B>
AdamBuffers spans_of(std::vector<B>& b, Masters masters) {
    AdamBuffers result{b[grads].span(), b[master].span(), b[exp_avg].span(), b[exp_avg_sq].span(), b[params].span()};
    if (masters == Masters::whole_without_params) result.params.data = nullptr;
    if (masters == Masters::split) {
        result.master.data = nullptr;
        result.remainder = static_cast<std::uint16_t*>(b[remainder].span().data);
    }
    return result;
}

// One shard on the CPU and on the device; what lies between the segments is NaN.
class Shards {
  public:
    Shards(std::vector<Segment> rows, DType grads_dtype, DType params_dtype, Masters masters,
           const Misalignments& misaligned = {})
        : rows_(std::move(rows)), segments_(rows_), masters_(masters) {
        const std::int64_t numel = rows_.back().offset + rows_.back().numel + 5;
        // The remainder is no float, but what it is compared by are bytes.
        const DType dtypes[] = {grads_dtype, DType::f32, DType::f32, DType::f32, params_dtype, DType::bf16};
        for (std::size_t i = 0; i < buffer_count; ++i) {
            host_.emplace_back(dtypes[i], numel, misaligned[i]);
            host_.back().fill(nan);
        }
        Random random(7);
        for_each_element([&](std::int64_t i) {
            host_[master].set(i, i % 17 == 0 ? random.wide() : random.uniform(-1, 1));
            host_[exp_avg].set(i, i % 3 == 0 ? 0.0f : random.wide());
            host_[exp_avg_sq].set(i, i % 3 == 0 ? 0.0f : std::fabs(random.wide()) * (i % 5 == 0 ? 1e-38f : 1.0f));
        });
        if (params_dtype == DType::bf16) {
            auto* low = static_cast<std::uint16_t*>(host_[remainder].span().data);
            for (const Segment& row : rows_) {
                split_master(host_[params].span().part(row.offset, row.numel), low + row.offset,
                             host_[master].span().part(row.offset, row.numel), 1);
            }
        }
        for (const Buffer& buffer : host_) device_.emplace_back(buffer);
    }

    template <class Body>
    void for_each_element(const Body& body) const {
        for (const Segment& row : rows_) {
            for (std::int64_t i = row.offset; i < row.offset + row.numel; ++i) body(i);
        }
    }

    // Gradients times `scale`; wild ones are infinite or NaN here and there.
    void new_grads(std::int64_t step, float scale = 1.0f, bool are_wild = false) {
        Random random(static_cast<std::uint32_t>(100 + step));
        for_each_element([&](std::int64_t i) { host_[grads].set(i, random.uniform(-2, 2) * scale); });
        if (are_wild) {
            const Buffer numbers = wild(host_[grads].dtype(), host_[grads].numel(), 0, step);
            for_each_element([&](std::int64_t i) { host_[grads].set_bits(i, numbers.bits(i)); });
        }
        upload_grads();
    }
    void upload_grads() {
        const std::vector<unsigned char>& bytes = host_[grads].bytes();
        check_cuda(cudaDeviceSynchronize());
        check_cuda(cudaMemcpy(static_cast<unsigned char*>(device_[grads].span().data) - start(), bytes.data(),
                              bytes.size(), cudaMemcpyHostToDevice));
    }

    void step(const std::vector<AdamGroup>& with, const StepControl& control) {
        const DeviceArray<StepControl> device_control(control);
        step(with, control, device_control.data());
        check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream().handle)));
    }
    void step(const std::vector<AdamGroup>& with, const StepControl& control, const StepControl* device_control) {
        adam(spans_of(host_, masters_), segments_, with, &control, 1);
        adam(spans_of(device_, masters_), segments_, with, device_control, stream());
    }

    void expect_equal() {
        for (std::size_t i = 0; i < buffer_count; ++i) {
            if (i == remainder) {
                EXPECT_EQ(device_[i].read().bytes(), host_[i].bytes()) << "remainder";
            } else {
                EXPECT_TRUE(same(device_[i].read(), host_[i])) << "buffer " << i;
            }
        }
    }

    Buffer& host(Index i) { return host_[i]; }
    DeviceBuffer& device(Index i) { return device_[i]; }
    const Segments& segments() const { return segments_; }
    Stream stream() const { return stream_; }

  private:
    std::ptrdiff_t start() {
        return static_cast<unsigned char*>(host_[grads].span().data) - host_[grads].bytes().data();
    }

    std::vector<Segment> rows_;
    Segments segments_;
    Masters masters_;
    std::vector<Buffer> host_;
    std::vector<DeviceBuffer> device_;
    OwnStream stream_;
};

StepControl control_of(std::int64_t step, float grad_scale = 0.375f) { return {0.0, grad_scale, 0, step}; }

class CudaAdam : public ::testing::TestWithParam<std::tuple<DType, DType>> {
  protected:
    DType grads_dtype = std::get<0>(GetParam());
    DType params_dtype = std::get<1>(GetParam());

    void check(const std::vector<Segment>& rows, const std::vector<AdamGroup>& with, Masters masters,
               const Misalignments& misaligned = {}, int steps = 2) {
        if (masters == Masters::split && params_dtype != DType::bf16) return;
        SCOPED_TRACE(::testing::Message() << rows.size() << " segments, masters " << static_cast<int>(masters)
                                          << ", misaligned by " << ::testing::PrintToString(misaligned));
        Shards shards(rows, grads_dtype, params_dtype, masters, misaligned);
        for (int step = 1; step <= steps; ++step) {
            shards.new_grads(step, 1.0f, step == 3);
            shards.step(with, control_of(step));
            shards.expect_equal();
        }
    }
};

TEST_P(CudaAdam, EverySize) {
    for (const Masters masters : all_masters) {
        check(layout(sizes_to_try()), groups, masters);
        check(layout(sizes_to_try(), 8), groups, masters);
    }
}

TEST_P(CudaAdam, EveryAlignment) {
    for (const Masters masters : all_masters) {
        for (std::int64_t by = 0; by < 5; ++by) {
            for (std::size_t one = 0; one < buffer_count; ++one) {
                Misalignments misaligned{};
                misaligned[one] = by;  // it alone is out of step
                check(layout(some_sizes, 8), groups, masters, misaligned, 1);
            }
            check(layout(some_sizes), groups, masters, {by, by, by, by, by, by}, 1);
        }
    }
}

TEST_P(CudaAdam, ManyStepsAndWildGradients) {
    for (const Masters masters : all_masters) check(layout(some_sizes, 4), groups, masters, {}, 12);
}

TEST_P(CudaAdam, VeryManySegmentsAndGroups) {
    std::vector<std::int64_t> sizes;
    for (std::int64_t i = 0; i < very_many; ++i) sizes.push_back(i % 7);
    for (const Masters masters : all_masters) {
        check(layout(sizes), groups, masters, {}, 1);
        for (const int count : {15, 16, 17, 64, 65, 133, very_many}) {
            check(layout(sizes, 1, count), many_groups(count), masters, {}, 1);
        }
        check({{3, 5000, 77}, {5003, 9000, 12}}, many_groups(78), masters, {}, 1);
    }
}

TEST_P(CudaAdam, AGroupThatWaitedCountsItsOwnSteps) {
    std::vector<AdamGroup> waited = groups;
    waited.front().waited = 3;
    Shards shards(layout(some_sizes, 8), grads_dtype, params_dtype, Masters::whole);
    for (std::int64_t step = 4; step <= 6; ++step) {
        shards.new_grads(step);
        shards.step(waited, control_of(step));
        shards.expect_equal();
    }
}

TEST_P(CudaAdam, ASkippedStepLeavesEveryByte) {
    for (const Masters masters : all_masters) {
        if (masters == Masters::split && params_dtype != DType::bf16) continue;
        Shards shards(layout(some_sizes, 8), grads_dtype, params_dtype, masters);
        shards.new_grads(1, 1.0f, true);
        std::vector<std::vector<unsigned char>> before;
        for (int i = 0; i < buffer_count; ++i) before.push_back(shards.device(static_cast<Index>(i)).read().bytes());
        shards.step(groups, {static_cast<double>(nan), nan, 1, 0});
        for (int i = 0; i < buffer_count; ++i) {
            EXPECT_EQ(shards.device(static_cast<Index>(i)).read().bytes(), before[static_cast<std::size_t>(i)]);
        }
    }
}

TEST_P(CudaAdam, NothingToDo) {
    const OwnStream stream;
    const DeviceArray<StepControl> control(control_of(1));
    Shards shards({{4, 0, 0}, {9, 0, 1}}, grads_dtype, params_dtype, Masters::whole);
    shards.step(groups, control_of(1));
    shards.expect_equal();
    AdamBuffers none{};
    none.grads.dtype = grads_dtype;
    none.params.dtype = params_dtype;
    EXPECT_NO_THROW(adam(none, Segments(std::vector<Segment>{}), {}, control.data(), stream));
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaAdam,
                         ::testing::Combine(::testing::ValuesIn(all_dtypes), ::testing::ValuesIn(all_dtypes)),
                         pair_name);

// Norm, loss scale and update one after the other without the host; two of the steps overflow.
TEST(CudaAdamSteps, TheControlBlockStaysOnTheDevice) {
    LossScaler::Config config;
    config.dynamic = true;
    config.initial_scale = 1024.0;
    config.window = 3;
    config.hysteresis = 1;
    const LossScaler scaler(config);
    for (const double clip : {0.0, 1e6, 0.5}) {
        for (const Masters masters : all_masters) {
            SCOPED_TRACE(::testing::Message() << "clip " << clip << ", masters " << static_cast<int>(masters));
            Shards shards(layout(some_sizes, 8), DType::f16, DType::bf16, masters);
            LossScaleState state = scaler.initial();
            StepControl control{};
            const DeviceArray<LossScaleState> device_state(state);
            const DeviceArray<StepControl> device_control(control);
            for (int i = 0; i < 12; ++i) {
                shards.new_grads(i, static_cast<float>(state.scale));
                if (i == 2 || i == 7) {
                    shards.host(grads).set(shards.segments().rows()[2].offset, std::numeric_limits<float>::infinity());
                    shards.upload_grads();
                }
                double sum = 0.0;
                norm(&sum, shards.host(grads).span(), shards.segments(), 1);
                const DeviceArray<double> device_sum(0.0);
                const DeviceArray<double> scratch(std::vector<double>(shards.segments().blocks().size()));
                norm(device_sum.data(), shards.device(grads).span(), shards.segments(), scratch.data(),
                     shards.stream());
                // The last bit of a sum may differ, and with it a clipped gradient's: there both take the device's.
                if (clip == 0.5) sum = device_sum.value();
                loss_scale_update(&control, &state, scaler, &sum, 0.5, clip);
                loss_scale_update(device_control.data(), device_state.data(), scaler, device_sum.data(), 0.5, clip,
                                  shards.stream());
                shards.step(groups, control, device_control.data());
                shards.expect_equal();
                EXPECT_EQ(control.skip, i == 2 || i == 7 ? 1 : 0);
                EXPECT_EQ(device_control.value().step, control.step);
                EXPECT_EQ(device_state.value().scale, state.scale);
            }
            EXPECT_EQ(state.skipped_steps, 2);
        }
    }
}

// A small table has 27 rows and 8 groups, a large one 388 rows and 64 groups.
TEST(CudaAdamSteps, AroundTheSizesOfTables) {
    for (const auto& [rows, count] :
         {std::pair{27, 8}, {27, 9}, {28, 8}, {388, 8}, {389, 8}, {389, 9}, {415, 2}, {416, 64}}) {
        SCOPED_TRACE(::testing::Message() << rows << " rows, " << count << " groups");
        Shards shards(layout(std::vector<std::int64_t>(static_cast<std::size_t>(rows), 3), 1, count), DType::bf16,
                      DType::bf16, Masters::split);
        shards.new_grads(1);
        shards.step(many_groups(count), control_of(1));
        shards.expect_equal();
    }
}

TEST(CudaAdamSteps, SplitMastersAreTheWholeOnes) {
    const std::vector<Segment> rows = layout(some_sizes, 8);
    Shards whole(rows, DType::bf16, DType::bf16, Masters::whole), split(rows, DType::bf16, DType::bf16, Masters::split);
    DeviceBuffer joined(Buffer(DType::f32, whole.host(master).numel()));
    for (int i = 1; i <= 40; ++i) {
        for (Shards* shards : {&whole, &split}) {
            shards->new_grads(i);
            shards->step(groups, control_of(i));
        }
    }
    join_master(joined.span(), split.device(params).span(),
                static_cast<std::uint16_t*>(split.device(remainder).span().data), split.stream());
    const Buffer actual = joined.read(), expected = whole.device(master).read();
    whole.for_each_element([&](std::int64_t i) { ASSERT_EQ(actual.bits(i), expected.bits(i)) << i; });
    EXPECT_TRUE(same(split.device(params).read(), whole.device(params).read()));
    EXPECT_TRUE(same(split.device(exp_avg).read(), whole.device(exp_avg).read()));
    EXPECT_TRUE(same(split.device(exp_avg_sq).read(), whole.device(exp_avg_sq).read()));
}

}  // namespace
}  // namespace partita
