// Adam and AdamW against a plain loop in double precision, and bit by bit against themselves.
#include <stdexcept>
#include <tuple>

#include "partita/adam.h"
#include "partita/weights.h"
#include "simd/kernels.h"
#include "support.h"

namespace partita {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// Adam with L2, AdamW, one whose large eps shows where it is added, and one without bias correction.
const std::vector<AdamGroup> groups = {{0.05, 0.9, 0.999, 1e-8, 0.1, false},
                                       {0.02, 0.8, 0.95, 1e-6, 0.2, true},
                                       {0.1, 0.0, 0.5, 0.25, 0.0, true},
                                       {0.05, 0.9, 0.99, 1e-6, 0.1, true, false}};

// Segments of all kinds of sizes, with and without padding between them, groups in turn.
std::vector<Segment> layout(std::initializer_list<std::int64_t> sizes) {
    std::vector<Segment> rows;
    std::int64_t offset = 2;
    for (const std::int64_t numel : sizes) {
        const auto i = static_cast<std::int64_t>(rows.size());
        rows.push_back({offset, numel, static_cast<std::int32_t>(i % 4)});
        offset += numel + i % 4;
    }
    return rows;
}

std::int64_t flat_numel(const std::vector<Segment>& rows) { return rows.back().offset + rows.back().numel + 5; }

StepControl control_of(std::int64_t step, float grad_scale = 1.0f, bool skip = false) {
    return {0.0, grad_scale, skip ? 1 : 0, step};
}

// The buffers of one shard; padding is NaN in each.
struct Shard {
    Buffer grads, master, exp_avg, exp_avg_sq, params;

    Shard(const std::vector<Segment>& rows, DType grads_dtype, DType params_dtype, std::int64_t misalignment = 0)
        : grads(grads_dtype, flat_numel(rows), misalignment),
          master(DType::f32, flat_numel(rows), (misalignment + 1) % 4),
          exp_avg(DType::f32, flat_numel(rows), (misalignment + 2) % 4),
          exp_avg_sq(DType::f32, flat_numel(rows), (misalignment + 3) % 4),
          params(params_dtype, flat_numel(rows), (misalignment * 3) % 4) {
        for (Buffer* buffer : all()) buffer->fill(nan);
        Random random(7);
        for (const Segment& row : rows) {
            for (std::int64_t i = row.offset; i < row.offset + row.numel; ++i) {
                master.set(i, random.uniform(-1, 1));
                exp_avg.set(i, 0.0f);
                exp_avg_sq.set(i, 0.0f);
            }
        }
    }

    std::vector<Buffer*> all() { return {&grads, &master, &exp_avg, &exp_avg_sq, &params}; }

    void new_grads(const std::vector<Segment>& rows, std::int64_t step, float scale = 1.0f) {
        Random random(static_cast<std::uint32_t>(100 + step));
        for (const Segment& row : rows) {
            for (std::int64_t i = row.offset; i < row.offset + row.numel; ++i)
                grads.set(i, random.uniform(-2, 2) * scale);
        }
    }

    AdamBuffers spans() {
        return {grads.span(), master.span(), exp_avg.span(), exp_avg_sq.span(), params.span(), nullptr};
    }
    // The part [begin, end) as a shard of its own.
    AdamBuffers spans(std::int64_t begin, std::int64_t end) {
        AdamBuffers b = spans();
        for (Span* s : {&b.grads, &b.master, &b.exp_avg, &b.exp_avg_sq, &b.params}) *s = s->part(begin, end - begin);
        return b;
    }
};

void expect_identical(Shard& actual, Shard& expected) {
    for (std::size_t i = 0; i < actual.all().size(); ++i) {
        EXPECT_TRUE(same(*actual.all()[i], *expected.all()[i])) << "buffer " << i;
    }
}

std::vector<Segment> clipped(const std::vector<Segment>& rows, std::int64_t begin, std::int64_t end) {
    std::vector<Segment> result;
    for (const Segment& row : rows) {
        const std::int64_t from = std::max(row.offset, begin), to = std::min(row.offset + row.numel, end);
        if (from < to) result.push_back({from - begin, to - from, row.group});
    }
    return result;
}

// One element as the papers write it down.
struct PlainAdam {
    double weight = 0, m = 0, v = 0;

