// Groups whose ranks are threads: every collective against a plain reference, bit for bit.
//
// All names begin with GroupThreads, by which the thread sanitizer's test preset picks them.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>

#include "group_support.h"

namespace partita {
namespace {

constexpr Reduction all_reductions[] = {Reduction::sum, Reduction::average, Reduction::max};

class GroupThreadsCollectives : public ::testing::TestWithParam<std::tuple<int, Element>> {
  protected:
    int world_size = std::get<0>(GetParam());
    Element element = std::get<1>(GetParam());
    ThreadRanks ranks{world_size};
    std::uint64_t seed = 0;

    // Sizes around the largest that travels in a slot.
    std::vector<std::int64_t> sizes(bool divisible) const {
        const std::int64_t limit = payload_bytes / size_of(element), n = world_size;
        if (!divisible) return {0, 1, 65, limit - 1, limit, limit + 1, 3 * limit + 7};
        return {0, n, 65 * n, limit / n * n, (limit / n + 1) * n, (3 * limit / n + 1) * n};
    }

    // Runs the collective on each kind of memory and compares every rank's whole buffer.
    void check_collective(const Request& request) {
        SCOPED_TRACE(describe(request));
        const std::vector<Bytes> values = all_values(request, world_size, ++seed);
        ranks.run([&](int rank, Group& group) {
            const Bytes expected = plain_result(request, values, rank);
            for (const Place place : all_places) {
                CollectiveBuffer buffer(group, request, values[static_cast<std::size_t>(rank)], place);
                group.wait(*group.launch(request, buffer.data()));
                EXPECT_TRUE(buffer.holds(expected)) << "rank " << rank << ", place " << static_cast<int>(place);
            }
        });
    }
};

class GroupThreadsReductions : public GroupThreadsCollectives {};

TEST_P(GroupThreadsReductions, AllReduce) {
    for (const Reduction reduction : all_reductions) {
        for (const std::int64_t numel : sizes(false)) {
            check_collective({Collective::all_reduce, element, reduction, 0, numel});
        }
    }
}

TEST_P(GroupThreadsReductions, ReduceScatter) {
    for (const Reduction reduction : all_reductions) {
        for (const std::int64_t numel : sizes(true)) {
            check_collective({Collective::reduce_scatter, element, reduction, 0, numel});
        }
    }
}

TEST_P(GroupThreadsCollectives, AllGather) {
    for (const std::int64_t numel : sizes(true)) {
        check_collective({Collective::all_gather, element, Reduction::sum, 0, numel});
    }
}

TEST_P(GroupThreadsCollectives, Broadcast) {
    for (const std::int64_t numel : sizes(false)) {
        for (const int root : {0, world_size - 1}) {
            check_collective({Collective::broadcast, element, Reduction::sum, root, numel});
        }
    }
}

std::string collectives_name(const ::testing::TestParamInfo<std::tuple<int, Element>>& info) {
    return std::string(name_of(std::get<1>(info.param))) + "_on_" + std::to_string(std::get<0>(info.param));
}

INSTANTIATE_TEST_SUITE_P(Groups, GroupThreadsReductions,
                         ::testing::Combine(::testing::Values(1, 2, 3, 4, 7),
                                            ::testing::Values(Element::f32, Element::f16, Element::bf16, Element::f64)),
                         collectives_name);
INSTANTIATE_TEST_SUITE_P(Groups, GroupThreadsCollectives,
                         ::testing::Combine(::testing::Values(1, 2, 3, 4, 7), ::testing::ValuesIn(all_elements)),
                         collectives_name);

// A random sequence of collectives that all ranks agree on.
std::vector<Request> random_requests(int count, int world_size, std::uint32_t seed) {
    Random random(seed);
    std::vector<Request> requests;
    for (int i = 0; i < count; ++i) {
        Request request;
        request.collective = static_cast<Collective>(random.bits() % 5);
        request.element = all_elements[random.bits() % 4];
        request.reduction = all_reductions[random.bits() % 3];
        request.root = static_cast<std::int32_t>(random.bits() % static_cast<std::uint32_t>(world_size));
        request.numel = random.bits() % (random.bits() % 4 == 0 ? 20000 : 500) / static_cast<unsigned>(world_size) *
                        static_cast<unsigned>(world_size);
        if (request.collective == Collective::barrier) request = {};
        requests.push_back(request);
    }
    return requests;
}

// One rank's part in many collectives that are all in flight before the first wait.
class InFlight {
  public:
    InFlight(Group& group, const std::vector<Request>& requests) : group_(group), requests_(requests) {
        for (std::size_t i = 0; i < requests.size(); ++i) {
            const Bytes values = values_of(requests[i], group.rank(), i);
            buffers_.push_back(std::make_unique<CollectiveBuffer>(group, requests[i], values, all_places[i % 4]));
            operations_.push_back(group.launch(requests[i], buffers_[i]->data()));
        }
    }

