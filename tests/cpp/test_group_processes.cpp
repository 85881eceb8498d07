// Groups whose ranks are processes: how they meet, and what the others see when one is killed or stopped.
//
// The test's own process is no rank. Each rank is forked from it, makes its listener as a rank of a real run does, and
// hands the address round through pipes; it reports through its exit code and a line of text.
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <fstream>

#include "group_support.h"
#include "rank_processes.h"

namespace partita {
namespace {

class GroupProcesses : public ::testing::TestWithParam<int> {};

TEST_P(GroupProcesses, EveryCollective) {
    const int world_size = GetParam();
    RankProcesses ranks(world_size, [&](int rank, Group& group) {
        std::uint64_t seed = 0;
        for (const Collective collective : {Collective::barrier, Collective::all_reduce, Collective::reduce_scatter,
                                            Collective::all_gather, Collective::broadcast}) {
            for (const Element element : all_elements) {
                if (element == Element::byte && collective < Collective::all_gather) continue;
                for (const std::int64_t numel : {0, 24, 24000, 120000}) {
                    Request request{collective, element, Reduction::average, 0, numel};
                    if (collective == Collective::barrier) request.numel = 0;
                    const std::vector<Bytes> values = all_values(request, world_size, ++seed);
                    const Bytes expected = plain_result(request, values, rank);
                    for (const Place place : all_places) {
                        CollectiveBuffer buffer(group, request, values[static_cast<std::size_t>(rank)], place);
                        group.wait(*group.launch(request, buffer.data()));
                        require(buffer.holds(expected), describe(request));
                    }
                }
            }
        }
    });
    ranks.expect_success();
}

TEST_P(GroupProcesses, SendAndReceive) {
    const int world_size = GetParam();
    RankProcesses ranks(world_size, [&](int rank, Group& group) {
        const int next = (rank + 1) % world_size, previous = (rank + world_size - 1) % world_size;
        for (std::uint64_t round = 0; round < 50; ++round) {
            const Request request{Collective::broadcast, Element::f32, Reduction::sum, 0,
                                  static_cast<std::int64_t>(round * 1000)};
            for (const Place place : {Place::in_place_odd, Place::foreign}) {
                CollectiveBuffer mine(group, request, values_of(request, rank, round), place);
                CollectiveBuffer theirs(group, request, Bytes(static_cast<std::size_t>(request.bytes())), place);
                const auto sent = group.send(mine.data(), request.element, request.numel, next);
                group.wait(*group.receive(theirs.data(), request.element, request.numel, previous));
                group.wait(*sent);
                require(theirs.holds(values_of(request, previous, round)), "round " + std::to_string(round));
            }
        }
    });
    ranks.expect_success();
}

INSTANTIATE_TEST_SUITE_P(Groups, GroupProcesses, ::testing::Values(2, 4),
                         [](const auto& group) { return "of_" + std::to_string(group.param); });

TEST(GroupProcesses, ListenersOfOneParentWorkToo) {
    std::vector<std::unique_ptr<Listener>> listeners;
    std::vector<std::string> addresses;
    for (int r = 0; r < 3; ++r) {
        listeners.push_back(std::make_unique<Listener>());
        addresses.push_back(listeners.back()->address());
    }
    Forked ranks(3, [&](int rank, const Pipes&) {
        const auto own = static_cast<std::size_t>(rank);
        Group group(join(*listeners[own], rank, addresses, test_token, arena_bytes, 10s), 10s, 1);
        const Request request = all_reduce_of(50000);
        Bytes buffer = values_of(request, rank, 1);
        group.wait(*group.launch(request, buffer.data()));
        require_true(buffer == plain_result(request, all_values(request, 3, 1), rank), "all_reduce");
    });
    ranks.expect_success();
}

// Meeting ----------------------------------------------------------------------------------------------------------

// A connection to a rank's listener.
FileDescriptor connected_to(const std::string& address) {
    FileDescriptor connection(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, address.data(), address.size());
    const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address.size());
    EXPECT_EQ(connect(connection.get(), reinterpret_cast<const sockaddr*>(&name), length), 0);
    return connection;
}

TEST(GroupProcesses, StrangersAreTurnedAway) {
    RankProcesses ranks(
        3, [](int, Group& group) { group.barrier(); },
        [](const std::vector<std::string>& addresses) {  // before the ranks know each other's
            for (int r = 0; r < 2; ++r) {
                const std::string& address = addresses[static_cast<std::size_t>(r)];
                const FileDescriptor garbage = connected_to(address);
                const std::string noise(1000, '\xff');
                EXPECT_EQ(send(garbage.get(), noise.data(), noise.size(), MSG_NOSIGNAL), 1000);
                connected_to(address);  // and one that hangs up at once
            }
            for (const int rank : {1, 2}) {  // a rank of another group: another token
                Token other = test_token;
                other[15] ^= 1;
                const Listener listener;
                std::vector<std::string> theirs = addresses;
                theirs[static_cast<std::size_t>(rank)] = listener.address();
                // It is turned away when rank 0 gets to it, which is after the ranks' addresses are known: the text is
                // not awaited here.
                EXPECT_THROW(join(listener, rank, theirs, other, arena_bytes, 100ms), CommunicationError);
            }
        });
    ranks.expect_success();
}

// Whoever is missing is named, by all others and within the timeout.
TEST(GroupProcesses, AMissingRankIsNamed) {
    for (const int missing : {0, 1, 2}) {
        Forked ranks(3, [&](int rank, const Pipes& pipes) {
            const Listener listener;
            const std::vector<std::string> addresses = pipes.exchange(listener.address());
            if (rank == missing) {
                std::this_thread::sleep_for(1500ms);
                return;
            }
            const auto took = duration_of([&] {
                const std::string text =
                    error_of([&] { join(listener, rank, addresses, test_token, arena_bytes, 500ms); });
                require(contains(text, {"rank " + std::to_string(missing) + " did not join"}), "the error");
            });
            require_true(took < 1200ms, "it took " + std::to_string(took.count()) + " ms");
        });
        ranks.relay();
        SCOPED_TRACE(::testing::Message() << "rank " << missing << " is missing");
        ranks.expect_success();
    }
}

TEST(GroupProcesses, ARankWhoseListenerIsGoneIsNamed) {
    std::string nobody;
    {
        nobody = Listener().address();
    }
    const Listener own;
    const std::string text = error_of([&] { join(own, 1, {nobody, own.address()}, test_token, arena_bytes, 5s); });
    EXPECT_TRUE(contains(text, {"rank 0 did not join", "rank 1"}));
    EXPECT_THROW(join(own, 2, {nobody, own.address()}, test_token, arena_bytes, 5s), std::invalid_argument);
    EXPECT_THROW(join(own, -1, {nobody, own.address()}, test_token, arena_bytes, 5s), std::invalid_argument);
}

TEST(GroupProcesses, AGroupOfOne) {
    const Listener listener;
    Group group(join(listener, 0, {listener.address()}, test_token, arena_bytes, 5s), 5s, 1);
    Bytes buffer = values_of(all_reduce_of(50000), 0, 1);
    const Bytes before = buffer;
    group.wait(*group.launch(all_reduce_of(50000), buffer.data()));
    EXPECT_EQ(buffer, before);
}

bool listed(const std::string& address) {
    std::ifstream table("/proc/net/unix");
    const std::string name = "@" + address.substr(1);
    for (std::string line; std::getline(table, line);) {
        const auto last = line.find_last_of(' ');
        if (last != std::string::npos && line.substr(last + 1) == name) return true;
    }
    return false;
}

TEST(GroupProcesses, NoSocketRemainsAfterTheMeeting) {
    Forked ranks(2, [](int rank, const Pipes& pipes) {
        auto listener = std::make_unique<Listener>();
        const std::vector<std::string> addresses = pipes.exchange(listener->address());
        require_true(listed(addresses[static_cast<std::size_t>(rank)]),
                     "the test finds no listener: it proves nothing");
        Group group(join(*listener, rank, addresses, test_token, arena_bytes, 10s), 10s, 1);
        group.barrier();
        listener = nullptr;
        group.barrier();
        for (const std::string& address : addresses) require_true(!listed(address), "a socket is still there");
        group.barrier();
    });
    ranks.relay();
    ranks.expect_success();
}

// Death ------------------------------------------------------------------------------------------------------------

// All ranks but `victim` start this and must be told within `limit` what became of it.
void expect_failure(int rank, Group& group, const std::function<void()>& wait, const std::vector<std::string>& parts,
                    std::chrono::milliseconds limit) {
    std::string text;
    const auto took = duration_of([&] { text = error_of(wait); });
    require(contains(text, parts), "rank " + std::to_string(rank));
    require_true(took < limit, "it took " + std::to_string(took.count()) + " ms");
    require_true(error_of([&] { group.barrier(); }) == text, "the next call says something else");
}

TEST(GroupProcesses, AKilledRankIsNamedWhileOthersWait) {
    for (const int victim : {0, 1, 2}) {
        for (const std::int64_t numel : {100, 100000}) {
            const auto timeout = 30s;
            RankProcesses ranks(
                3,
                [&](int rank, Group& group) {
                    group.barrier();
                    if (rank == victim) {
                        std::this_thread::sleep_for(100ms);  // the others wait by now
                        raise(SIGKILL);
                    }
                    Bytes buffer(static_cast<std::size_t>(4 * numel));
                    const auto wait = [&] { group.wait(*group.launch(all_reduce_of(numel), buffer.data())); };
                    expect_failure(
                        rank, group, wait,
                        {"rank " + std::to_string(victim) + " (process ", "died", describe(all_reduce_of(numel))}, 2s);
                },
                {}, timeout);
            SCOPED_TRACE(::testing::Message() << "victim " << victim << ", " << numel << " elements");
            ranks.expect_success(victim);
        }
    }
}

TEST(GroupProcesses, AKilledReceiverAndSenderAreNamed) {
    RankProcesses ranks(
        3,
        [](int rank, Group& group) {
            group.barrier();
            const auto memory = group.allocate(100);
            if (rank == 1) raise(SIGKILL);
            const auto wait = [&] {
                if (rank == 0) group.wait(*group.send(memory->data(), Element::byte, 100, 1));
                if (rank == 2) group.wait(*group.receive(memory->data(), Element::byte, 100, 1));
            };
            expect_failure(rank, group, wait, {rank == 0 ? "send to rank 1" : "receive from rank 1", "died"}, 2s);
        },
        {}, 30s);
    ranks.expect_success(1);
}

TEST(GroupProcesses, AStoppedRankIsNamedAfterTheTimeout) {
    RankProcesses ranks(
        3,
        [](int rank, Group& group) {
            group.barrier();
            if (rank == 1) raise(SIGSTOP);
            Bytes buffer(400000);
            const auto wait = [&] { group.wait(*group.launch(all_reduce_of(100000), buffer.data())); };
            const std::vector<std::string> parts{"rank 1 (process ", "did not take part within 1 s",
                                                 describe(all_reduce_of(100000))};
            expect_failure(rank, group, wait, parts, 3s);
        },
        {}, 1s);
    ranks.await_exit(0);
    ranks.await_exit(2);
    kill(ranks.pid(1), SIGKILL);
    ranks.expect_success(1);
}

// Forked children of a member --------------------------------------------------------------------------------------

TEST(GroupProcesses, AForkedChildIsNoMember) {
    RankProcesses ranks(2, [](int rank, Group& group) {
        const Request request = all_reduce_of(50000);
        for (std::uint64_t round = 0; round < 5; ++round) {
            CollectiveBuffer buffer(group, request, values_of(request, rank, round), Place::in_place);
            const auto operation = group.launch(request, buffer.data());
            const pid_t child = fork();
            if (child == 0) {
                Bytes values(400000);
                const bool refused =
                    contains(error_of([&] { group.launch(request, values.data()); }), {"forked child"}) &&
                    contains(error_of([&] { group.send(values.data(), Element::byte, 10, 1 - rank); }), {"forked"});
                _exit(refused ? 0 : 1);
            }
            int status = -1;
            require_true(waitpid(child, &status, 0) == child && status == 0, "the child was not refused");
            group.wait(*operation);
            const Bytes expected = plain_result(request, all_values(request, 2, round), rank);
            require(buffer.holds(expected), "after the fork");
        }
    });
    ranks.expect_success();
}

TEST(GroupProcesses, AForkedChildMayDestroyItsCopy) {
    Forked ranks(2, [](int rank, const Pipes& pipes) {
        auto listener = std::make_unique<Listener>();
        const auto addresses = pipes.exchange(listener->address());
        auto group = std::make_unique<Group>(join(*listener, rank, addresses, test_token, arena_bytes, 10s), 10s, 1);
        const Request request = all_reduce_of(50000);
        auto buffer = std::make_unique<CollectiveBuffer>(*group, request, values_of(request, rank, 1), Place::in_place);
        auto operation = group->launch(request, buffer->data());
        const pid_t child = fork();
        if (child == 0) {
            alarm(5);  // kills it if it does not return
            operation = nullptr;
            group->close();
            group = nullptr;
            buffer = nullptr;
            _exit(0);
        }
        int status = -1;
        require_true(waitpid(child, &status, 0) == child && status == 0, "the child did not come back");
        group->wait(*operation);
        require(buffer->holds(plain_result(request, all_values(request, 2, 1), rank)), "after the fork");
        group->barrier();
    });
    ranks.relay();
    ranks.expect_success();
}

// Leftovers --------------------------------------------------------------------------------------------------------

std::int64_t shared_memory_bytes() {
    std::ifstream info("/proc/meminfo");
    for (std::string line; std::getline(info, line);) {
        if (line.rfind("Shmem:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
    }
    return 0;
}

TEST(GroupProcesses, KilledRanksLeaveNothing) {
    constexpr std::int64_t bytes = 16 << 20, tolerance = 64 << 20;
    constexpr int rounds = 10, world_size = 3;
    static_assert(rounds * world_size * bytes > 4 * tolerance);
    Random random;
    const std::int64_t before = shared_memory_bytes();
    for (int round = 0; round < rounds; ++round) {
        RankProcesses ranks(world_size, [](int, Group& group) {
            const auto memory = group.allocate(bytes);
            std::fill(memory->data(), memory->data() + bytes, '\0');
            for (;;) group.wait(*group.launch(all_reduce_of(bytes / 4), memory->data()));
        });
        std::this_thread::sleep_for(std::chrono::milliseconds(20 + random.bits() % 50));
        for (int r = 0; r < world_size; ++r) kill(ranks.pid(r), SIGKILL);
        for (int r = 0; r < world_size; ++r) {
            const int status = ranks.await_exit(r);
            EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "rank " << r << ": " << status;
        }
    }
    std::int64_t now = shared_memory_bytes();  // of the whole machine, where others come and go
    for (int i = 0; i < 600 && now > before + tolerance; ++i) {
        std::this_thread::sleep_for(100ms);
        now = shared_memory_bytes();
    }
    EXPECT_LE(now, before + tolerance);
}

}  // namespace
}  // namespace partita
