// Sends and receives between ranks that are threads.
#include "group_support.h"

namespace partita {
namespace {

TEST(GroupThreadsTransfers, EveryElementSizeAndPlace) {
    ThreadRanks ranks(3);
    ranks.run([&](int rank, Group& group) {
        std::uint64_t seed = 0;
        for (const Element element : all_elements) {
            for (const std::int64_t numel : {0, 1, 17, 4096, 30001}) {
                const Request request = message_of(element, numel);
                const Bytes values = values_of(request, 0, ++seed);
                for (const Place place : all_places) {
                    CollectiveBuffer buffer(group, request, rank == 0 ? values : Bytes(values.size(), '\1'), place);
                    if (rank == 0) {
                        const auto one = group.send(buffer.data(), element, numel, 1);
                        const auto two = group.send(buffer.data(), element, numel, 2);
                        group.wait(*two);
                        group.wait(*one);
                        std::fill(buffer.data(), buffer.data() + values.size(), '\2');  // nobody reads it any more
                    } else {
                        group.wait(*group.receive(buffer.data(), element, numel, 0));
                        EXPECT_TRUE(buffer.holds(values)) << name_of(element) << " x " << numel;
                    }
                }
            }
        }
    });
}

TEST(GroupThreadsTransfers, NothingAtNoAddress) {
    ThreadRanks ranks(2);
    ranks.run([&](int rank, Group& group) {
        if (rank == 0) {
            group.wait(*group.send(nullptr, Element::f32, 0, 1));
        } else {
            group.wait(*group.receive(nullptr, Element::f32, 0, 0));
        }
        group.wait(*group.launch(all_reduce_of(0), nullptr));
    });
}

TEST(GroupThreadsTransfers, ExchangeInBothDirections) {
    ThreadRanks ranks(2);
    const Request request = message_of(Element::f32, large);
    ranks.run([&](int rank, Group& group) {
        for (std::uint64_t round = 0; round < 20; ++round) {
            for (const Place place : {Place::in_place, Place::foreign}) {
                CollectiveBuffer mine(group, request, values_of(request, rank, round), place);
                CollectiveBuffer theirs(group, request, Bytes(4 * large), place);
                const auto sent = group.send(mine.data(), Element::f32, large, 1 - rank);
                const auto received = group.receive(theirs.data(), Element::f32, large, 1 - rank);
                group.wait(*received);
                group.wait(*sent);
                EXPECT_TRUE(theirs.holds(values_of(request, 1 - rank, round)));
                EXPECT_TRUE(mine.holds(values_of(request, rank, round)));
            }
        }
    });
}

// Sends are more than a channel has room for; the receiver comes late and asks for all at once.
TEST(GroupThreadsTransfers, MoreSendsThanAChannelHolds) {
    ThreadRanks ranks(2);
    ranks.run([&](int rank, Group& group) {
        constexpr int count = 3 * messages_per_channel + 1;
        const auto numel_of = [](int i) { return 1 + 100 * i; };
        std::vector<Bytes> buffers;
        std::vector<std::shared_ptr<Transfer>> transfers;
        for (int i = 0; i < count; ++i) {
            const Request request = message_of(Element::byte, numel_of(i));
            buffers.push_back(rank == 0 ? values_of(request, 0, static_cast<std::uint64_t>(i))
                                        : Bytes(static_cast<std::size_t>(numel_of(i))));
        }
        if (rank == 1) std::this_thread::sleep_for(100ms);
        for (int i = 0; i < count; ++i) {
            Bytes& buffer = buffers[static_cast<std::size_t>(i)];
            transfers.push_back(rank == 0 ? group.send(buffer.data(), Element::byte, numel_of(i), 1)
                                          : group.receive(buffer.data(), Element::byte, numel_of(i), 0));
        }
        group.wait(*transfers.back());  // and with it all before it
        if (rank == 0) return;
        for (int i = 0; i < count; ++i) {
            const Bytes expected = values_of(message_of(Element::byte, numel_of(i)), 0, static_cast<std::uint64_t>(i));
            EXPECT_EQ(buffers[static_cast<std::size_t>(i)], expected) << i;
        }
        for (const auto& transfer : transfers) group.wait(*transfer);
    });
}

TEST(GroupThreadsTransfers, ADroppedReceiveIsReadAndForgotten) {
    ThreadRanks ranks(2);
    ranks.run([&](int rank, Group& group) {
        const Request request = message_of(Element::f32, 5000);
        const Bytes first = values_of(request, 0, 1), second = values_of(request, 0, 2);
        if (rank == 0) {
            CollectiveBuffer a(group, request, first, Place::in_place), b(group, request, second, Place::in_place);
            const auto sent = group.send(a.data(), Element::f32, 5000, 1);
            group.wait(*group.send(b.data(), Element::f32, 5000, 1));
            group.wait(*sent);
        } else {
            Bytes unwanted(20000, '\3'), wanted(20000);
            group.receive(unwanted.data(), Element::f32, 5000, 0);
            group.wait(*group.receive(wanted.data(), Element::f32, 5000, 0));
            EXPECT_EQ(wanted, second);
            EXPECT_EQ(unwanted, Bytes(20000, '\3'));
        }
    });
}

// A sent tensor may go at once, and so may the handle: the receiver comes later.
TEST(GroupThreadsTransfers, SentMemoryFreedWhileInFlight) {
    ThreadRanks ranks(2);
    ranks.run([&](int rank, Group& group) {
        const Request request = message_of(Element::f16, large);
        for (std::uint64_t round = 0; round < 10; ++round) {
            const Bytes values = values_of(request, 0, round);
            if (rank == 0) {
                for (const Place place : {Place::in_place, Place::foreign}) {
                    CollectiveBuffer buffer(group, request, values, place);
                    group.send(buffer.data(), Element::f16, large, 1);
                }
                const auto next = group.allocate(request.bytes());
                std::fill(next->data(), next->data() + next->bytes(), '\x7f');
            } else {
                std::this_thread::sleep_for(2ms);
                for (int i = 0; i < 2; ++i) {
                    Bytes received(values.size());
                    group.wait(*group.receive(received.data(), Element::f16, large, 0));
                    EXPECT_EQ(received, values) << round;
                }
            }
        }
        group.barrier();
        if (rank == 0) {
            group.wait(*group.send(&rank, Element::byte, 1, 1));  // a call that lets go of what was taken
            group.barrier();
            const auto last = group.send(&rank, Element::byte, 1, 1);
            EXPECT_LE(group.committed_bytes(), 3 * 4096);
        } else {
            char byte = 0;
            group.wait(*group.receive(&byte, Element::byte, 1, 0));
            group.barrier();
            group.wait(*group.receive(&byte, Element::byte, 1, 0));
        }
    });
}

// A ring among collectives, as pipeline stages do it.
TEST(GroupThreadsTransfers, AmongCollectives) {
    constexpr int world_size = 4;
    ThreadRanks ranks(world_size);
    ranks.run([&](int rank, Group& group) {
        const Request request = all_reduce_of(10000);
        const int next = (rank + 1) % world_size, previous = (rank + world_size - 1) % world_size;
        for (std::uint64_t round = 0; round < 20; ++round) {
            CollectiveBuffer reduced(group, request, values_of(request, rank, round), Place::in_place);
            const auto operation = group.launch(request, reduced.data());
            Bytes mine = values_of(request, rank, 1000 + round), theirs(mine.size());
            const auto sent = group.send(mine.data(), Element::f32, 10000, next);
            group.wait(*group.receive(theirs.data(), Element::f32, 10000, previous));
            group.wait(*sent);
            EXPECT_EQ(theirs, values_of(request, previous, 1000 + round));
            group.wait(*operation);
            EXPECT_TRUE(reduced.holds(plain_result(request, all_values(request, world_size, round), rank)));
        }
    });
}

}  // namespace
}  // namespace partita