    void wait(std::size_t i) {
        group_.wait(*operations_[i]);
        const std::vector<Bytes> values = all_values(requests_[i], group_.world_size(), i);
        EXPECT_TRUE(buffers_[i]->holds(plain_result(requests_[i], values, group_.rank())))
            << "rank " << group_.rank() << ", number " << i << ": " << describe(requests_[i]);
        operations_[i] = nullptr;
        buffers_[i] = nullptr;
    }
    // Foreign memory stays: only what the group has given out may go early.
    void drop_handle(std::size_t i) { operations_[i] = nullptr; }
    void drop_memory(std::size_t i) { buffers_[i] = nullptr; }
    bool dropped(std::size_t i) const { return operations_[i] == nullptr; }

  private:
    Group& group_;
    const std::vector<Request>& requests_;
    std::vector<std::unique_ptr<CollectiveBuffer>> buffers_;
    std::vector<std::shared_ptr<Operation>> operations_;
};

class GroupThreadsInFlight : public ::testing::TestWithParam<int> {
  protected:
    static constexpr int count = 150;  // more than there are slots
    int world_size = GetParam();
    ThreadRanks ranks{world_size};
    std::vector<Request> requests = random_requests(count, world_size, 7);
};

TEST_P(GroupThreadsInFlight, WaitedInOrder) {
    ranks.run([&](int, Group& group) {
        InFlight in_flight(group, requests);
        for (std::size_t i = 0; i < count; ++i) in_flight.wait(i);
    });
}

TEST_P(GroupThreadsInFlight, WaitedInAnyOrder) {
    ranks.run([&](int rank, Group& group) {
        InFlight in_flight(group, requests);
        std::vector<std::size_t> order(count);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(rank)));
        for (const std::size_t i : order) in_flight.wait(i);
    });
}

// Each rank drops others; the memory of the group's may go while peers still read it.
TEST_P(GroupThreadsInFlight, HandlesAndMemoryDroppedWithoutWait) {
    ranks.run([&](int rank, Group& group) {
        InFlight in_flight(group, requests);
        for (std::size_t i = 0; i < count; ++i) {
            if ((i + static_cast<std::size_t>(rank)) % 3 == 0) continue;
            in_flight.drop_handle(i);
            in_flight.drop_memory(i);
        }
        for (std::size_t i = count; i-- > 0;) {
            if (!in_flight.dropped(i)) in_flight.wait(i);
        }
        group.barrier();
    });
    // What was dropped is forgotten with the next launches.
    ranks.run([&](int, Group& group) {
        for (int i = 0; i < 2; ++i) group.barrier();
    });
    for (int r = 0; r < world_size; ++r) {
        EXPECT_LE(ranks.group(r).committed_bytes(), 2 * 8 * 20000 + 8192) << "more than the idle staging buffers";
    }
}

// The memory of a collective under way is not given to the next allocation.
TEST_P(GroupThreadsInFlight, FreedMemoryIsNotReusedWhilePeersReadIt) {
    ranks.run([&](int rank, Group& group) {
        for (int round = 0; round < 20; ++round) {
            const Request request = all_reduce_of(large);
            const auto seed = static_cast<std::uint64_t>(round);
            auto buffer =
                std::make_unique<CollectiveBuffer>(group, request, values_of(request, rank, seed), Place::in_place);
            auto operation = group.launch(request, buffer->data());
            if (rank != 0) {
                buffer = nullptr;
                operation = nullptr;
                const auto next = group.allocate(request.bytes());
                std::fill(next->data(), next->data() + next->bytes(), '\x7f');
                continue;
            }
            group.wait(*operation);
            EXPECT_TRUE(buffer->holds(plain_result(request, all_values(request, world_size, seed), rank)));
        }
        group.barrier();
    });
}

