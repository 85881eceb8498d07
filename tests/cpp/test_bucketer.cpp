// Which units are launched when, for every order in which gradients can arrive.
#include <map>
#include <numeric>
#include <stdexcept>

#include "partita/bucketer.h"
#include "support.h"

namespace partita {

void PrintTo(const Bucketer::Range& range, std::ostream* out) {
    *out << "[" << range.begin << ", " << range.end << ")";
}
bool operator==(const Bucketer::Range& a, const Bucketer::Range& b) { return a.begin == b.begin && a.end == b.end; }

namespace {

using Range = Bucketer::Range;
using Ids = std::vector<std::int32_t>;

// One backward in which the parameters are accumulated in this order.
void backward(Bucketer& bucketer, const Ids& order) {
    bucketer.begin_backward(true);
    for (const std::int32_t p : order) bucketer.mark_ready(p);
    bucketer.finish();
}

// The rule, worked out afresh after each arrival: how many units from the first on have had all they expect.
std::int32_t complete_units(const Ids& unit_of, std::int32_t units, const Ids& expected, const Ids& seen) {
    std::int32_t complete = units;
    for (std::size_t p = 0; p < unit_of.size(); ++p) {
        if (seen[p] < expected[p]) complete = std::min(complete, unit_of[p]);
    }
    return complete;
}

// Checks one overlapped backward against the rule, and that units are launched once each and in order.
void check_backward(Bucketer& bucketer, const Ids& unit_of, std::int32_t units, const Ids& expected, const Ids& order) {
    Ids seen(unit_of.size(), 0);
    std::int32_t launched = 0;
    bucketer.begin_backward(true);
    for (const std::int32_t p : order) {
        ++seen[static_cast<std::size_t>(p)];
        const std::int32_t now = complete_units(unit_of, units, expected, seen);
        ASSERT_EQ(bucketer.mark_ready(p), (Range{launched, now}));
        launched = now;
    }
    ASSERT_EQ(bucketer.finish(), (Range{launched, units}));
}

TEST(Bucketer, LaunchesInOrderWhateverArrivesFirst) {
    const std::vector<std::pair<Ids, std::int32_t>> cases = {{{0, 1, 2}, 3},       {{0, 0, 1, 1, 2}, 3},
                                                             {{1, 0, 1, 0, 2}, 3}, {{2, 1, 0, 0}, 3},
                                                             {{0, 0, 0}, 1},       {{3, 1, 3, 1}, 5}};
    for (const auto& [unit_of, units] : cases) {
        Ids order(unit_of.size());
        std::iota(order.begin(), order.end(), 0);
        Bucketer bucketer(unit_of, units);
        backward(bucketer, order);
        do {
            check_backward(bucketer, unit_of, units, Ids(unit_of.size(), 1), order);
            if (HasFatalFailure()) return;
        } while (std::next_permutation(order.begin(), order.end()));
    }
}

// Parameters 0 and 2 are accumulated twice and three times: each distinct order of the seven events.
TEST(Bucketer, WaitsForEveryAccumulationItHasLearned) {
    const Ids unit_of = {0, 0, 1, 1}, expected = {2, 1, 3, 1};
    Ids events = {0, 0, 1, 2, 2, 2, 3};
    Bucketer bucketer(unit_of, 2);
    backward(bucketer, events);
    do {
        check_backward(bucketer, unit_of, 2, expected, events);
        if (HasFatalFailure()) return;
    } while (std::next_permutation(events.begin(), events.end()));
}

TEST(Bucketer, TheFirstBackwardTakesWhatComesAfterALaunch) {
    const Ids unit_of = {0, 1};
    Bucketer bucketer(unit_of, 2);
    bucketer.begin_backward(true);
    EXPECT_FALSE(bucketer.was_launched(0));
    EXPECT_EQ(bucketer.mark_ready(0), (Range{0, 1}));
    EXPECT_TRUE(bucketer.was_launched(0));
    EXPECT_EQ(bucketer.mark_ready(0), (Range{1, 1}));
    EXPECT_FALSE(bucketer.was_launched(1));
    EXPECT_EQ(bucketer.finish(), (Range{1, 2}));
    check_backward(bucketer, unit_of, 2, {2, 1}, {0, 1, 0});  // and waits for it from then on
}

TEST(Bucketer, WithoutOverlapNothingIsLaunchedBeforeTheEnd) {
    Bucketer bucketer({0, 1}, 2);
    for (int i = 0; i < 3; ++i) {
        bucketer.begin_backward(false);
        for (const std::int32_t p : {0, 1}) EXPECT_EQ(bucketer.mark_ready(p), (Range{0, 0}));
        EXPECT_EQ(bucketer.finish(), (Range{0, 2}));
    }
    check_backward(bucketer, {0, 1}, 2, {1, 1}, {1, 0});  // and counting has been learned all the same
}

TEST(Bucketer, ItLearnsFromABackwardWithoutOverlap) {
    Bucketer bucketer({0, 1}, 2);
    backward(bucketer, {0, 1});
    bucketer.begin_backward(false);
    for (const std::int32_t p : {0, 0, 1}) bucketer.mark_ready(p);
    bucketer.finish();
    check_backward(bucketer, {0, 1}, 2, {2, 1}, {0, 1, 0});
    check_backward(bucketer, {0, 1}, 2, {2, 1}, {0, 1});  // fewer than ever before: the rest at the end
}

TEST(Bucketer, AnUnusedParameterHoldsItsUnitUntilTheEnd) {
    const Ids unit_of = {0, 1, 1, 2};
    Bucketer bucketer(unit_of, 3);
    backward(bucketer, {0, 2, 3});
    check_backward(bucketer, unit_of, 3, {1, 1, 1, 1}, {0, 2, 3});
    check_backward(bucketer, unit_of, 3, {1, 1, 1, 1}, {3, 2, 0, 1});  // used for the first time
    check_backward(bucketer, unit_of, 3, {1, 1, 1, 1}, {0, 2, 3});     // and not again
    check_backward(bucketer, unit_of, 3, {1, 1, 1, 1}, {});
}

TEST(Bucketer, AnAccumulationAfterTheLaunchThrows) {
    Bucketer bucketer({0, 1}, 2);
    backward(bucketer, {0, 1});
    bucketer.begin_backward(true);
    EXPECT_EQ(bucketer.mark_ready(0), (Range{0, 1}));
    EXPECT_THROW(bucketer.mark_ready(0), std::logic_error);
    EXPECT_EQ(bucketer.mark_ready(1), (Range{1, 2}));
    EXPECT_EQ(bucketer.finish(), (Range{2, 2}));
}

// More accumulations than learned are no error while the unit still waits for another parameter, and are learned.
TEST(Bucketer, AnExtraAccumulationBeforeTheLaunchIsLearned) {
    Bucketer bucketer({0, 0}, 1);
    backward(bucketer, {0, 1});
    check_backward(bucketer, {0, 0}, 1, {1, 1}, {0, 0, 1});
    check_backward(bucketer, {0, 0}, 1, {2, 1}, {0, 1, 0});
}

TEST(Bucketer, UnitsWithoutParametersGoWithTheirNeighbours) {
    Bucketer bucketer({1, 3}, 5);
    backward(bucketer, {0, 1});
    bucketer.begin_backward(true);
    EXPECT_EQ(bucketer.mark_ready(0), (Range{0, 3}));
    EXPECT_EQ(bucketer.mark_ready(1), (Range{3, 5}));
    EXPECT_EQ(bucketer.finish(), (Range{5, 5}));
    Bucketer empty({}, 0);
    empty.begin_backward(true);
    EXPECT_EQ(empty.finish(), (Range{0, 0}));
}

TEST(Bucketer, MisuseThrows) {
    EXPECT_THROW(Bucketer({0, 2}, 2), std::invalid_argument);
    EXPECT_THROW(Bucketer({-1}, 2), std::invalid_argument);
    EXPECT_THROW(Bucketer({0}, 0), std::invalid_argument);
    EXPECT_THROW(Bucketer({}, -1), std::invalid_argument);
    Bucketer bucketer({0}, 1);
    EXPECT_FALSE(bucketer.in_backward());
    EXPECT_THROW(bucketer.mark_ready(0), std::logic_error);
    EXPECT_THROW(bucketer.finish(), std::logic_error);
    bucketer.begin_backward(true);
    EXPECT_TRUE(bucketer.in_backward());
    EXPECT_THROW(bucketer.begin_backward(true), std::logic_error);
    EXPECT_THROW(bucketer.mark_ready(1), std::out_of_range);
    EXPECT_THROW(bucketer.mark_ready(-1), std::out_of_range);
    bucketer.finish();
    EXPECT_FALSE(bucketer.in_backward());
    EXPECT_THROW(bucketer.finish(), std::logic_error);
}

TEST(Bucketer, AUnitIsCompleteBeforeItsTurn) {
    Bucketer bucketer({0, 1, 1}, 2);
    for (const bool overlap : {false, true}) {
        bucketer.begin_backward(overlap);
        EXPECT_FALSE(bucketer.is_complete(1));
        bucketer.mark_ready(1);
        EXPECT_FALSE(bucketer.is_complete(2));
        const Bucketer::Range none = bucketer.mark_ready(2);
        EXPECT_EQ(none.begin, none.end);
        EXPECT_TRUE(bucketer.is_complete(1));
        EXPECT_TRUE(bucketer.is_complete(2));
        EXPECT_FALSE(bucketer.is_complete(0));
        bucketer.mark_ready(0);
        EXPECT_TRUE(bucketer.is_complete(0));
        bucketer.finish();
    }
}

}  // namespace
}  // namespace partita
