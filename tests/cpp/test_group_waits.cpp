// Who was waited for: times are compared with each other only.
#include <algorithm>

#include "group_support.h"

namespace partita {
namespace {

constexpr auto late = 100ms;

// Whom a rank was held up by longest.
int slowest_for(const Group& group) {
    const auto waited = group.waited_ns();
    return static_cast<int>(std::max_element(waited.begin(), waited.end()) - waited.begin());
}

std::int64_t in_all(const Group& group) {
    std::int64_t sum = 0;
    for (const std::int64_t ns : group.waited_ns()) sum += ns;
    return sum;
}

TEST(GroupThreadsWaits, TheRankThatComesLastIsWaitedFor) {
    for (int slow = 0; slow < 3; ++slow) {
        for (const std::int64_t numel : {std::int64_t{3}, large}) {  // one that the caller executes, one for the thread
            ThreadRanks ranks(3);
            ranks.run([&](int rank, Group& group) {
                // The one before the last comes late as well: nobody has lost that time to it.
                if (rank == slow) std::this_thread::sleep_for(late);
                if (rank == (slow + 1) % 3) std::this_thread::sleep_for(late / 2);
                CollectiveBuffer buffer(group, all_reduce_of(numel), values_of(all_reduce_of(numel), rank, 1),
                                        Place::in_place);
                group.wait(*group.launch(all_reduce_of(numel), buffer.data()));
            });
            for (int rank = 0; rank < 3; ++rank) {
                EXPECT_EQ(ranks.group(rank).waited_ns().size(), 3);
                if (rank == slow) continue;
                EXPECT_EQ(slowest_for(ranks.group(rank)), slow) << numel;
                EXPECT_GT(in_all(ranks.group(rank)), in_all(ranks.group(slow))) << numel;
            }
        }
    }
}

TEST(GroupThreadsWaits, NoTimeIsCountedTwice) {
    ThreadRanks ranks(3);
    const auto begin = std::chrono::steady_clock::now();
    ranks.run([&](int rank, Group& group) {
        for (int round = 0; round < 6; ++round) {
            if (rank == round % 3) std::this_thread::sleep_for(late / 10);
            CollectiveBuffer buffer(group, all_reduce_of(large), Bytes(4 * large), Place::in_place);
            CollectiveBuffer other(group, all_reduce_of(1), Bytes(4), Place::in_place);
            const auto one = group.launch(all_reduce_of(large), buffer.data());
            const auto two = group.launch(all_reduce_of(1), other.data());
            group.wait(*two);
            group.wait(*one);
        }
    });
    const std::int64_t elapsed = (std::chrono::steady_clock::now() - begin).count();
    for (int rank = 0; rank < 3; ++rank) {
        EXPECT_GT(in_all(ranks.group(rank)), 0);
        EXPECT_LE(in_all(ranks.group(rank)), elapsed);
    }
}

TEST(GroupThreadsWaits, WhatTheThreadWaitsForBesideTheProgramIsNotLost) {
    ThreadRanks ranks(2);
    ranks.run([&](int rank, Group& group) {
        if (rank == 1) std::this_thread::sleep_for(late);
        CollectiveBuffer buffer(group, all_reduce_of(large), Bytes(4 * large), Place::in_place);
        const auto operation = group.launch(all_reduce_of(large), buffer.data());
        if (rank == 0) std::this_thread::sleep_for(3 * late);  // the program computes
        group.wait(*operation);
    });
    EXPECT_LT(in_all(ranks.group(0)), std::chrono::nanoseconds(late).count() / 2);
    EXPECT_EQ(slowest_for(ranks.group(1)), 0) << "rank 0 does not compute anything, and yet the collective is done";
}

TEST(GroupThreadsWaits, AMessageWaitsForItsSenderAndItsReceiver) {
    ThreadRanks ranks(3);
    ranks.run([&](int rank, Group& group) {
        CollectiveBuffer buffer(group, message_of(Element::f32, large), Bytes(4 * large), Place::in_place);
        if (rank == 0) {
            std::this_thread::sleep_for(late);
            group.wait(*group.send(buffer.data(), Element::f32, large, 1));
        } else if (rank == 1) {
            group.wait(*group.receive(buffer.data(), Element::f32, large, 0));
            std::this_thread::sleep_for(late);
            group.wait(*group.receive(buffer.data(), Element::f32, large, 2));
        } else {
            group.wait(*group.send(buffer.data(), Element::f32, large, 1));
        }
    });
    EXPECT_EQ(slowest_for(ranks.group(1)), 0);
    EXPECT_EQ(slowest_for(ranks.group(2)), 1);
    EXPECT_EQ(ranks.group(1).waited_ns()[2], 0);
}

}  // namespace
}  // namespace partita