// The same buffer in one collective after another: each sees what the one before it left.
TEST_P(GroupThreadsInFlight, AChainOnOneBuffer) {
    const std::int64_t numel = large / world_size * world_size;
    const std::vector<Request> chain = {{Collective::all_reduce, Element::f32, Reduction::average, 0, numel},
                                        {Collective::reduce_scatter, Element::f32, Reduction::sum, 0, numel},
                                        {Collective::all_gather, Element::f32, Reduction::sum, 0, numel},
                                        {Collective::all_reduce, Element::f32, Reduction::max, 0, numel},
                                        {Collective::broadcast, Element::f32, Reduction::sum, 0, numel}};
    ranks.run([&](int rank, Group& group) {
        std::vector<Bytes> values = all_values(chain[0], world_size, 3);
        CollectiveBuffer buffer(group, chain[0], values[static_cast<std::size_t>(rank)], Place::in_place);
        for (const Request& request : chain) {
            group.wait(*group.launch(request, buffer.data()));
            std::vector<Bytes> next;
            for (int r = 0; r < world_size; ++r) next.push_back(plain_result(request, values, r));
            values = std::move(next);
            EXPECT_TRUE(buffer.holds(values[static_cast<std::size_t>(rank)])) << describe(request);
        }
    });
}

// Whoever waits for a later collective has the earlier ones done: only their results are still to be fetched.
TEST_P(GroupThreadsInFlight, LaunchesAreExecutedInOrder) {
    ranks.run([&](int rank, Group& group) {
        const Request request = all_reduce_of(large);
        CollectiveBuffer buffer(group, request, values_of(request, rank, 1), Place::in_place);
        group.launch(request, buffer.data());
        group.barrier();  // executed here after the all-reduce, on every rank
        EXPECT_TRUE(buffer.holds(plain_result(request, all_values(request, world_size, 1), rank)));
        group.barrier();
    });
}

// Nobody's buffer is read any more after wait(): it can be overwritten at once.
TEST_P(GroupThreadsInFlight, BuffersAreTheCallersAfterWait) {
    for (const Collective collective :
         {Collective::all_reduce, Collective::reduce_scatter, Collective::all_gather, Collective::broadcast}) {
        const Request request{collective, Element::f32, Reduction::sum, 0, large / world_size * world_size};
        ranks.run([&](int rank, Group& group) {
            for (const Place place : {Place::in_place, Place::foreign}) {
                CollectiveBuffer buffer(group, request, values_of(request, rank, 0), place);
                for (std::uint64_t round = 0; round < 3; ++round) {
                    const Bytes values = values_of(request, rank, round);
                    std::copy(values.begin(), values.end(), buffer.data());
                    group.wait(*group.launch(request, buffer.data()));
                    const Bytes expected = plain_result(request, all_values(request, world_size, round), rank);
                    EXPECT_TRUE(buffer.holds(expected)) << "round " << round;
                }
            }
        });
    }
}

TEST_P(GroupThreadsInFlight, ABarrierWaitsForAll) {
    std::atomic<int> arrived{0};
    ranks.run([&](int rank, Group& group) {
        for (int round = 1; round <= 50; ++round) {
            if (rank == round % world_size) std::this_thread::sleep_for(1ms);
            ++arrived;
            group.barrier();
            EXPECT_EQ(arrived, round * world_size);
            group.barrier();
        }
    });
}

// Small ones only: their slots come round many times.
TEST_P(GroupThreadsInFlight, SlotsAreReused) {
    ranks.run([&](int rank, Group& group) {
        const Request request = all_reduce_of(3, Element::f64);
        for (std::uint64_t round = 0; round < 20; ++round) {
            std::vector<std::shared_ptr<Operation>> operations;
            std::vector<Bytes> buffers;
            for (std::uint64_t i = 0; i < 50; ++i) buffers.push_back(values_of(request, rank, round * 50 + i));
            for (Bytes& buffer : buffers) operations.push_back(group.launch(request, buffer.data()));
            for (std::uint64_t i = 0; i < 50; ++i) {
                if (i % 7 == 0) continue;
                group.wait(*operations[i]);
                const auto values = all_values(request, world_size, round * 50 + i);
                EXPECT_EQ(buffers[i], plain_result(request, values, rank)) << round << ", " << i;
            }
        }
    });
}