    void step(double grad, const AdamGroup& g, std::int64_t step) {
        if (!g.decoupled) grad += g.weight_decay * weight;
        m = g.beta1 * m + (1 - g.beta1) * grad;
        v = g.beta2 * v + (1 - g.beta2) * grad * grad;
        const auto correction = [&](double beta) {
            return g.bias_correction ? 1 - std::pow(beta, static_cast<double>(step)) : 1.0;
        };
        const double m_hat = m / correction(g.beta1);
        const double v_hat = v / correction(g.beta2);
        if (g.decoupled) weight -= g.lr * g.weight_decay * weight;
        weight -= g.lr * m_hat / (std::sqrt(v_hat) + g.eps);
    }
};

class AdamTypes : public ::testing::TestWithParam<std::tuple<DType, DType>> {
  protected:
    DType grads = std::get<0>(GetParam());
    DType params = std::get<1>(GetParam());
};

TEST_P(AdamTypes, FollowsThePapersForTenSteps) {
    const auto rows = layout({1, 15, 16, 17, 31, 33, 0, 200});
    constexpr float grad_scale = 0.375f;
    for (std::int64_t misalignment = 0; misalignment < 4; ++misalignment) {
        Shard shard(rows, grads, params, misalignment);
        const Shard before = shard;
        std::vector<PlainAdam> plain(static_cast<std::size_t>(flat_numel(rows)));
        for (std::size_t i = 0; i < plain.size(); ++i) plain[i].weight = shard.master.at(static_cast<std::int64_t>(i));
        for (std::int64_t step = 1; step <= 10; ++step) {
            shard.new_grads(rows, step);
            const StepControl control = control_of(step, grad_scale);
            adam(shard.spans(), Segments(rows), groups, &control, 1);
            Buffer master = before.master, rounded = before.params;  // with the padding as it was
            for (const Segment& row : rows) {
                for (std::int64_t i = row.offset; i < row.offset + row.numel; ++i) {
                    PlainAdam& p = plain[static_cast<std::size_t>(i)];
                    p.step(double{shard.grads.at(i)} * grad_scale, groups[static_cast<std::size_t>(row.group)], step);
                    ASSERT_NEAR(shard.exp_avg.at(i), p.m, 1e-6) << "element " << i << ", step " << step;
                    ASSERT_NEAR(shard.exp_avg_sq.at(i), p.v, 1e-6) << "element " << i << ", step " << step;
                    ASSERT_NEAR(shard.master.at(i), p.weight, 2e-6) << "element " << i << ", step " << step;
                    master.set(i, shard.master.at(i));
                    rounded.set_bits(i, encode_weight(params, shard.master.at(i)));
                }
            }
            EXPECT_TRUE(same(shard.master, master)) << "padding";
            EXPECT_TRUE(same(shard.params, rounded)) << "the parameters are the master weights, rounded";
        }
    }
}

TEST_P(AdamTypes, EveryLevelGivesTheBitsOfTheScalarLevel) {
    const AdamFactors factors{0.3f, 0.01f, 0.999f, 0.1f, 0.999f, 0.001f, 1.7f, 1e-8f, 0.02f};
    Random random;
    for (std::int64_t numel = 0; numel < 70; ++numel) {
        for (const bool with_params : {true, false}) {
            Shard start({{0, numel, 0}}, grads, params, numel % 4);
            for (std::int64_t i = 0; i < numel; ++i) {
                start.grads.set(i, random.wide());
                start.exp_avg.set(i, random.wide());
                start.exp_avg_sq.set(i, std::fabs(random.wide()) * (i % 5 == 0 ? 1e-38f : 1.0f));
            }
            const auto run = [&](CpuLevel level) {
                Shard result = start;
                const AdamBuffers b = result.spans();
                const auto floats = [](Span span) { return static_cast<float*>(span.data); };
                kernels(level).adam[index(grads)][index(params)](
                    {b.grads.data, floats(b.master), floats(b.exp_avg), floats(b.exp_avg_sq),
                     with_params ? b.params.data : nullptr, nullptr, numel},
                    factors);
                return result;
            };
            Shard expected = run(CpuLevel::scalar);
            for (const CpuLevel level : levels()) {
                SCOPED_TRACE(::testing::Message() << name_of(level) << ", numel " << numel);
                Shard actual = run(level);
                expect_identical(actual, expected);
            }
        }
    }
}

TEST_P(AdamTypes, ShardsAndThreadsGiveTheBitsOfTheWhole) {
    const auto rows = layout({1, 15, 33, 1000, 40000, 7});
    const std::int64_t numel = flat_numel(rows);
    Shard whole(rows, grads, params), threads = whole, shards = whole;
    for (std::int64_t step = 1; step <= 2; ++step) {
        const StepControl control = control_of(step, 0.5f);
        for (Shard* s : {&whole, &threads, &shards}) s->new_grads(rows, step);
        adam(whole.spans(), Segments(rows), groups, &control, 1);
        adam(threads.spans(), Segments(rows), groups, &control, 2);
        const std::int64_t cuts[] = {0, 1, 3, 20, 1041, 17003, 41050, numel};
        for (std::size_t i = 0; i + 1 < std::size(cuts); ++i) {
            adam(shards.spans(cuts[i], cuts[i + 1]), Segments(clipped(rows, cuts[i], cuts[i + 1])), groups, &control,
                 1);
        }
        expect_identical(threads, whole);
        expect_identical(shards, whole);
    }
}

TEST_P(AdamTypes, ASkippedStepLeavesEveryByte) {
    const auto rows = layout({33, 1000});
    Shard shard(rows, grads, params), before = shard;
    const StepControl control = control_of(1, nan, true);
    adam(shard.spans(), Segments(rows), groups, &control, 1);
    for (std::size_t i = 0; i < shard.all().size(); ++i) EXPECT_EQ(shard.all()[i]->bytes(), before.all()[i]->bytes());
}

INSTANTIATE_TEST_SUITE_P(DTypes, AdamTypes,
                         ::testing::Combine(::testing::ValuesIn(all_dtypes), ::testing::ValuesIn(all_dtypes)),
                         pair_name);

TEST(Adam, APowerOfTwoInGradsAndScaleCancels) {
    const auto rows = layout({33, 100});
    Shard plain(rows, DType::f16, DType::bf16), scaled = plain;
    plain.new_grads(rows, 1);
    scaled.new_grads(rows, 1, 1024.0f);
    const StepControl one = control_of(1), inverse = control_of(1, 0x1p-10f);
    adam(plain.spans(), Segments(rows), groups, &one, 1);
    adam(scaled.spans(), Segments(rows), groups, &inverse, 1);
    scaled.grads = plain.grads;
    expect_identical(scaled, plain);
}

TEST(Adam, AGroupThatWaitedCountsItsOwnSteps) {
    const auto rows = layout({33, 100, 7});
    Shard late(rows, DType::f32, DType::bf16), early = late;
    std::vector<AdamGroup> waited = groups;
    for (AdamGroup& group : waited) group.waited = 40;
    for (std::int64_t step = 1; step <= 3; ++step) {
        for (Shard* s : {&late, &early}) s->new_grads(rows, step);
        const StepControl now = control_of(step), then = control_of(step + 40);
        adam(early.spans(), Segments(rows), groups, &now, 1);
        adam(late.spans(), Segments(rows), waited, &then, 1);
        expect_identical(late, early);
    }
    const StepControl too_early = control_of(40);
    EXPECT_THROW(adam(late.spans(), Segments(rows), waited, &too_early, 1), std::invalid_argument);
}

TEST(Adam, WithoutParamsTheMasterIsTheParameter) {
    const auto rows = layout({33});
    Shard with(rows, DType::bf16, DType::f16), without = with;
    for (Shard* s : {&with, &without}) s->new_grads(rows, 1);
    AdamBuffers spans = without.spans();
    spans.params = Span{};
    const StepControl control = control_of(1);
    adam(with.spans(), Segments(rows), groups, &control, 1);
    adam(spans, Segments(rows), groups, &control, 1);
    EXPECT_TRUE(same(without.master, with.master));
    EXPECT_TRUE(same(without.params, Shard(rows, DType::bf16, DType::f16).params));
}

// Masters that are split into bf16 parameters and 16 bits beside them.
struct SplitShard {
    Shard shard;
    std::vector<std::uint16_t> remainder;

