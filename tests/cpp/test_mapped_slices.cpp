// Buffers that all ranks see as one: who sees what, what is refused, and that a view outlives everything but itself.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <new>
#include <stdexcept>

#include "group_support.h"
#include "rank_processes.h"

namespace partita {
namespace {

char* slice_of(MappedSlices& slices, int rank, std::int64_t bytes_per_rank) {
    return slices.data() + rank * bytes_per_rank;
}

char letter(int writer, int owner) { return static_cast<char>('A' + 5 * writer + owner); }

// Each rank in turn writes all slices, and all ranks read them.
void expect_one_buffer(Group& group, MappedSlices& slices, std::int64_t bytes_per_rank) {
    const int world_size = group.world_size();
    require_true(slices.bytes() == world_size * bytes_per_rank, "the size");
    std::string wrong;  // told when all ranks are through
    for (int writer = 0; writer < world_size; ++writer) {
        if (group.rank() == writer) {
            for (int owner = 0; owner < world_size; ++owner) {
                char* slice = slice_of(slices, owner, bytes_per_rank);
                std::fill(slice, slice + bytes_per_rank, letter(writer, owner));
            }
        }
        group.barrier();
        for (int owner = 0; owner < world_size; ++owner) {
            const char* slice = slice_of(slices, owner, bytes_per_rank);
            if (std::count(slice, slice + bytes_per_rank, letter(writer, owner)) == bytes_per_rank) continue;
            wrong += "rank " + std::to_string(group.rank()) + " does not see what rank " + std::to_string(writer) +
                     " wrote to the slice of rank " + std::to_string(owner) + "; ";
        }
        group.barrier();
    }
    require_true(wrong.empty(), wrong);
}

// Ranks as threads --------------------------------------------------------------------------------------------------

class GroupThreadsMappedSlices : public ::testing::TestWithParam<int> {
  protected:
    int world_size = GetParam();
    ThreadRanks ranks{world_size};
    std::int64_t page = page_bytes();
};

TEST_P(GroupThreadsMappedSlices, AreOneBuffer) {
    for (const std::int64_t bytes : {page, 3 * page, huge_page_bytes + page}) {
        ranks.run([&](int rank, Group& group) {
            const auto before = group.allocate((rank + 1) * page);  // slices lie elsewhere in each rank's memory
            EXPECT_NO_THROW(expect_one_buffer(group, *group.map_slices(bytes), bytes));
        });
    }
}

// Whoever touches a page, its owner has it.
TEST_P(GroupThreadsMappedSlices, LieInTheirRanksMemory) {
    ranks.run([&](int rank, Group& group) {
        const std::int64_t bytes = 64 * page, before = group.committed_bytes();
        const auto slices = group.map_slices(bytes);
        if (rank == 0) std::fill(slices->data(), slices->data() + slices->bytes(), '\1');
        group.barrier();
        EXPECT_EQ(group.committed_bytes() - before, bytes) << "rank " << rank;
    });
}

TEST_P(GroupThreadsMappedSlices, HaveWholePages) {
    ranks.run([&](int, Group& group) {
        for (const std::int64_t bytes : {std::int64_t{0}, -page, page - 1, page + 1, std::int64_t{1}}) {
            try {
                group.map_slices(bytes);
                ADD_FAILURE() << bytes << " bytes were mapped";
            } catch (const std::invalid_argument& error) {
                EXPECT_TRUE(contains(error.what(), {"map_slices of " + std::to_string(bytes) + " bytes",
                                                    "page size, " + std::to_string(page) + " bytes"}));
            }
        }
        EXPECT_NO_THROW(expect_one_buffer(group, *group.map_slices(page), page));
    });
}

// What a view showed, it shows after its owner has let go and filled its arena.
TEST_P(GroupThreadsMappedSlices, AreNotReused) {
    ranks.run([&](int rank, Group& group) {
        const std::int64_t bytes = 4 * page;
        auto slices = group.map_slices(bytes), others = group.map_slices(bytes);
        std::fill(slice_of(*slices, rank, bytes), slice_of(*slices, rank, bytes) + bytes, letter(0, rank));
        std::fill(slice_of(*others, rank, bytes), slice_of(*others, rank, bytes) + bytes, letter(1, rank));
        group.barrier();
        if (rank == 0) slices = nullptr;
        group.barrier();
        std::vector<std::shared_ptr<Allocation>> next;
        for (int i = 0; i < 8; ++i) {
            next.push_back(group.allocate(bytes));
            std::fill(next.back()->data(), next.back()->data() + bytes, '\x7f');
        }
        group.barrier();
        for (int owner = 0; owner < world_size; ++owner) {
            EXPECT_EQ(slice_of(*others, owner, bytes)[bytes - 1], letter(1, owner));
            if (rank == 0) continue;
            EXPECT_EQ(slice_of(*slices, owner, bytes)[bytes - 1], letter(0, owner));
        }
    });
}

INSTANTIATE_TEST_SUITE_P(Groups, GroupThreadsMappedSlices, ::testing::Values(1, 2, 3, 4),
                         [](const auto& group) { return "on_" + std::to_string(group.param); });

TEST(GroupThreadsMappedSlices, DifferentSizesAreNamed) {
    ThreadRanks ranks(3);
    const std::int64_t page = page_bytes();
    const auto errors = ranks.errors_of([&](int rank, Group& group) { group.map_slices(rank == 1 ? 2 * page : page); });
    for (const std::string& error : errors) {
        EXPECT_TRUE(contains(error, {"map_slices", std::to_string(page), std::to_string(2 * page), "on rank 1"}));
    }
    for (int r = 0; r < 3; ++r)
        EXPECT_EQ(error_of([&] { ranks.group(r).barrier(); }), errors[static_cast<std::size_t>(r)]);
}

TEST(GroupThreadsMappedSlices, AnotherCollectiveIsNamed) {
    ThreadRanks ranks(2);
    const auto errors = ranks.errors_of([](int rank, Group& group) {
        if (rank == 0) return group.barrier();
        group.map_slices(page_bytes());
    });
    for (const std::string& error : errors) EXPECT_TRUE(contains(error, {"barrier on rank 0", "on rank 1"}));
}

TEST(GroupThreadsMappedSlices, ARankThatNeverComesIsNamed) {
    ThreadRanks ranks(3, 300ms);
    const auto took = duration_of([&] {
        const auto errors = ranks.errors_of([](int rank, Group& group) {
            if (rank != 2) group.map_slices(page_bytes());
        });
        for (const std::size_t r : {0u, 1u}) EXPECT_TRUE(contains(errors[r], {"rank 2", "did not take part"}));
    });
    EXPECT_LT(took, 2s);
}

TEST(GroupThreadsMappedSlices, OfAClosedGroup) {
    ThreadRanks ranks(2);
    ranks.group(0).close();
    EXPECT_TRUE(contains(error_of([&] { ranks.group(0).map_slices(page_bytes()); }), {"rank 0", "closed"}));
    EXPECT_TRUE(contains(error_of([&] { ranks.group(1).map_slices(page_bytes()); }), {"rank 0", "left the group"}));
}

// The others hear of it at once, and the group goes on.
TEST(GroupThreadsMappedSlices, ARankWithoutRoomIsNamed) {
    ThreadRanks ranks(3, 20s, 16 << 20);
    const auto took = duration_of([&] {
        ranks.run([](int rank, Group& group) {
            const std::int64_t bytes = 4 << 20;
            const auto taken = rank == 1 ? group.allocate(14 << 20) : nullptr;
            if (rank == 1) {
                EXPECT_THROW(group.map_slices(bytes), std::bad_alloc);
            } else {
                try {
                    group.map_slices(bytes);
                    ADD_FAILURE() << "it was mapped";
                } catch (const std::runtime_error& error) {
                    EXPECT_TRUE(contains(error.what(), {"map_slices of 4194304 bytes", "rank 1 has no room"}));
                }
            }
            EXPECT_NO_THROW(expect_one_buffer(group, *group.map_slices(page_bytes()), page_bytes()));
        });
    });
    EXPECT_LT(took, 5s);
}

// Arenas and control memories that this process has mapped or open: as long as there are any, so is their memory.
std::int64_t memories_of_groups() {
    std::int64_t count = 0;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) count += line.find("memfd:partita") != std::string::npos;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
        std::error_code gone;  // the directory's own descriptor
        const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
        count += target.find("memfd:partita") != std::string::npos;
    }
    return count;
}

