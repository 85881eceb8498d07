// Arenas: where allocations lie, and that their pages come and go with them.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <map>
#include <new>
#include <thread>

#include "partita/shared_memory/arena.h"
#include "support.h"

namespace partita {
namespace {

constexpr std::int64_t page = 4096, huge_page = 2 << 20;

std::int64_t address(const void* data) { return reinterpret_cast<std::intptr_t>(data); }

TEST(Arena, LiveAllocationsNeverOverlap) {
    constexpr std::int64_t capacity = 64 << 20;
    const auto arena = Arena::create(capacity);
    struct Live {
        std::shared_ptr<Allocation> allocation;
        std::uint64_t mark;
    };
    std::map<std::int64_t, Live> model;  // by offset
    const auto words = [](const Allocation& allocation) { return reinterpret_cast<std::uint64_t*>(allocation.data()); };
    Random random;
    std::uint64_t next_mark = 1;
    for (int step = 0; step < 5000; ++step) {
        if (random.bits() % 5 < 2 && !model.empty()) {
            auto victim = model.begin();
            std::advance(victim, random.bits() % model.size());
            const Live& live = victim->second;
            const std::int64_t last = live.allocation->bytes() / 8 - 1;
            ASSERT_EQ(words(*live.allocation)[0], live.mark) << "somebody else wrote here";
            ASSERT_EQ(words(*live.allocation)[last], live.mark) << "somebody else wrote here";
            model.erase(victim);
            continue;
        }
        const std::int64_t bytes = 8 + random.bits() % (random.bits() % 8 == 0 ? 5 << 20 : 20000);
        std::shared_ptr<Allocation> allocation;
        try {
            allocation = arena->allocate(bytes);
        } catch (const std::bad_alloc&) {
            model.clear();  // full or in pieces: once all is free, anything fits again
            allocation = arena->allocate(bytes);
        }
        ASSERT_EQ(allocation->bytes(), bytes);
        ASSERT_EQ(address(allocation->data()) % page, 0);
        if (bytes >= huge_page) {
            ASSERT_EQ(allocation->offset() % huge_page, 0);
        }
        ASSERT_GE(allocation->offset(), 0);
        ASSERT_LE(allocation->offset() + bytes, capacity);
        const auto after = model.lower_bound(allocation->offset());
        if (after != model.end()) {
            ASSERT_LE(allocation->offset() + bytes, after->first);
        }
        if (after != model.begin()) {
            const Allocation& before = *std::prev(after)->second.allocation;
            ASSERT_LE(before.offset() + before.bytes(), allocation->offset());
        }
        ASSERT_EQ(words(*allocation)[0], 0u);
        ASSERT_EQ(words(*allocation)[bytes / 8 - 1], 0u);
        words(*allocation)[0] = words(*allocation)[bytes / 8 - 1] = next_mark;
        const std::int64_t offset = allocation->offset();
        model[offset] = {std::move(allocation), next_mark++};
    }
    model.clear();
    EXPECT_EQ(arena->committed_bytes(), 0);
    EXPECT_EQ(arena->allocate(capacity)->offset(), 0) << "free neighbours were not joined";
}

TEST(Arena, FindsTheAllocationThatHoldsARange) {
    const auto arena = Arena::create(8 << 20), foreign = Arena::create(8 << 20);
    auto first = arena->allocate(100), second = arena->allocate(3 * page), third = arena->allocate(0);
    EXPECT_EQ(arena->find(first->data(), 100), first);
    EXPECT_EQ(arena->find(first->data() + 99, 1), first);
    EXPECT_EQ(arena->find(second->data() + 1, 3 * page - 1), second);
    EXPECT_EQ(arena->find(third->data(), 0), third);
    EXPECT_EQ(arena->find(first->data(), 101), nullptr) << "past the end";
    EXPECT_EQ(arena->find(first->data() + 200, 1), nullptr) << "in the rest of the page";
    EXPECT_EQ(arena->find(second->data() - 1, 2), nullptr) << "across two";
    EXPECT_EQ(arena->find(second->data(), 3 * page + 1), nullptr) << "past the end";
    EXPECT_EQ(arena->find(arena->mapping()->data() + (4 << 20), 1), nullptr) << "never allocated";
    EXPECT_EQ(arena->find(arena->mapping()->data() - 1, 1), nullptr) << "before the arena";
    EXPECT_EQ(arena->find(arena->mapping()->data() + arena->capacity_bytes(), 1), nullptr) << "behind the arena";
    const int local = 0;
    const auto theirs = foreign->allocate(100);
    EXPECT_EQ(arena->find(&local, sizeof local), nullptr);
    EXPECT_EQ(arena->find(theirs->data(), 1), nullptr);
    EXPECT_EQ(arena->find(nullptr, 0), nullptr);
    const char* freed = second->data();
    second = nullptr;
    EXPECT_EQ(arena->find(freed, 1), nullptr) << "freed";
    EXPECT_EQ(arena->find(first->data(), 100), first);
}

TEST(Arena, PagesGoBackAndComeBackAsZeros) {
    const auto arena = Arena::create(64 << 20);
    EXPECT_EQ(arena->committed_bytes(), 0);
    auto kept = arena->allocate(5 * page);
    std::memset(kept->data(), 1, 5 * page);
    EXPECT_GE(arena->committed_bytes(), 5 * page);
    const std::int64_t small = arena->committed_bytes();
    auto large = arena->allocate(8 << 20);
    const std::int64_t offset = large->offset();
    std::memset(large->data(), 2, 8 << 20);
    EXPECT_GE(arena->committed_bytes(), small + (8 << 20));
    auto holder = large;  // memory lives as long as anybody holds it
    large = nullptr;
    EXPECT_GE(arena->committed_bytes(), small + (8 << 20));
    holder = nullptr;
    EXPECT_LE(arena->committed_bytes(), small);
    large = arena->allocate(8 << 20);
    EXPECT_EQ(large->offset(), offset);
    EXPECT_EQ(std::count(large->data(), large->data() + (8 << 20), '\0'), 8 << 20);
    EXPECT_EQ(std::count(kept->data(), kept->data() + 5 * page, '\1'), 5 * page);
}

TEST(Arena, AnAllocationKeepsItsArena) {
    auto arena = Arena::create(4 << 20);
    const auto allocation = arena->allocate(1000);
    arena = nullptr;
    std::memset(allocation->data(), 3, 1000);
    EXPECT_EQ(allocation->data()[999], 3);
}

TEST(Arena, RefusesWhatDoesNotFit) {
    const auto arena = Arena::create(4 << 20);
    EXPECT_THROW(arena->allocate((4 << 20) + 1), std::bad_alloc);
    auto half = arena->allocate(huge_page), rest = arena->allocate(huge_page);
    EXPECT_THROW(arena->allocate(1), std::bad_alloc);
    half = nullptr;
    EXPECT_EQ(arena->allocate(huge_page)->offset(), 0);
    const auto page_in_front = arena->allocate(1);
    EXPECT_THROW(arena->allocate(huge_page), std::bad_alloc) << "too long for what is left";
    EXPECT_EQ(arena->allocate(huge_page - page)->offset(), page);
}

TEST(Arena, AForkedChildDoesNotFreeItsParentsPages) {
    const auto arena = Arena::create(4 << 20);
    auto allocation = arena->allocate(10 * page);
    std::memset(allocation->data(), 7, 10 * page);
    const std::int64_t committed = arena->committed_bytes();
    const pid_t child = fork();
    if (child == 0) {
        allocation = nullptr;
        _exit(0);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    EXPECT_EQ(arena->committed_bytes(), committed);
    EXPECT_EQ(std::count(allocation->data(), allocation->data() + 10 * page, '\7'), 10 * page);
}

TEST(Arena, LeftPagesStayForTheLifeOfTheArena) {
    const auto arena = Arena::create(4 << 20);
    auto left = arena->allocate(page);
    char* data = left->data();
    data[17] = 5;
    left->leave_pages();
    left = nullptr;
    EXPECT_EQ(data[17], 5);
    EXPECT_GE(arena->committed_bytes(), page);
    EXPECT_NE(arena->allocate(page)->data(), data);
    EXPECT_EQ(arena->find(data, 1), nullptr);
}

TEST(Arena, DefaultCapacityFitsTheAddressSpace) {
    for (const int world_size : {1, 2, 64, 1000}) {
        const std::int64_t bytes = Arena::default_capacity_bytes(world_size);
        EXPECT_EQ(bytes % huge_page, 0);
        EXPECT_GT(bytes, 0);
        EXPECT_LE(bytes * world_size, std::int64_t{33} << 40);
        const auto arena = Arena::create(bytes);
        arena->allocate(page)->data()[0] = 1;
    }
}

// Threads allocate, look up and drop at the same time.
TEST(GroupThreadsArena, IsSafe) {
    const auto arena = Arena::create(64 << 20);
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
        threads.emplace_back([&, t] {
            Random random(static_cast<std::uint32_t>(t));
            for (int i = 0; i < 300; ++i) {
                auto allocation = arena->allocate(1 + random.bits() % 100000);
                char* data = allocation->data();
                data[0] = data[allocation->bytes() - 1] = static_cast<char>(t);
                EXPECT_EQ(arena->find(data, allocation->bytes()), allocation);
                EXPECT_EQ(arena->find(data, allocation->bytes() + 1), nullptr);
                EXPECT_EQ(data[0], static_cast<char>(t));
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(arena->committed_bytes(), 0);
}

}  // namespace
}  // namespace partita
