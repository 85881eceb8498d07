// The file queue: bytes and digests, errors, the order of jobs, memory that is taken over, the end.
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <future>

#include "file_support.h"
#include "partita/digest.h"
#include "partita/file_queue.h"

namespace {

// How much the system takes at a time, and how often it is interrupted before.
std::atomic<std::size_t> most_bytes = SIZE_MAX;
std::atomic<unsigned> calls = 0;

bool interrupts() {
    if (most_bytes == SIZE_MAX || calls++ % 2 == 0) return false;
    errno = EINTR;
    return true;
}

// What the system is told to begin with, and what it answers.
std::mutex begun_mutex;
std::vector<std::pair<off_t, off_t>> begun;
std::atomic<int> answer = 0;

}  // namespace

// These stand before the C library's.
extern "C" int sync_file_range(int, off_t offset, off_t nbytes, unsigned) {
    const std::lock_guard lock(begun_mutex);
    begun.emplace_back(offset, nbytes);
    errno = answer;
    return answer == 0 ? 0 : -1;
}
extern "C" ssize_t pwrite(int fd, const void* data, std::size_t size, off_t offset) {
    return interrupts() ? -1 : syscall(SYS_pwrite64, fd, data, std::min<std::size_t>(size, most_bytes), offset);
}
extern "C" ssize_t pread(int fd, void* data, std::size_t size, off_t offset) {
    return interrupts() ? -1 : syscall(SYS_pread64, fd, data, std::min<std::size_t>(size, most_bytes), offset);
}