TEST(GroupThreadsMappedSlices, LeaveNothing) {
    constexpr int world_size = 2;
    const std::int64_t before = memories_of_groups();
    for (int round = 0; round < 50; ++round) {
        std::vector<std::shared_ptr<MappedSlices>> views(world_size);
        {
            ThreadRanks ranks(world_size);
            ranks.run([&](int rank, Group& group) {
                auto& view = views[static_cast<std::size_t>(rank)] = group.map_slices(1 << 20);
                std::fill(view->data(), view->data() + view->bytes(), '\1');
                group.barrier();
                group.close();
            });
            if (round % 2 == 0) views.clear();  // before the group goes, or after it
        }
        EXPECT_EQ(memories_of_groups() > before, round % 2 == 1) << "a view keeps the memory, and nothing else does";
    }
    EXPECT_EQ(memories_of_groups(), before);
}

// Ranks as processes ------------------------------------------------------------------------------------------------

class GroupProcessesMappedSlices : public ::testing::TestWithParam<int> {};

TEST_P(GroupProcessesMappedSlices, AreOneBuffer) {
    RankProcesses ranks(GetParam(), [](int rank, Group& group) {
        const auto before = group.allocate((rank + 1) * page_bytes());
        for (const std::int64_t bytes : {page_bytes(), 3 * page_bytes(), huge_page_bytes + page_bytes()}) {
            expect_one_buffer(group, *group.map_slices(bytes), bytes);
        }
    });
    ranks.expect_success();
}

