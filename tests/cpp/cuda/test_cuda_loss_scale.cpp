// The loss scale on a device goes through the states that it has on the CPU.
#include "../loss_scale_tables.h"
#include "cuda_support.h"
#include "partita/loss_scale.h"

namespace partita {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class T>
std::vector<unsigned char> bytes_of(const T& value) {
    std::vector<unsigned char> bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
}

// With every NaN the same one.
StepControl normalized(StepControl control) {
    if (std::isnan(control.grad_norm)) control.grad_norm = nan;
    if (std::isnan(control.grad_scale)) control.grad_scale = std::numeric_limits<float>::quiet_NaN();
    return control;
}

// Both forms side by side, and equal after each step.
class Pair {
  public:
    explicit Pair(const LossScaler::Config& config)
        : scaler_(config),
          state_(scaler_.initial()),
          device_state_(state_),
          device_control_(StepControl{7.0, 7.0f, 7, 7}) {}

    void step(double sum_of_squares, double mean, double clip) {
        const DeviceArray<double> device_sum(sum_of_squares);
        loss_scale_update(&control_, &state_, scaler_, &sum_of_squares, mean, clip);
        loss_scale_update(device_control_.data(), device_state_.data(), scaler_, device_sum.data(), mean, clip,
                          stream_);
        EXPECT_EQ(bytes_of(normalized(device_control_.value())), bytes_of(normalized(control_)))
            << "sum of squares " << sum_of_squares << ", mean " << mean << ", clip " << clip;
        EXPECT_EQ(bytes_of(device_state_.value()), bytes_of(state_));
        EXPECT_EQ(bytes_of(device_sum.value()), bytes_of(sum_of_squares));
    }
    LossScaleState state() const { return device_state_.value(); }

  private:
    LossScaler scaler_;
    OwnStream stream_;
    LossScaleState state_;
    StepControl control_{};
    DeviceArray<LossScaleState> device_state_;
    DeviceArray<StepControl> device_control_;
};

class CudaLossScaleTable : public ::testing::TestWithParam<Golden> {};

TEST_P(CudaLossScaleTable, Holds) {
    for (const double overflow : {inf, nan}) {
        Pair pair(GetParam().config);
        for (std::size_t i = 0; i < GetParam().rows.size(); ++i) {
            SCOPED_TRACE(i);
            const Row& row = GetParam().rows[i];
            pair.step(row.step == 'x' ? overflow : 3.0 + static_cast<double>(i), 0.25, 1.0);
            EXPECT_EQ(pair.state().scale, row.scale);
            EXPECT_EQ(pair.state().hysteresis, row.hysteresis);
            EXPECT_EQ(pair.state().good_steps, row.good_steps);
            EXPECT_EQ(pair.state().at_minimum, row.at_minimum);
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Patterns, CudaLossScaleTable, ::testing::ValuesIn(tables),
                         [](const auto& golden) { return std::string(golden.param.name); });

TEST(CudaLossScale, RandomSteps) {
    Random random(3);
    for (int run = 0; run < 20; ++run) {
        LossScaler::Config config = dynamic(1 + run % 4, 1 + run % 3, run % 2 == 0);
        config.dynamic = run % 5 != 0;
        config.factor = 1.5 + run % 3;
        config.minimum = 1000.0;
        Pair pair(config);
        for (int step = 0; step < 100; ++step) {
            const double sum = random.bits() % 3 == 0 ? (random.bits() % 2 == 0 ? inf : nan)
                                                      : std::ldexp(double{random.uniform(0, 1)}, 200 - step * 8);
            pair.step(random.bits() % 20 == 0 ? 0.0 : sum, 1.0 / (1 + random.bits() % 50),
                      random.bits() % 3 == 0 ? 0.0 : double{random.uniform(0, 2)});
        }
    }
}

}  // namespace
}  // namespace partita
