// Bytes between memory and files, moved by threads of their own, with a digest of every piece.
//
// [Note: jobs of a file queue]
// Jobs are numbered from 0 in the order of the calls and begin in this order. Several threads work at several jobs at
// once, so what one of them writes, in a file or in memory, must not be what another one reads or writes. Only a sync
// waits for others: for the writes to its file descriptor that were queued before it.
//
// Memory and file descriptors must stay valid until their job is done, and memory that goes to a file must stay as it
// is until then. Whoever needs such memory earlier takes the jobs over: take_over() copies what no thread has begun to
// read.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "partita/interruption.h"

namespace partita {

// What became of a job.
struct FileResult {
    static constexpr int unexpected_end = -1;

    int error = 0;             // 0, an errno, or unexpected_end: the file was shorter than what was to be read
    std::uint64_t digest = 0;  // XXH3-64 of the bytes; 0 after an error, and of a sync
};

class FileQueue {
  public:
    // `is_interrupted`: asked by calls that wait, every 50 ms. Where the answer is true, the call throws Interrupted;
    // the jobs go on, and the call can be repeated. Throws std::invalid_argument for less than one thread.
    explicit FileQueue(int threads, IsInterrupted is_interrupted = {});
    // Drops the jobs that are not done. No thread uses their memory or files any more.
    ~FileQueue();

    // Each returns the number of its job. All calls throw std::invalid_argument for arguments that make no sense, and
    // std::runtime_error in a forked child, which has none of the threads.
    // `direct`: the same file, opened with O_DIRECT, or -1. The bytes then go to the disk by way of memory of the
    // thread's own, and not through the page cache; those of whole blocks, at the offset of a block, do so.
    std::int64_t write(int fd, std::int64_t offset, const void* data, std::int64_t nbytes, int direct = -1);
    // Memory is undefined after an error.
    std::int64_t read(int fd, std::int64_t offset, void* data, std::int64_t nbytes);
    // Reads nbytes too, into memory of the thread's own, and keeps `kept` of them, from number `first` on, in `data`:
    // perhaps none, where only the digest is wanted. The digest is of all of them.
    std::int64_t read_part(int fd, std::int64_t offset, std::int64_t nbytes, std::int64_t first, void* data,
                           std::int64_t kept);
    // fdatasync, once the writes to `fd` that were queued before are done, also those with an error.
    std::int64_t sync(int fd);

    // When it returns, no write of the jobs [first, last) reads the memory that it was queued with: those under way are
    // done, and the others read a copy, one behind the other at `copies`. There must be room for the bytes of all of
    // them. Returns how many bytes were copied.
    std::int64_t take_over(std::int64_t first, std::int64_t last, void* copies);

    // Returns when the first `count` jobs of which no wait() has returned the result are done (without `count`: all
    // that are queued at the time of the call). Their results, in the order of their numbers.
    std::vector<FileResult> wait(std::optional<std::int64_t> count = {});

    // Whether all jobs that are queued are done: wait() would not wait.
    bool idle() const;

  private:
    class State;
    std::unique_ptr<State> state_;
};

}  // namespace partita