INSTANTIATE_TEST_SUITE_P(Groups, GroupProcessesMappedSlices, ::testing::Values(1, 2, 3, 4),
                         [](const auto& group) { return "of_" + std::to_string(group.param); });

enum class End { drops, closes, exits, is_killed };

// How rank 1 parts with its view.
[[noreturn]] void part(End end, std::unique_ptr<Group> group, std::shared_ptr<MappedSlices> slices) {
    if (end == End::is_killed) raise(SIGKILL);
    if (end == End::exits) _exit(0);
    const std::int64_t bytes = slices->bytes();
    slices = nullptr;
    const auto next = group->allocate(bytes);
    std::fill(next->data(), next->data() + bytes, '\x7f');
    if (end == End::drops) group->barrier();
    if (end == End::closes) group = nullptr;
    for (;;) pause();
}

// Ranks 0 and 2 count up in turn in one word, which lies in rank 1's slice.
void count_in_turn(int rank, char* where) {
    auto& count = *reinterpret_cast<std::atomic<int>*>(where);
    const auto deadline = std::chrono::steady_clock::now() + 20s;
    for (int next = rank / 2; next < 10; next += 2) {
        while (count != next)
            require_true(std::chrono::steady_clock::now() < deadline, "the other's count is not seen");
        ++count;
    }
}

TEST(GroupProcessesMappedSlices, OutliveTheirOwner) {
    const std::int64_t bytes = huge_page_bytes;
    for (const End end : {End::drops, End::closes, End::exits, End::is_killed}) {
        SCOPED_TRACE(::testing::Message() << "end " << static_cast<int>(end));
        Forked ranks(3, [&](int rank, const Pipes& pipes) {
            auto listener = std::make_unique<Listener>();
            const auto addresses = pipes.exchange(listener->address());
            auto group =
                std::make_unique<Group>(join(*listener, rank, addresses, test_token, arena_bytes, 10s), 20s, 1);
            auto slices = group->map_slices(bytes);
            char* own = slice_of(*slices, rank, bytes);
            std::fill(own + sizeof(int), own + bytes, letter(0, rank));
            group->barrier();
            if (rank == 1) part(end, std::move(group), std::move(slices));
            const std::string error = error_of([&] { group->barrier(); });
            require_true(error.empty() == (end == End::drops), "it has not parted: " + error);
            group = nullptr;
            for (int owner = 0; owner < 3; ++owner) {
                const char* slice = slice_of(*slices, owner, bytes);
                const auto count = std::count(slice + sizeof(int), slice + bytes, letter(0, owner));
                require_true(count == bytes - std::int64_t{sizeof(int)}, "the slice of rank " + std::to_string(owner));
            }
            count_in_turn(rank, slice_of(*slices, 1, bytes));
        });
        ranks.relay();
        for (const int survivor : {0, 2}) EXPECT_EQ(ranks.report_of(survivor), "");
    }
}

TEST(GroupProcessesMappedSlices, AKilledRankIsNamed) {
    RankProcesses ranks(3, [](int rank, Group& group) {
        group.barrier();
        if (rank == 1) raise(SIGKILL);
        const std::string error = error_of([&] { group.map_slices(page_bytes()); });
        require(contains(error, {"rank 1 (process ", "died"}), "the error");
    });
    ranks.expect_success(1);
}

TEST(GroupProcessesMappedSlices, AForkedChildSharesThemAndIsNoMember) {
    RankProcesses ranks(2, [](int rank, Group& group) {
        auto slices = group.map_slices(page_bytes());
        group.barrier();
        if (rank == 0) {
            const pid_t child = fork();
            if (child == 0) {
                slices->data()[page_bytes()] = 'c';
                const std::string error = error_of([&] { group.map_slices(page_bytes()); });
                slices = nullptr;
                _exit(contains(error, {"forked child"}) ? 0 : 1);
            }
            int status = -1;
            require_true(waitpid(child, &status, 0) == child && status == 0, "the child was not refused");
        }
        group.barrier();
        require_true(slices->data()[page_bytes()] == 'c', "what the child wrote is not seen");
        expect_one_buffer(group, *group.map_slices(page_bytes()), page_bytes());
    });
    ranks.expect_success();
}

}  // namespace
}  // namespace partita