INSTANTIATE_TEST_SUITE_P(Groups, GroupThreadsInFlight, ::testing::Values(1, 2, 3, 4),
                         [](const auto& group) { return "on_" + std::to_string(group.param); });

TEST(GroupThreads, SecondWaitReturnsAtOnce) {
    ThreadRanks ranks(2);
    ranks.run([&](int rank, Group& group) {
        for (const std::int64_t numel : {std::int64_t{5}, large}) {
            Bytes buffer = values_of(all_reduce_of(numel), rank, 1);
            const auto operation = group.launch(all_reduce_of(numel), buffer.data());
            group.wait(*operation);
            std::fill(buffer.begin(), buffer.end(), '\0');
            group.wait(*operation);
            EXPECT_EQ(std::count(buffer.begin(), buffer.end(), '\0'), 4 * numel);
        }
    });
}

// Staged memory may change between launch and wait: it was copied, and comes back in wait().
TEST(GroupThreads, ForeignMemoryIsCopiedAtLaunch) {
    ThreadRanks ranks(3);
    ranks.run([&](int rank, Group& group) {
        for (const std::int64_t numel : {std::int64_t{5}, large}) {
            const Request request = all_reduce_of(numel);
            Bytes buffer = values_of(request, rank, 1);
            const auto operation = group.launch(request, buffer.data());
            std::fill(buffer.begin(), buffer.end(), '\0');
            group.wait(*operation);
            EXPECT_EQ(buffer, plain_result(request, all_values(request, 3, 1), rank));
        }
    });
}

TEST(GroupThreads, StagingIsKeptSmall) {
    ThreadRanks ranks(2);
    ranks.run([&](int rank, Group& group) {
        for (int i = 0; i < 30; ++i) {
            const Request request = all_reduce_of(large + i);
            Bytes buffer = values_of(request, rank, 1);
            group.wait(*group.launch(request, buffer.data()));
        }
        EXPECT_LE(group.committed_bytes(), 2 * 4 * (large + 30) + 2 * 4096);
    });
}

TEST(GroupThreads, RequestsThatMakeNoSenseAreRefused) {
    ThreadRanks ranks(3);
    ranks.run([&](int, Group& group) {
        std::vector<char> memory(1000);
        const auto refused = [&](const Request& request) {
            EXPECT_THROW(group.launch(request, memory.data()), std::invalid_argument) << describe(request);
        };
        refused({Collective::all_gather, Element::f32, Reduction::sum, 0, 10});
        refused({Collective::reduce_scatter, Element::f32, Reduction::sum, 0, 10});
        refused({Collective::broadcast, Element::f32, Reduction::sum, 3, 10});
        refused({Collective::broadcast, Element::f32, Reduction::sum, -1, 10});
        refused({Collective::all_reduce, Element::byte, Reduction::sum, 0, 10});
        refused({Collective::reduce_scatter, Element::byte, Reduction::max, 0, 9});
        refused({Collective::all_reduce, Element::f32, Reduction::sum, 0, -1});
        for (const int peer : {-1, 3, group.rank()}) {
            EXPECT_THROW(group.send(memory.data(), Element::f32, 10, peer), std::invalid_argument);
            EXPECT_THROW(group.receive(memory.data(), Element::f32, 10, peer), std::invalid_argument);
        }
        const int peer = (group.rank() + 1) % 3;
        EXPECT_THROW(group.send(memory.data(), Element::f32, -1, peer), std::invalid_argument);
        EXPECT_THROW(group.receive(memory.data(), Element::f32, -1, peer), std::invalid_argument);
        group.barrier();  // and the group goes on
    });
}

// A launch that finds no memory to stage in leaves the group as it was.
TEST(GroupThreads, AFullArenaDoesNotBreakTheGroup) {
    ThreadRanks ranks(2, 20s, 4 << 20);
    ranks.run([&](int, Group& group) {
        Bytes buffer(8 << 20);
        EXPECT_THROW(group.launch(all_reduce_of(2 << 20), buffer.data()), std::bad_alloc);
        EXPECT_THROW(group.allocate(8 << 20), std::bad_alloc);
        group.barrier();
        group.wait(*group.launch(all_reduce_of(1 << 18), buffer.data()));
    });
}

}  // namespace
}  // namespace partita
