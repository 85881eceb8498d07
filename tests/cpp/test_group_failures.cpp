// Every way in which a group of threads can fail, and what its ranks are told.
#include <atomic>
#include <future>
#include <thread>

#include "group_support.h"

namespace partita {
namespace {

constexpr auto short_timeout = 300ms;

// Rank 1 calls something else than the others: all ranks say what both sides called.
void expect_disagreement(const Request& most, const Request& rank_one, int world_size = 3) {
    ThreadRanks ranks(world_size, 20s);
    std::vector<std::string> errors;
    const auto took = duration_of([&] {
        errors = ranks.errors_of([&](int rank, Group& group) {
            const Request& request = rank == 1 ? rank_one : most;
            Bytes buffer(static_cast<std::size_t>(request.bytes()));
            group.wait(*group.launch(request, buffer.data()));
        });
    });
    EXPECT_LT(took, 5s);
    for (const std::string& error : errors) {
        EXPECT_TRUE(contains(error, {describe(most), describe(rank_one), "on rank 1", "number 0"}));
    }
}

TEST(GroupThreadsFailures, DifferentCollectives) {
    expect_disagreement({Collective::all_gather, Element::f32, Reduction::sum, 0, 30}, all_reduce_of(30));
    expect_disagreement({Collective::all_gather, Element::f32, Reduction::sum, 0, 30000}, all_reduce_of(30000), 2);
    expect_disagreement(Request{}, all_reduce_of(30000));
}

TEST(GroupThreadsFailures, DifferentSizes) {
    expect_disagreement(all_reduce_of(30), all_reduce_of(31));
    expect_disagreement(all_reduce_of(30000), all_reduce_of(30), 2);  // one with and one without memory
    expect_disagreement(all_reduce_of(30000), all_reduce_of(30001));
}

TEST(GroupThreadsFailures, DifferentElementsReductionsAndRoots) {
    expect_disagreement(all_reduce_of(30), all_reduce_of(30, Element::bf16));
    expect_disagreement(all_reduce_of(30), all_reduce_of(30, Element::f32, Reduction::max));
    expect_disagreement({Collective::broadcast, Element::f32, Reduction::sum, 0, 30},
                        {Collective::broadcast, Element::f32, Reduction::sum, 1, 30});
}

// Waits until the timeout and not much longer.
TEST(GroupThreadsFailures, ARankThatNeverComes) {
    for (const std::int64_t numel : {std::int64_t{30}, large}) {
        ThreadRanks ranks(3, short_timeout);
        const auto took = duration_of([&] {
            const auto errors = ranks.errors_of([&](int rank, Group& group) {
                if (rank == 2) return;
                Bytes buffer(static_cast<std::size_t>(4 * numel));
                group.wait(*group.launch(all_reduce_of(numel), buffer.data()));
            });
            for (const int r : {0, 1}) {
                EXPECT_TRUE(contains(errors[static_cast<std::size_t>(r)],
                                     {"rank 2", "did not take part within 0.3 s", describe(all_reduce_of(numel))}));
            }
            EXPECT_EQ(errors[2], "");
        });
        EXPECT_GE(took, 290ms);
        EXPECT_LT(took, 2s);
    }
}

// A rank that launches many finds that rank 1 has stopped when the slots run out, and does not blame itself.
TEST(GroupThreadsFailures, SlotsThatNeverGetFree) {
    ThreadRanks ranks(2, short_timeout);
    const auto errors = ranks.errors_of([&](int rank, Group& group) {
        if (rank == 1) return;
        std::vector<std::shared_ptr<Operation>> operations;
        Bytes buffer(100);
        for (std::uint32_t i = 0; i <= slots_per_rank; ++i) {
            operations.push_back(group.launch(all_reduce_of(20), buffer.data()));
        }
    });
    EXPECT_TRUE(contains(errors[0], {"rank 1", "did not take part", "all_reduce (sum) of 20 f32"}));
}

TEST(GroupThreadsFailures, ARankThatClosesIsNoticedAtOnce) {
    for (const std::int64_t numel : {std::int64_t{30}, large}) {
        ThreadRanks ranks(3, 20s);
        const auto took = duration_of([&] {
            const auto errors = ranks.errors_of([&](int rank, Group& group) {
                group.barrier();
                if (rank == 1) {
                    std::this_thread::sleep_for(50ms);
                    return group.close();
                }
                Bytes buffer(static_cast<std::size_t>(4 * numel));
                group.wait(*group.launch(all_reduce_of(numel), buffer.data()));
            });
            for (const int r : {0, 2}) {
                EXPECT_TRUE(contains(errors[static_cast<std::size_t>(r)],
                                     {"rank 1", "has left the group", describe(all_reduce_of(numel))}));
            }
        });
        EXPECT_LT(took, 2s);
    }
}

// What a rank did before it left still counts for the others.
TEST(GroupThreadsFailures, ARankMayLeaveRightAfterItsLastCollective) {
    for (int round = 0; round < 20; ++round) {
        ThreadRanks ranks(3, 20s);
        ranks.run([&](int rank, Group& group) {
            const Request request = all_reduce_of(large);
            Bytes buffer = values_of(request, rank, 1);
            group.wait(*group.launch(request, buffer.data()));
            EXPECT_EQ(buffer, plain_result(request, all_values(request, 3, 1), rank));
            group.close();
        });
    }
}

TEST(GroupThreadsFailures, EveryFurtherCallSaysTheSame) {
    ThreadRanks ranks(2, short_timeout);
    Group& group = ranks.group(0);
    Bytes one(40), two(40), three(4 * large);
    const auto first = group.launch(all_reduce_of(10), one.data());
    const auto second = group.launch(all_reduce_of(10), two.data());
    const auto third = group.launch(all_reduce_of(large), three.data());
    const auto sent = group.send(one.data(), Element::byte, 10, 1);
    const auto received = group.receive(two.data(), Element::byte, 10, 1);
    const std::string text = error_of([&] { group.wait(*first); });
    EXPECT_TRUE(contains(text, {"rank 1", "did not take part"}));
    const auto took = duration_of([&] {
        for (int i = 0; i < 2; ++i) {
            EXPECT_EQ(error_of([&] { group.wait(*first); }), text);
            EXPECT_EQ(error_of([&] { group.wait(*second); }), text);
            EXPECT_EQ(error_of([&] { group.wait(*third); }), text);
            EXPECT_EQ(error_of([&] { group.wait(*received); }), text);
            EXPECT_EQ(error_of([&] { group.barrier(); }), text);
            EXPECT_EQ(error_of([&] { group.launch(all_reduce_of(large), three.data()); }), text);
            EXPECT_EQ(error_of([&] { group.send(one.data(), Element::byte, 10, 1); }), text);
            EXPECT_EQ(error_of([&] { group.receive(one.data(), Element::byte, 10, 1); }), text);
        }
    });
    EXPECT_LT(took, 200ms);
    // The peer that comes too late learns why.
    const auto late = duration_of([&] {
        EXPECT_TRUE(contains(error_of([&] {
                                 for (int i = 0; i < 3; ++i) ranks.group(1).barrier();
                             }),
                             {"barrier"}));
    });
    EXPECT_LT(late, 200ms);
    ASSERT_NE(group.allocate(100), nullptr) << "memory is not part of what failed";
}

// Rank 2 waits for rank 0, which gave up because rank 1 left: it hears about rank 1.
TEST(GroupThreadsFailures, TheReasonIsPassedOn) {
    ThreadRanks ranks(3, 20s);
    const auto errors = ranks.errors_of([&](int rank, Group& group) {
        char byte = 0;
        if (rank == 1) return group.close();
        group.wait(*group.receive(&byte, Element::byte, 1, rank == 0 ? 1 : 0));
    });
    EXPECT_TRUE(contains(errors[0], {"receive from rank 1", "rank 1", "has left the group"}));
    EXPECT_TRUE(contains(errors[2], {"receive from rank 0", "rank 0 gave up: " + errors[0]}));
}

TEST(GroupThreadsFailures, UseAfterClose) {
    ThreadRanks ranks(2, 20s);
    Group& group = ranks.group(0);
    const auto memory = group.allocate(4 * large);
    char byte = 0;
    const auto pending = group.launch(all_reduce_of(large), memory->data());
    const auto small = group.launch(all_reduce_of(1), memory->data());
    const auto received = group.receive(&byte, Element::byte, 1, 1);
    EXPECT_LT(duration_of([&] { group.close(); }), 2s);
    group.close();
    for (int i = 0; i < 2; ++i) {
        EXPECT_TRUE(contains(error_of([&] { group.barrier(); }), {"rank 0", "closed"}));
        EXPECT_TRUE(contains(error_of([&] { group.wait(*pending); }), {"closed"}));
        EXPECT_TRUE(contains(error_of([&] { group.wait(*small); }), {"closed"}));
        EXPECT_TRUE(contains(error_of([&] { group.wait(*received); }), {"closed"}));
        EXPECT_TRUE(contains(error_of([&] { group.send(&byte, Element::byte, 1, 1); }), {"closed"}));
        EXPECT_TRUE(contains(error_of([&] { group.receive(&byte, Element::byte, 1, 1); }), {"closed"}));
    }
    memory->data()[4 * large - 1] = 1;  // memory stays valid, also after the group
    ranks.destroy(0);
    memory->data()[0] = 1;
    EXPECT_TRUE(contains(error_of([&] { ranks.group(1).barrier(); }), {"rank 0"}));
}

// A thread that waits in a collective when another closes the group comes back.
TEST(GroupThreadsFailures, CloseWakesAThreadThatWaits) {
    for (const std::int64_t numel : {std::int64_t{10}, large}) {
        ThreadRanks ranks(2, 20s);
        Group& group = ranks.group(0);
        Bytes buffer(static_cast<std::size_t>(4 * numel));
        auto waiting = std::async(std::launch::async, [&] {
            return error_of([&] { group.wait(*group.launch(all_reduce_of(numel), buffer.data())); });
        });
        std::this_thread::sleep_for(50ms);
        const auto took = duration_of([&] {
            group.close();
            EXPECT_TRUE(contains(waiting.get(), {"rank 0", "closed"}));
        });
        EXPECT_LT(took, 2s);
    }
}

// What the sender still had under way can be read after it has left.
TEST(GroupThreadsFailures, SendsOutliveTheirSender) {
    ThreadRanks ranks(2, 20s);
    const Request request = message_of(Element::f32, large);
    for (const Place place : {Place::in_place, Place::foreign}) {
        CollectiveBuffer buffer(ranks.group(0), request, values_of(request, 0, static_cast<std::uint64_t>(place)),
                                place);
        ranks.group(0).send(buffer.data(), Element::f32, large, 1);
    }
    ranks.destroy(0);
    for (const Place place : {Place::in_place, Place::foreign}) {
        Bytes received(4 * large);
        ranks.group(1).wait(*ranks.group(1).receive(received.data(), Element::f32, large, 0));
        EXPECT_EQ(received, values_of(request, 0, static_cast<std::uint64_t>(place)));
    }
    char byte = 0;
    const auto text = error_of([&] { ranks.group(1).wait(*ranks.group(1).receive(&byte, Element::byte, 1, 0)); });
    EXPECT_TRUE(contains(text, {"receive from rank 0", "1 bytes", "has left the group"}));
}

TEST(GroupThreadsFailures, MessagesThatDoNotMatch) {
    struct Case {
        Element element;
        std::int64_t numel;
    };
    for (const Case& wrong : {Case{Element::f32, 101}, Case{Element::bf16, 100}, Case{Element::f64, 50}}) {
        ThreadRanks ranks(2, 20s);
        const auto errors = ranks.errors_of([&](int rank, Group& group) {
            const auto memory = group.allocate(1000);
            if (rank == 0) return group.wait(*group.send(memory->data(), Element::f32, 100, 1));
            group.wait(*group.receive(memory->data(), wrong.element, wrong.numel, 0));
        });
        const std::string asked = std::to_string(wrong.numel) + " " + name_of(wrong.element);
        for (const std::string& error : errors) EXPECT_TRUE(contains(error, {"100 f32", asked, "rank 0", "rank 1"}));
    }
}

TEST(GroupThreadsFailures, AReceiverOrSenderThatNeverComes) {
    ThreadRanks ranks(3, short_timeout);
    const auto errors = ranks.errors_of([&](int rank, Group& group) {
        char byte = 0;
        const auto memory = group.allocate(100);
        if (rank == 0) group.wait(*group.receive(&byte, Element::byte, 1, 2));
        if (rank == 1) group.wait(*group.send(memory->data(), Element::byte, 100, 2));
    });
    EXPECT_TRUE(contains(errors[0], {"receive from rank 2 of 1 bytes", "rank 0", "did not take part within 0.3 s"}));
    EXPECT_TRUE(contains(errors[1], {"send to rank 2 of 100 bytes", "rank 1", "did not take part within 0.3 s"}));
}

// After a failure the memory that peers may still read is left as it is.
TEST(GroupThreadsFailures, AFailedCollectiveLeavesItsMemoryToThePeers) {
    ThreadRanks ranks(2, short_timeout);
    Group& group = ranks.group(0);
    auto memory = group.allocate(4 * large);
    memory->data()[0] = 9;
    const char* data = memory->data();
    auto operation = group.launch(all_reduce_of(large), memory->data());
    EXPECT_NE(error_of([&] { group.wait(*operation); }), "");
    operation = nullptr;
    memory = nullptr;
    EXPECT_EQ(data[0], 9);
    ranks.destroy(0);
    EXPECT_EQ(data[0], 9);
}

// Two calls of the programs whose collectives look the same, on all ranks; a collective outside of all calls fits any.
TEST(GroupThreadsFailures, DifferentCallsOfThePrograms) {
    ThreadRanks ranks(3, 20s);
    const auto meet = [&](const std::string& usual, const std::string& other) {
        return ranks.errors_of([&](int rank, Group& group) { group.barrier(rank == 2 ? other : usual); });
    };
    for (const std::string& error : meet("step()", "")) EXPECT_EQ(error, "");
    for (const std::string& error : meet("save_model()", "step()")) {
        EXPECT_TRUE(contains(error, {"save_model() is called on every rank; rank 2 called step()", "number 1"}));
    }
}

TEST(GroupThreadsFailures, TheCallIsNamedWithADifferentCollective) {
    ThreadRanks ranks(2, 20s);
    const auto errors = ranks.errors_of([](int rank, Group& group) {
        Bytes buffer(200);
        group.wait(*group.launch(all_reduce_of(rank == 0 ? 20 : 21), buffer.data(), std::string(100, 'x')));
    });
    for (const std::string& error : errors)
        EXPECT_TRUE(contains(error, {"in " + std::string(63, 'x') + ": collective"}));
}

// Who is interrupted throws, whoever executes the collective; who waits for it learns why, long before the timeout.
TEST(GroupThreadsFailures, AnInterruptedWait) {
    for (const std::int64_t numel : {std::int64_t{30}, large}) {
        std::atomic<bool> interrupted{false};
        // A signal reaches the thread of the program alone, never the communication thread.
        const auto is_interrupted = [&, program = std::this_thread::get_id()] {
            return interrupted.load() && std::this_thread::get_id() == program;
        };
        ThreadRanks ranks(2, 20s, 64 << 20, [&](int rank) {
            return rank == 0 ? std::function<bool()>(is_interrupted) : std::function<bool()>();
        });
        Bytes buffer(static_cast<std::size_t>(4 * numel));
        const auto operation = ranks.group(0).launch(all_reduce_of(numel), buffer.data());
        interrupted = true;
        const auto took = duration_of([&] {
            EXPECT_THROW(ranks.group(0).wait(*operation), std::exception);
            const std::string learned = error_of([&] {
                Group& group = ranks.group(1);
                Bytes own(buffer.size());
                group.wait(*group.launch(all_reduce_of(numel), own.data()));  // small: rank 0's values are there
                group.barrier();
            });
            EXPECT_TRUE(contains(learned, {"rank 0 gave up: it was interrupted in"}));
            EXPECT_TRUE(contains(error_of([&] { ranks.group(0).barrier(); }), {"it was interrupted in"}));
        });
        EXPECT_LT(took, 10s);
    }
}

TEST(GroupThreadsFailures, TheReasonOfARankThatLeaves) {
    ThreadRanks ranks(2, 20s);
    ranks.group(1).close("its batches are at an end");
    EXPECT_TRUE(contains(error_of([&] { ranks.group(0).barrier("step()"); }),
                         {"in step(),", "rank 1", "has left the group: its batches are at an end"}));
}

}  // namespace
}  // namespace partita