    explicit SplitShard(const Shard& whole)
        : shard(whole), remainder(static_cast<std::size_t>(whole.master.numel()), 0x55aa) {
        split_master(shard.params.span(), remainder.data(), shard.master.span(), 1);
    }

    AdamBuffers spans() {
        AdamBuffers b = shard.spans();
        b.master = Span{};
        b.remainder = remainder.data();
        return b;
    }

    Buffer joined() {
        Buffer result = shard.master;
        join_master(result.span(), shard.params.span(), remainder.data(), 1);
        return result;
    }
};

class SplitAdam : public ::testing::TestWithParam<DType> {};

TEST_P(SplitAdam, AThousandStepsGiveTheBitsOfWholeMasters) {
    const auto rows = layout({1, 15, 16, 33, 0, 700});
    Shard whole(rows, GetParam(), DType::bf16, 1);
    SplitShard split(whole);
    split_master(whole.params.span(), nullptr, whole.master.span(), 1);
    Random random(3);
    for (std::int64_t step = 1; step <= 1000; ++step) {
        const StepControl control = control_of(step, random.uniform(0.1f, 1.0f), step % 50 == 7);
        whole.new_grads(rows, step);
        split.shard.grads = whole.grads;
        adam(whole.spans(), Segments(rows), groups, &control, 1);
        adam(split.spans(), Segments(rows), groups, &control, 2);
        ASSERT_TRUE(same(split.shard.params, whole.params)) << "step " << step;
    }
    EXPECT_TRUE(same(split.joined(), whole.master));
    EXPECT_TRUE(same(split.shard.exp_avg, whole.exp_avg));
    EXPECT_TRUE(same(split.shard.exp_avg_sq, whole.exp_avg_sq));
}

TEST_P(SplitAdam, EveryLevelGivesTheBitsOfWholeMasters) {
    const AdamFactors factors{0.3f, 0.01f, 0.999f, 0.1f, 0.999f, 0.001f, 1.7f, 1e-8f, 0.02f};
    Random random;
    for (std::int64_t numel = 0; numel < 70; ++numel) {
        Shard start({{0, numel, 0}}, GetParam(), DType::bf16, numel % 4);
        for (std::int64_t i = 0; i < numel; ++i) {
            start.grads.set(i, random.wide());
            start.master.set_bits(i, i % 3 == 0 ? random.bits() & 0xbfffffffu : float_bits(random.wide()));
        }
        for (const CpuLevel level : levels()) {
            SCOPED_TRACE(::testing::Message() << name_of(level) << ", numel " << numel);
            Shard whole = start;
            SplitShard split(start);
            const auto floats = [](Span span) { return static_cast<float*>(span.data); };
            const AdamBuffers w = whole.spans(), s = split.spans();
            kernels(level).adam[index(GetParam())][index(DType::bf16)](
                {w.grads.data, floats(w.master), floats(w.exp_avg), floats(w.exp_avg_sq), w.params.data, nullptr,
                 numel},
                factors);
            kernels(level).split_adam[index(GetParam())](
                {s.grads.data, nullptr, floats(s.exp_avg), floats(s.exp_avg_sq), s.params.data, s.remainder, numel},
                factors);
            EXPECT_TRUE(same(split.shard.params, whole.params));
            EXPECT_TRUE(same(split.shard.exp_avg, whole.exp_avg));
            EXPECT_TRUE(same(split.shard.exp_avg_sq, whole.exp_avg_sq));
            EXPECT_TRUE(same(split.joined(), whole.master));
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Grads, SplitAdam, ::testing::ValuesIn(all_dtypes),
                         [](const auto& dtype) { return std::string(name_of(dtype.param)); });

TEST(Adam, RefusesSplitMastersThatAreIncomplete) {
    const std::vector<Segment> rows = {{0, 10, 1}};
    const StepControl control = control_of(1);
    SplitShard split(Shard(rows, DType::f32, DType::bf16));
    const auto run = [&](Span master, Span params, std::uint16_t* remainder) {
        AdamBuffers b = split.spans();
        b.master = master;
        b.params = params;
        b.remainder = remainder;
        adam(b, Segments(rows), groups, &control, 1);
    };
    const Span params = split.shard.params.span(), none{};
    run(none, params, split.remainder.data());
    EXPECT_THROW(run(none, params, nullptr), std::invalid_argument);
    EXPECT_THROW(run(none, none, split.remainder.data()), std::invalid_argument);
    EXPECT_THROW(run(none, params.part(0, 3), split.remainder.data()), std::invalid_argument);
    EXPECT_THROW(run(split.shard.master.span(), params, split.remainder.data()), std::invalid_argument);
    Buffer half(DType::f16, params.numel);
    EXPECT_THROW(run(none, half.span(), split.remainder.data()), std::invalid_argument);
}

TEST(Adam, RefusesWhatDoesNotMatch) {
    const std::vector<Segment> rows = {{0, 10, 1}};
    Shard shard(rows, DType::f32, DType::f32);
    Buffer small(DType::f32, 3), half(DType::f16, flat_numel(rows));
    const StepControl control = control_of(1);
    const auto refuses = [&](Span AdamBuffers::* field, Span span) {
        AdamBuffers b = shard.spans();
        b.*field = span;
        EXPECT_THROW(adam(b, Segments(rows), groups, &control, 1), std::invalid_argument);
    };
    for (const auto field : {&AdamBuffers::grads, &AdamBuffers::master, &AdamBuffers::exp_avg, &AdamBuffers::exp_avg_sq,
                             &AdamBuffers::params}) {
        refuses(field, small.span());
    }
    for (const auto field : {&AdamBuffers::master, &AdamBuffers::exp_avg, &AdamBuffers::exp_avg_sq}) {
        refuses(field, half.span());
    }
    EXPECT_THROW(adam(shard.spans(), Segments(rows), {groups[0]}, &control, 1), std::invalid_argument);
    EXPECT_THROW(adam(shard.spans(), Segments({{0, 100, 0}}), groups, &control, 1), std::invalid_argument);
}

}  // namespace
}  // namespace partita
