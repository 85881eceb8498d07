// Dynamic loss scaling: golden tables of overflow patterns, refused ranges, and the control block of a step.
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>

#include "loss_scale_tables.h"
#include "partita/loss_scale.h"
#include "support.h"

namespace partita {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

class LossScaleTable : public ::testing::TestWithParam<Golden> {};

TEST_P(LossScaleTable, Holds) {
    const LossScaler scaler(GetParam().config);
    LossScaleState state = scaler.initial();
    std::int64_t applied = 0, skipped = 0;
    std::int32_t in_a_row = 0;
    for (std::size_t i = 0; i < GetParam().rows.size(); ++i) {
        const Row& row = GetParam().rows[i];
        const bool overflow = row.step == 'x';
        scaler.update(state, overflow);
        SCOPED_TRACE(i);
        EXPECT_EQ(state.scale, row.scale);
        EXPECT_EQ(state.hysteresis, row.hysteresis);
        EXPECT_EQ(state.good_steps, row.good_steps);
        EXPECT_EQ(state.at_minimum, row.at_minimum);
        EXPECT_EQ(state.applied_steps, applied += overflow ? 0 : 1);
        EXPECT_EQ(state.skipped_steps, skipped += overflow ? 1 : 0);
        EXPECT_EQ(state.consecutive_skips, in_a_row = overflow ? in_a_row + 1 : 0);
    }
}

INSTANTIATE_TEST_SUITE_P(Patterns, LossScaleTable, ::testing::ValuesIn(tables),
                         [](const auto& golden) { return std::string(golden.param.name); });

TEST(LossScaler, Initial) {
    const LossScaleState state = LossScaler(dynamic()).initial();
    EXPECT_EQ(state.scale, 65536.0);
    EXPECT_EQ(state.hysteresis, 2);
    EXPECT_EQ(state.applied_steps + state.skipped_steps + state.good_steps + state.consecutive_skips + state.at_minimum,
              0);
    EXPECT_EQ(LossScaler(LossScaler::Config{}).initial().scale, 1.0);
}

TEST(LossScaler, GrowsInTheStepAfterAWindowAndThenOncePerWindow) {
    const LossScaler scaler(dynamic(1000));
    LossScaleState state = scaler.initial();
    for (int step = 0; step < 1000; ++step) scaler.update(state, false);
    EXPECT_EQ(state.scale, 65536.0);
    scaler.update(state, false);
    EXPECT_EQ(state.scale, 131072.0);
    for (int step = 0; step < 999; ++step) scaler.update(state, false);
    EXPECT_EQ(state.scale, 131072.0);
    scaler.update(state, false);
    EXPECT_EQ(state.scale, 262144.0);
}

TEST(LossScaler, AStaticScaleStaysButCounts) {
    LossScaler::Config config;
    config.initial_scale = 128.0;
    const LossScaler scaler(config);
    LossScaleState state = scaler.initial();
    for (int step = 0; step < 3000; ++step) scaler.update(state, step % 3 == 0);
    EXPECT_EQ(state.scale, 128.0);
    EXPECT_EQ(state.applied_steps, 2000);
    EXPECT_EQ(state.skipped_steps, 1000);
    EXPECT_EQ(state.at_minimum, 0);
}

TEST(LossScaler, RefusesBadRangesByName) {
    using Field = double LossScaler::Config::*;
    const auto refuses = [](const LossScaler::Config& config, const char* name) {
        try {
            LossScaler scaler(config);
            ADD_FAILURE() << name << " was accepted";
        } catch (const std::invalid_argument& error) {
            EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
        }
    };
    const auto with = [](Field field, double value) {
        LossScaler::Config config = dynamic();
        config.*field = value;
        return config;
    };
    for (const double bad : {0.0, -1.0, inf, nan}) {
        refuses(with(&LossScaler::Config::initial_scale, bad), "initial_scale");
        LossScaler::Config fixed;
        fixed.initial_scale = bad;
        refuses(fixed, "initial_scale");
    }
    for (const double bad : {0.0, -1.0, 65537.0, inf, nan}) refuses(with(&LossScaler::Config::minimum, bad), "minimum");
    for (const double bad : {0.0, 65535.0, inf, nan}) refuses(with(&LossScaler::Config::maximum, bad), "maximum");
    for (const double bad : {0.5, 1.0, inf, nan}) refuses(with(&LossScaler::Config::factor, bad), "factor");
    for (const std::int32_t bad : {0, -1}) {
        refuses(dynamic(bad), "window");
        refuses(dynamic(1000, bad), "hysteresis");
    }
}

// What one step with this sum of squares gives from a fresh state.
StepControl step_with(const LossScaler& scaler, double sum_of_squares, double mean, double clip) {
    LossScaleState state = scaler.initial();
    StepControl control{};
    loss_scale_update(&control, &state, scaler, &sum_of_squares, mean, clip);
    return control;
}

TEST(LossScaleUpdate, NormMeanAndClip) {
    const LossScaler scaler(dynamic());
    const double stored_norm = 65536.0 * 4 * 10;  // scale x 4 micro-batches x norm 10
    const StepControl free = step_with(scaler, stored_norm * stored_norm, 0.25, 0.0);
    EXPECT_EQ(free.grad_norm, 10.0);
    EXPECT_EQ(free.grad_scale, 0.25f / 65536);
    EXPECT_EQ(free.skip, 0);
    EXPECT_EQ(free.step, 1);
    const StepControl clipped = step_with(scaler, stored_norm * stored_norm, 0.25, 1.0);
    EXPECT_EQ(clipped.grad_norm, 10.0) << "reported before clipping";
    EXPECT_FLOAT_EQ(clipped.grad_scale, static_cast<float>(0.25 / 65536 / (10 + 1e-6)));
    EXPECT_EQ(step_with(scaler, stored_norm * stored_norm, 0.25, 11.0).grad_scale, free.grad_scale)
        << "never scaled up";
    const StepControl zero = step_with(scaler, 0.0, 0.25, 1.0);
    EXPECT_EQ(zero.grad_norm, 0.0);
    EXPECT_EQ(zero.grad_scale, free.grad_scale);
}

TEST(LossScaleUpdate, NotFiniteMeansSkip) {
    const LossScaler scaler(dynamic());
    LossScaleState state = scaler.initial();
    StepControl control{};
    std::int64_t step = 0;
    for (const double sum : {1.0, inf, nan, inf, 4.0}) {
        const double scale_before = state.scale;
        loss_scale_update(&control, &state, scaler, &sum, 1.0, 1.0);
        EXPECT_EQ(control.skip != 0, !std::isfinite(sum));
        EXPECT_EQ(std::isfinite(control.grad_norm), std::isfinite(sum));
        EXPECT_EQ(control.step, step += std::isfinite(sum) ? 1 : 0) << "a skipped step has no number";
        if (control.skip == 0) {
            EXPECT_EQ(control.grad_norm, std::sqrt(sum) / scale_before);
        }
    }
    EXPECT_EQ(state.scale, 16384.0);
    EXPECT_EQ(state.skipped_steps, 3);
}

// The gradients were made with the scale from before a step, also when the step changes it.
TEST(LossScaleUpdate, TheStepThatGrowsTheScaleUnscalesWithTheOldOne) {
    const LossScaler scaler(dynamic(1));
    LossScaleState state = scaler.initial();
    StepControl control{};
    const double sum = 65536.0 * 65536.0 * 9;
    scaler.update(state, false);
    EXPECT_EQ(state.scale, 65536.0);
    loss_scale_update(&control, &state, scaler, &sum, 1.0, 0.0);
    EXPECT_EQ(state.scale, 131072.0);
    EXPECT_EQ(control.grad_norm, 3.0);
    EXPECT_EQ(control.grad_scale, 0x1p-16f);
}

TEST(LossScaleUpdate, APowerOfTwoChangesNothing) {
    Random random;
    LossScaler::Config config;
    const LossScaler plain(config);
    for (const double scale : {0x1p-10, 2.0, 65536.0, 0x1p24}) {
        config.initial_scale = scale;
        const LossScaler scaler(config);
        for (int i = 0; i < 100; ++i) {
            const double sum = random.uniform(0.0f, 100.0f), mean = 1.0 / (1 + random.bits() % 50);
            const StepControl expected = step_with(plain, sum, mean, 1.0);
            const StepControl actual = step_with(scaler, sum * scale * scale, mean, 1.0);
            EXPECT_EQ(actual.grad_norm, expected.grad_norm);
            EXPECT_EQ(double{actual.grad_scale} * scale, double{expected.grad_scale});
        }
    }
}

}  // namespace
}  // namespace partita