namespace partita {
namespace {

void expect_done(const std::vector<FileResult>& results, std::size_t count) {
    ASSERT_EQ(results.size(), count);
    for (const FileResult& result : results) EXPECT_EQ(result.error, 0) << std::strerror(result.error);
}

TEST(FileQueue, WritesAndReadsWithDigests) {
    const std::int64_t sizes[] = {0, 1, 4096, (512 << 10) - 1, 512 << 10, (512 << 10) + 1, (3 << 20) + 5};
    for (const int threads : {1, 2, 5}) {
        FileQueue queue(threads);
        File file;
        const Bytes bytes = random_bytes(8 << 20);
        Bytes back(bytes.size());
        std::int64_t offset = 0, number = 0;
        for (const std::int64_t size : sizes) {
            EXPECT_EQ(queue.write(file.fd(), 100 + offset, bytes.data() + offset, size), number++);
            offset += size;
        }
        const auto written = queue.wait();
        expect_done(written, std::size(sizes));
        offset = 0;
        for (const std::int64_t size : sizes) {
            EXPECT_EQ(queue.read(file.fd(), 100 + offset, back.data() + offset, size), number++);
            offset += size;
        }
        const auto read = queue.wait();
        expect_done(read, std::size(sizes));
        EXPECT_EQ(file.size(), 100 + offset);
        EXPECT_TRUE(std::equal(bytes.begin(), bytes.begin() + offset, back.begin()));
        offset = 0;
        for (std::size_t i = 0; i < std::size(sizes); offset += sizes[i++]) {
            EXPECT_EQ(written[i].digest, xxh3_64(bytes.data() + offset, sizes[i]));
            EXPECT_EQ(read[i].digest, written[i].digest);
        }
    }
}

TEST(FileQueue, KeepsAPartOfWhatItReads) {
    FileQueue queue(2);
    File file;
    const Bytes bytes = random_bytes(2'000'001);
    queue.write(file.fd(), 3, bytes.data(), 2'000'001);
    queue.wait();
    const std::int64_t parts[][2] = {{0, 0}, {0, 1}, {600'000, 700'000}, {2'000'000, 1}, {0, 2'000'001}};
    for (const auto& [first, kept] : parts) {
        Bytes back(static_cast<std::size_t>(kept) + 1);  // with one more that nobody writes
        queue.read_part(file.fd(), 3, 2'000'001, first, back.data(), kept);
        const auto results = queue.wait();
        expect_done(results, 1);
        EXPECT_EQ(results[0].digest, xxh3_64(bytes.data(), 2'000'001));
        EXPECT_TRUE(std::equal(back.begin(), back.end() - 1, bytes.begin() + first));
        EXPECT_EQ(back.back(), Bytes::value_type{});
    }
    queue.read_part(file.fd(), 3, 2'000'002, 0, nullptr, 0);
    EXPECT_EQ(queue.wait().front().error, FileResult::unexpected_end);
    Bytes back(1);
    EXPECT_THROW(queue.read_part(file.fd(), 0, 10, 10, back.data(), 1), std::invalid_argument);
    EXPECT_THROW(queue.read_part(file.fd(), 0, 10, -1, back.data(), 1), std::invalid_argument);
}

TEST(FileQueue, HoweverLittleTheSystemTakes) {
    FileQueue queue(2);
    File file;
    const Bytes bytes = random_bytes(600'000);
    Bytes back(bytes.size());
    most_bytes = 5003;
    queue.write(file.fd(), 0, bytes.data(), 300'000);
    queue.write(file.fd(), 300'000, bytes.data() + 300'000, 300'000);
    auto results = queue.wait();
    queue.read(file.fd(), 0, back.data(), 600'000);
    results.push_back(queue.wait().front());
    most_bytes = SIZE_MAX;
    expect_done(results, 3);
    EXPECT_EQ(file.content(), bytes);
    EXPECT_EQ(back, bytes);
    EXPECT_EQ(results[2].digest, xxh3_64(bytes.data(), 600'000));
}

TEST(FileQueue, ErrorsBelongToTheirJobs) {
    FileQueue queue(2);
    File file;
    const int read_only = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    int pipe_ends[2];
    ASSERT_EQ(pipe(pipe_ends), 0);
    Bytes bytes = random_bytes(1000);
    queue.write(-1, 0, bytes.data(), 1000);
    queue.write(file.fd(), 0, bytes.data(), 1000);
    queue.write(read_only, 0, bytes.data(), 1000);
    queue.write(pipe_ends[1], 0, bytes.data(), 1000);
    queue.sync(-1);
    queue.sync(pipe_ends[1]);
    queue.sync(file.fd());
    queue.read(-1, 0, bytes.data(), 1000);
    const auto results = queue.wait();
    ASSERT_EQ(results.size(), 8u);
    const int expected[] = {EBADF, 0, EBADF, ESPIPE, EBADF, EINVAL, 0, EBADF};
    for (std::size_t i = 0; i < 8; ++i) {
        EXPECT_EQ(results[i].error, expected[i]) << i << ": " << std::strerror(results[i].error);
        EXPECT_TRUE(results[i].error == 0 || results[i].digest == 0);
    }
    for (const int fd : {read_only, pipe_ends[0], pipe_ends[1]}) close(fd);
}

TEST(FileQueue, AFileThatEndsTooEarly) {
    FileQueue queue(1);
    File file;
    const Bytes bytes = random_bytes(600'000);
    queue.write(file.fd(), 0, bytes.data(), 600'000);
    expect_done(queue.wait(), 1);
    Bytes back(600'001);
    queue.read(file.fd(), 0, back.data(), 600'000);
    queue.read(file.fd(), 0, back.data(), 600'001);
    queue.read(file.fd(), 600'000, back.data(), 1);
    queue.read(file.fd(), 600'000, back.data(), 0);
    const auto results = queue.wait();
    ASSERT_EQ(results.size(), 4u);
    EXPECT_EQ(results[0].error, 0);
    EXPECT_EQ(results[1].error, FileResult::unexpected_end);
    EXPECT_EQ(results[2].error, FileResult::unexpected_end);
    EXPECT_EQ(results[3].error, 0);
}

// The system takes a part and refuses the rest, with a signal that would end the process.
TEST(FileQueue, AFileThatMayNotGrow) {
    File file;
    const Bytes bytes = random_bytes(600'000);
    rlimit before{};
    getrlimit(RLIMIT_FSIZE, &before);
    const rlimit limit{560'003, before.rlim_max};
    FileQueue queue(1);
    setrlimit(RLIMIT_FSIZE, &limit);
    queue.write(file.fd(), 0, bytes.data(), 600'000);
    queue.write(file.fd(), 0, bytes.data(), 10);
    const auto results = queue.wait();
    setrlimit(RLIMIT_FSIZE, &before);
    ASSERT_EQ(results.size(), 2u);
    EXPECT_EQ(results[0].error, EFBIG);
    EXPECT_EQ(results[1].error, 0);
    EXPECT_EQ(file.content(), Bytes(bytes.begin(), bytes.begin() + 560'003));
}

TEST(FileQueue, ADeviceWithoutSpace) {
    FileQueue queue(1);
    const int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    ASSERT_GE(full, 0);
    queue.write(full, 0, "abc", 3);
    EXPECT_EQ(queue.wait().at(0).error, ENOSPC);
    close(full);
}

// Small writes are left to the sync. A system that has no such call is none the worse for it.
TEST(FileQueue, TheDiskBeginsWithLargeWrites) {
    FileQueue queue(1);
    File file;
    Bytes bytes = random_bytes(3 << 20);
    begun.clear();
    queue.write(file.fd(), 0, bytes.data(), 1000);
    queue.write(file.fd(), 1000, bytes.data(), 2 << 20);
    queue.read(file.fd(), 0, bytes.data(), 1 << 20);
    expect_done(queue.wait(), 3);
    EXPECT_EQ(begun, (std::vector<std::pair<off_t, off_t>>{{1000, 2 << 20}}));
    for (const auto& [answers, expected] : {std::pair{ENOSYS, 0}, {EINVAL, 0}, {EIO, EIO}, {ENOSPC, ENOSPC}}) {
        answer = answers;
        queue.write(file.fd(), 0, bytes.data(), 1 << 20);
        EXPECT_EQ(queue.wait().at(0).error, expected) << std::strerror(answers);
    }
    answer = 0;
}

// Whole blocks, from memory at any address; other sizes and offsets go the usual way.
TEST(FileQueue, WritesPastThePageCache) {
    FileQueue queue(2);
    File file;
    const std::string path = "/proc/self/fd/" + std::to_string(file.fd());
    const int direct = open(path.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC);
    if (direct < 0) GTEST_SKIP() << "this file system has no O_DIRECT";
    const Bytes bytes = random_bytes(4 << 20);
    const std::int64_t mib = 1 << 20, sizes[] = {4096, 2 * mib + 8192, 1000, mib};
    std::int64_t offset = 0;
    begun.clear();
    for (const std::int64_t size : sizes) {
        queue.write(file.fd(), offset, bytes.data() + 1 + offset, size, direct);
        offset += size;
    }
    queue.sync(file.fd());
    const auto results = queue.wait();
    expect_done(results, 5);
    EXPECT_EQ(file.content(), Bytes(bytes.begin() + 1, bytes.begin() + 1 + offset));
    EXPECT_EQ(results[1].digest, xxh3_64(bytes.data() + 1 + 4096, sizes[1]));
    EXPECT_EQ(results[2].digest, xxh3_64(bytes.data() + 1 + 4096 + sizes[1], sizes[2]));
    EXPECT_TRUE(begun.empty()) << "the disk has them already";
    close(direct);
}

TEST(FileQueue, AnErrorPastThePageCacheIsTheJobs) {
    FileQueue queue(1);
    File file;
    const Bytes bytes = random_bytes(8192);
    queue.write(file.fd(), 0, bytes.data(), 8192, 1 << 20);  // no such descriptor
    EXPECT_EQ(queue.wait().at(0).error, EBADF);
    EXPECT_EQ(file.size(), 0);
}

TEST(FileQueue, RefusesWhatMakesNoSense) {
    EXPECT_THROW(FileQueue(0), std::invalid_argument);
    FileQueue queue(1);
    Bytes bytes(10);
    EXPECT_THROW(queue.write(0, -1, bytes.data(), 1), std::invalid_argument);
    EXPECT_THROW(queue.write(0, 0, bytes.data(), -1), std::invalid_argument);
    EXPECT_THROW(queue.read(0, INT64_MAX, bytes.data(), 1), std::invalid_argument);
    EXPECT_THROW(queue.read(0, 0, nullptr, 1), std::invalid_argument);
    EXPECT_THROW(queue.wait(1), std::invalid_argument);
    EXPECT_THROW(queue.wait(-1), std::invalid_argument);
    EXPECT_THROW(queue.take_over(0, 1, bytes.data()), std::invalid_argument);
    EXPECT_THROW(queue.take_over(-1, 0, bytes.data()), std::invalid_argument);
    EXPECT_TRUE(queue.wait().empty());
    EXPECT_TRUE(queue.wait(0).empty());
}

TEST(FileQueue, ManyJobsOfManyCallers) {
    constexpr int callers = 4, jobs = 200;
    constexpr std::int64_t nbytes = 3000;
    FileQueue queue(3);
    File file;
    const Bytes bytes = random_bytes(callers * jobs * nbytes);
    std::vector<std::thread> threads;
    for (int caller = 0; caller < callers; ++caller) {
        threads.emplace_back([&, caller] {
            for (std::int64_t i = 0; i < jobs; ++i) {
                const std::int64_t offset = (caller * jobs + i) * nbytes;
                queue.write(file.fd(), offset, bytes.data() + offset, nbytes);
                if (i % 50 == 49) queue.sync(file.fd());
            }
        });
    }
    std::size_t collected = 0;
    while (collected < 100) collected += queue.wait().size();  // while they are queued
    for (std::thread& thread : threads) thread.join();
    collected += queue.wait().size();
    EXPECT_EQ(collected, static_cast<std::size_t>(callers * (jobs + 4)));
    EXPECT_EQ(file.content(), bytes);
}

TEST(FileQueue, WaitsForTheFirstJobsAlone) {
    Gate gate;
    FileQueue queue(2);
    File file;
    const Bytes bytes = random_bytes(100);
    queue.write(file.fd(), 0, bytes.data(), 100);
    queue.write(file.fd(), 100, gate.page(), gate.nbytes);
    queue.write(file.fd(), 5000, bytes.data(), 100);
    expect_done(queue.wait(1), 1);
    auto rest = std::async(std::launch::async, [&] { return queue.wait(); });
    gate.await_arrival();
    EXPECT_EQ(rest.wait_for(120ms), std::future_status::timeout);
    EXPECT_FALSE(queue.idle());
    gate.open();
    expect_done(rest.get(), 2);
    EXPECT_TRUE(queue.idle());
}

// The sync has what stands behind the descriptor when it begins: a file at first, a pipe once the write is held.
TEST(FileQueue, ASyncComesAfterTheWritesBeforeIt) {
    Gate gate;
    FileQueue queue(2);
    File file, other;
    int pipe_ends[2];
    ASSERT_EQ(pipe(pipe_ends), 0);
    const int fd = dup(file.fd());
    const Bytes bytes = random_bytes(10);
    queue.write(fd, 0, gate.page(), gate.nbytes);
    queue.write(fd, 5000, bytes.data(), 10);
    queue.sync(fd);
    queue.sync(other.fd());
    queue.write(other.fd(), 0, bytes.data(), 10);
    gate.await_arrival();
    while (other.size() < 10) std::this_thread::sleep_for(1ms);  // the other thread has gone past the sync
    dup2(pipe_ends[1], fd);
    gate.open();
    const auto results = queue.wait();
    ASSERT_EQ(results.size(), 5u);
    const int expected[] = {ESPIPE, 0, EINVAL, 0, 0};
    for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(results[i].error, expected[i]) << i;
    for (const int end : {fd, pipe_ends[0], pipe_ends[1]}) close(end);
}

TEST(FileQueue, TakesOverWhatHasNotBegun) {
    Gate gate;
    FileQueue queue(1);
    File file;
    constexpr std::int64_t nbytes = 600'000, jobs = 6;
    Bytes memory = random_bytes(jobs * nbytes), other = random_bytes(nbytes, 2);
    const Bytes before = memory, other_before = other;
    queue.write(file.fd(), jobs * nbytes, gate.page(), gate.nbytes);
    for (std::int64_t i = 0; i < jobs; ++i) queue.write(file.fd(), i * nbytes, memory.data() + i * nbytes, nbytes);
    queue.sync(file.fd());
    Bytes back(10);
    queue.read(file.fd(), 0, back.data(), 10);
    gate.await_arrival();
    Bytes copies(static_cast<std::size_t>(4 * nbytes + 1), 7);
    EXPECT_EQ(queue.take_over(2, 6, copies.data()), 4 * nbytes);  // does not wait for job 0, which is no part of it
    EXPECT_EQ(copies.back(), 7);
    std::fill(memory.begin() + nbytes, memory.begin() + 5 * nbytes, static_cast<unsigned char>(0));
    EXPECT_EQ(queue.take_over(3, 3, nullptr), 0);
    gate.open();
    const auto results = queue.wait();
    expect_done(results, jobs + 3);
    Bytes content = file.content();
    content.resize(before.size());
    EXPECT_EQ(content, before);
    for (std::size_t i = 0; i < jobs; ++i) {
        EXPECT_EQ(results[i + 1].digest, xxh3_64(before.data() + static_cast<std::int64_t>(i) * nbytes, nbytes));
    }
    EXPECT_EQ(queue.take_over(0, jobs + 3, nullptr), 0) << "all are done";
}

TEST(FileQueue, ATakeOverWaitsForTheWriteUnderWay) {
    Gate gate;
    FileQueue queue(1);
    File file;
    Bytes memory = random_bytes(1000), copies(5000);
    queue.write(file.fd(), 0, gate.page(), gate.nbytes);
    queue.write(file.fd(), 5000, memory.data(), 1000);
    gate.await_arrival();
    auto copied = std::async(std::launch::async, [&] { return queue.take_over(0, 2, copies.data()); });
    EXPECT_EQ(copied.wait_for(120ms), std::future_status::timeout);
    gate.open();
    EXPECT_EQ(copied.get(), 1000);
    expect_done(queue.wait(), 2);
}

// Again and again, while the threads are at it: the bytes of before, and no race.
TEST(FileQueue, TakesOverWhileJobsRun) {
    constexpr std::int64_t nbytes = 20'000, jobs = 60;
    FileQueue queue(2);
    for (unsigned round = 0; round < 30; ++round) {
        File file;
        const Bytes before = random_bytes(jobs * nbytes, round);
        Bytes memory = before, copies(memory.size());
        std::int64_t first = 0;
        for (std::int64_t i = 0; i < jobs; ++i) {
            const auto n = queue.write(file.fd(), i * nbytes, memory.data() + i * nbytes, nbytes);
            if (i == 0) first = n;
        }
        queue.sync(file.fd());
        if (round % 3 == 1) std::this_thread::sleep_for(1ms);
        const std::int64_t copied = queue.take_over(first, first + jobs, copies.data());
        std::fill(memory.begin(), memory.end(), static_cast<unsigned char>(0));
        EXPECT_EQ(copied % nbytes, 0);
        EXPECT_LE(copied, jobs * nbytes);
        const auto results = queue.wait();
        expect_done(results, jobs + 1);
        ASSERT_TRUE(file.content() == before) << "round " << round;
        for (std::size_t i = 0; i < jobs; ++i) {
            ASSERT_EQ(results[i].digest, xxh3_64(before.data() + static_cast<std::int64_t>(i) * nbytes, nbytes));
        }
    }
}

TEST(FileQueue, AnInterruptedWaitCanBeRepeated) {
    Gate gate;
    std::atomic<int> asked = 0;
    FileQueue queue(1, [&] { return ++asked == 2; });
    File file;
    queue.write(file.fd(), 0, gate.page(), gate.nbytes);
    gate.await_arrival();
    EXPECT_THROW(queue.wait(), Interrupted);
    EXPECT_EQ(asked, 2);
    asked = 1;
    EXPECT_THROW(queue.take_over(0, 1, nullptr), Interrupted);
    gate.open();
    expect_done(queue.wait(), 1);
}

// The job that would make the file long comes behind many that take their time.
TEST(FileQueue, TheEndDropsWhatHasNotBegun) {
    File file;
    {
        auto bytes = std::make_unique<Bytes>(random_bytes(1 << 20));
        Gate gate;
        std::thread opener;
        {
            FileQueue queue(1);
            queue.write(file.fd(), 0, gate.page(), gate.nbytes);
            for (int i = 0; i < 2000; ++i) queue.write(file.fd(), 0, bytes->data(), 1 << 20);
            queue.write(file.fd(), 2 << 20, bytes->data(), 1);
            queue.sync(file.fd());
            gate.await_arrival();
            opener = std::thread([&] {
                std::this_thread::sleep_for(50ms);  // the queue is ending by then, most of the time
                gate.open();
            });
        }
        bytes = nullptr;  // nobody reads them any more
        opener.join();
    }
    EXPECT_LE(file.size(), 1 << 20);
    for (int i = 0; i < 20; ++i) FileQueue idle(3);
}

TEST(FileQueue, AForkedChildLeavesItAlone) {
    FileQueue* queue = new FileQueue(2);
    File file;
    const pid_t child = fork();
    if (child == 0) {
        int failed = 0;
        try {
            queue->write(file.fd(), 0, "abc", 3);
            failed = 1;
        } catch (const std::runtime_error&) {
        }
        delete queue;
        _exit(failed);
    }
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    queue->write(file.fd(), 0, "abc", 3);
    expect_done(queue->wait(), 1);
    delete queue;
}

}  // namespace
}  // namespace partita
