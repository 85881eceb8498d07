// reduce against a plain loop: fp32 in the order of the sources, rounded once.
#include <stdexcept>
#include <tuple>

#include "partita/reduce.h"
#include "simd/kernels.h"
#include "support.h"

namespace partita {
namespace {

constexpr std::int64_t sizes[] = {0, 1, 15, 16, 17, 63, 64, 65, 1000, 100003};
constexpr int source_counts[] = {1, 2, 3, 5, 8};

class Reductions : public ::testing::TestWithParam<std::tuple<DType, Reduction>> {
  protected:
    DType dtype = std::get<0>(GetParam());
    Reduction reduction = std::get<1>(GetParam());
    Random random;

    // `count` buffers, each at another misalignment.
    std::vector<Buffer> make_sources(int count, std::int64_t numel) {
        std::vector<Buffer> sources;
        for (int s = 0; s < count; ++s) {
            sources.emplace_back(dtype, numel, (s * 3 + 1) % 8);
            random.fill_wild(sources.back());
        }
        return sources;
    }

    // Writes into `to`, which keeps its guards.
    void plain_reduce(Buffer& to, const std::vector<Buffer>& sources) const {
        const float factor = 1.0f / static_cast<float>(sources.size());
        for (std::int64_t i = 0; i < to.numel(); ++i) {
            float value = sources[0].at(i);
            for (std::size_t s = 1; s < sources.size(); ++s) {
                const float other = sources[s].at(i);
                if (reduction != Reduction::max) {
                    value += other;
                } else if (!std::isnan(value) && !(value > other)) {
                    value = other;  // of two equal ones (zeros of either sign) the later
                }
            }
            to.set(i, reduction == Reduction::average ? value * factor : value);
        }
    }

    Kernels::Reduce kernel(CpuLevel level) const {
        return reduction == Reduction::max ? kernels(level).max[index(dtype)] : kernels(level).sum[index(dtype)];
    }
};

std::vector<const void*> pointers(std::vector<Buffer>& buffers) {
    std::vector<const void*> result;
    for (Buffer& buffer : buffers) result.push_back(buffer.span().data);
    return result;
}

TEST_P(Reductions, AnyCountSizeAndAlignment) {
    for (const int count : source_counts) {
        for (const std::int64_t numel : sizes) {
            SCOPED_TRACE(::testing::Message() << count << " sources of " << numel);
            std::vector<Buffer> sources = make_sources(count, numel);
            const std::vector<Buffer> before = sources;
            Buffer expected(dtype, numel, 5), one = expected, two = expected;
            plain_reduce(expected, sources);
            reduce(one.span(), pointers(sources).data(), count, reduction, 1);
            EXPECT_TRUE(same(one, expected));
            reduce(two.span(), pointers(sources).data(), count, reduction, 2);
            EXPECT_EQ(two.bytes(), one.bytes()) << "two threads give other bits than one";
            for (std::size_t s = 0; s < before.size(); ++s) {
                EXPECT_EQ(sources[s].bytes(), before[s].bytes()) << "source " << s << " was written";
            }
        }
    }
}

TEST_P(Reductions, IntoOneOfTheSources) {
    for (const int count : source_counts) {
        for (const std::int64_t numel : {1, 17, 65, 1000, 40001}) {
            const std::vector<Buffer> before = make_sources(count, numel);
            for (const int s : {0, count / 2, count - 1}) {
                std::vector<Buffer> sources = before;
                const auto target = static_cast<std::size_t>(s);
                Buffer expected = before[target];
                plain_reduce(expected, before);
                reduce(sources[target].span(), pointers(sources).data(), count, reduction, 2);
                EXPECT_TRUE(same(sources[target], expected)) << count << " sources of " << numel << " into " << s;
            }
        }
    }
}

TEST_P(Reductions, EveryLevelGivesTheSameBits) {
    const float factor = reduction == Reduction::average ? 1.0f / 3.0f : 1.0f;
    for (std::int64_t numel = 0; numel < 140; ++numel) {
        std::vector<Buffer> sources = make_sources(3, numel + 3);
        const Buffer before(dtype, numel, numel % 5);
        Buffer scalar = before;
        for (const CpuLevel level : levels()) {
            Buffer actual = before;
            kernel(level)(actual.span().data, pointers(sources).data(), 3, 3, numel, factor);
            if (level == CpuLevel::scalar) scalar = actual;
            EXPECT_TRUE(same(actual, scalar)) << name_of(level);
        }
    }
}

// A NaN must not be lost, whichever source has it and wherever it stands in a vector.
TEST_P(Reductions, ANaNInAnySourceIsOneInTheResult) {
    constexpr std::int64_t numel = 150;
    for (int s = 0; s < 3; ++s) {
        for (const CpuLevel level : levels()) {
            std::vector<Buffer> sources;
            for (int other = 0; other < 3; ++other) {
                sources.emplace_back(dtype, numel);
                sources.back().fill(2.0f);
            }
            for (std::int64_t i = 0; i < numel; i += 3) {
                sources[static_cast<std::size_t>(s)].set(i, std::numeric_limits<float>::quiet_NaN());
            }
            Buffer to(dtype, numel);
            kernel(level)(to.span().data, pointers(sources).data(), 3, 0, numel, 1.0f);
            for (std::int64_t i = 0; i < numel; ++i) EXPECT_EQ(std::isnan(to.at(i)), i % 3 == 0) << i;
        }
    }
}

TEST_P(Reductions, Fp64) {
    const auto plain = [&](const std::vector<std::vector<double>>& sources, std::size_t i) {
        double value = sources[0][i];
        for (std::size_t s = 1; s < sources.size(); ++s) {
            const double other = sources[s][i];
            if (reduction != Reduction::max) {
                value += other;
            } else if (std::isnan(other) || (!std::isnan(value) && other > value)) {
                value = other;
            }
        }
        return reduction == Reduction::average ? value / static_cast<double>(sources.size()) : value;
    };
    for (const int count : source_counts) {
        for (const std::int64_t numel : sizes) {
            std::vector<std::vector<double>> sources(static_cast<std::size_t>(count));
            std::vector<const double*> data;
            for (auto& source : sources) {
                for (std::int64_t i = 0; i < numel; ++i) {
                    const bool nan = random.bits() % 64 == 0;
                    source.push_back(nan ? std::nan("") : random.wide() + 0x1p-40 * random.uniform(-1.0f, 1.0f));
                }
                data.push_back(source.data());
            }
            std::vector<double> expected, actual(static_cast<std::size_t>(numel));
            for (std::size_t i = 0; i < actual.size(); ++i) expected.push_back(plain(sources, i));
            reduce(actual.data(), data.data(), count, numel, reduction);
            reduce(sources.back().data(), data.data(), count, numel, reduction);  // into one of the sources
            for (std::size_t i = 0; i < actual.size(); ++i) {
                const bool nan = std::isnan(expected[i]);
                ASSERT_TRUE(nan ? std::isnan(actual[i]) : actual[i] == expected[i]) << i << " of " << numel;
                ASSERT_TRUE(nan ? std::isnan(sources.back()[i]) : sources.back()[i] == expected[i]) << i;
            }
        }
    }
}

std::string reduction_name(const ::testing::TestParamInfo<std::tuple<DType, Reduction>>& info) {
    constexpr const char* names[] = {"sum", "average", "max"};
    return std::string(name_of(std::get<0>(info.param))) + "_" + names[static_cast<int>(std::get<1>(info.param))];
}

INSTANTIATE_TEST_SUITE_P(DTypes, Reductions,
                         ::testing::Combine(::testing::ValuesIn(all_dtypes),
                                            ::testing::Values(Reduction::sum, Reduction::average, Reduction::max)),
                         reduction_name);

// 8 ranks' small gradients that would vanish if partial sums were rounded to bf16.
TEST(Reduce, PartialSumsAreNotRounded) {
    std::vector<Buffer> sources;
    for (int s = 0; s < 8; ++s) {
        sources.emplace_back(DType::bf16, 100);
        sources.back().fill(s == 0 ? 1.0f : 0x1p-9f);
    }
    Buffer to(DType::bf16, 100);
    reduce(to.span(), pointers(sources).data(), 8, Reduction::sum, 1);
    for (std::int64_t i = 0; i < 100; ++i) EXPECT_EQ(to.at(i), 1.0f + 0x1p-6f);  // 1 + 7 * 2^-9, rounded once
}

TEST(Reduce, NeedsASource) {
    Buffer to(DType::f32, 4);
    double sum = 0;
    EXPECT_THROW(reduce(to.span(), nullptr, 0, Reduction::sum, 1), std::invalid_argument);
    EXPECT_THROW(reduce(&sum, nullptr, 0, 1, Reduction::max), std::invalid_argument);
}

}  // namespace
}  // namespace partita
