#include "partita/file_queue.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include "partita/digest.h"

namespace partita {
namespace {

// Bytes that are digested and then given to the system, or the other way round: the second reads them out of the cache.
// Less would cost more calls of the system.
constexpr std::int64_t piece_bytes = 512 << 10;
// The same past the page cache, where nothing is written before a piece is complete.
constexpr std::int64_t direct_piece_bytes = 1 << 20;
constexpr std::align_val_t direct_alignment{4096};

enum class Kind { write, read, sync };

struct Job {
    Kind kind = Kind::sync;
    int fd = -1;
    int direct = -1;  // of a write: the same file, opened with O_DIRECT
    std::int64_t offset = 0;
    char* data = nullptr;
    std::int64_t nbytes = 0;
    std::int64_t first = 0;  // of a read: the part of its bytes that goes to `data`
    std::int64_t kept = 0;
    std::int64_t awaited_writes = 0;  // of a sync: how many must be done before it begins
    bool done = false;
    FileResult result;
};

Job job_of(Kind kind, int fd, std::int64_t offset, void* data, std::int64_t nbytes) {
    Job job;
    job.kind = kind;
    job.fd = fd;
    job.offset = offset;
    job.data = static_cast<char*>(data);
    job.nbytes = nbytes;
    return job;
}

// Moves all of [data, data + nbytes), however little the system takes at a time. Returns an error of FileResult.
template <class Move>
int move_all(char* data, std::int64_t nbytes, std::int64_t offset, int error_at_nothing, const Move& move) {
    while (nbytes > 0) {
        const ssize_t moved = move(data, static_cast<std::size_t>(nbytes), offset);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0) return errno;
        if (moved == 0) return error_at_nothing;
        data += moved;
        offset += moved;
        nbytes -= moved;
    }
    return 0;
}

int write_piece(int fd, char* data, std::int64_t nbytes, std::int64_t offset) {
    return move_all(data, nbytes, offset, EIO,
                    [fd](const char* from, std::size_t size, off_t to) { return pwrite(fd, from, size, to); });
}

int read_piece(int fd, char* data, std::int64_t nbytes, std::int64_t offset) {
    return move_all(data, nbytes, offset, FileResult::unexpected_end,
                    [fd](char* to, std::size_t size, off_t from) { return pread(fd, to, size, from); });
}

// Memory of a thread for what passes through, which stays in the cache as a rule. Grows, and is not cleared. Aligned as
// files opened with O_DIRECT want it.
class Passage {
  public:
    char* of(std::int64_t nbytes) {
        if (nbytes > nbytes_) {
            memory_.reset(static_cast<char*>(::operator new(static_cast<std::size_t>(nbytes), direct_alignment)));
            nbytes_ = nbytes;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(char* memory) const { ::operator delete(memory, direct_alignment); }
    };
    std::unique_ptr<char, Free> memory_;
    std::int64_t nbytes_ = 0;
};

// The disk begins with what was written, so that it does not wait for the sync; less than this is left to the sync. An
// error of the disk may be told here or by the sync. What else this call says is no error: not all systems have it.
int begin_writeback(const Job& job) {
    if (job.nbytes < piece_bytes || sync_file_range(job.fd, job.offset, job.nbytes, SYNC_FILE_RANGE_WRITE) == 0)
        return 0;
    const bool is_of_disk = errno == EIO || errno == ENOSPC || errno == EDQUOT;
    return is_of_disk ? errno : 0;
}

// A write or a read. Gives up when nobody wants the result any more.
FileResult move_pieces(const Job& job, char* const memory, const std::atomic<bool>& closing) {
    Xxh3 digest(memory, job.nbytes);
    for (std::int64_t begin = 0; begin < job.nbytes; begin += piece_bytes) {
        if (closing) return {};
        char* const data = memory + begin;
        const std::int64_t size = std::min(piece_bytes, job.nbytes - begin);
        if (job.kind == Kind::write) digest.advance(begin + size);
        const auto move = job.kind == Kind::write ? write_piece : read_piece;
        if (const int error = move(job.fd, data, size, job.offset + begin); error != 0) return {error, 0};
        if (job.kind == Kind::read) digest.advance(begin + size);
    }
    if (job.kind == Kind::write) {
        if (const int error = begin_writeback(job); error != 0) return {error, 0};
    }
    return {0, digest.digest()};
}

// A write past the page cache: neither its copying nor its locks, and the disk begins at once. What the system does not
// take so (other blocks than ours, or none at all) is written as usual.
FileResult write_direct(const Job& job, Passage& passage, const std::atomic<bool>& closing) {
    Xxh3 digest(job.data, job.nbytes);
    char* const memory = passage.of(direct_piece_bytes);
    for (std::int64_t begin = 0; begin < job.nbytes; begin += direct_piece_bytes) {
        if (closing) return {};
        const std::int64_t size = std::min(direct_piece_bytes, job.nbytes - begin);
        digest.advance(begin + size);
        std::memcpy(memory, job.data + begin, static_cast<std::size_t>(size));
        int error = write_piece(job.direct, memory, size, job.offset + begin);
        if (error == EINVAL) error = write_piece(job.fd, memory, size, job.offset + begin);
        if (error != 0) return {error, 0};
    }
    return {0, digest.digest()};
}

FileResult read_part(const Job& job, Passage& passage, const std::atomic<bool>& closing) {
    char* const memory = passage.of(job.nbytes);
    const FileResult result = move_pieces(job, memory, closing);
    if (result.error == 0 && job.kept > 0) {
        std::memcpy(job.data, memory + job.first, static_cast<std::size_t>(job.kept));
    }
    return result;
}

FileResult sync_file(int fd) {
    while (fdatasync(fd) != 0) {
        if (errno != EINTR) return {errno, 0};
    }
    return {};
}

FileResult carry_out(const Job& job, Passage& passage, const std::atomic<bool>& closing) {
    if (job.kind == Kind::sync) return sync_file(job.fd);
    if (job.kind == Kind::write && job.direct >= 0) return write_direct(job, passage, closing);
    if (job.kind == Kind::read && job.kept < job.nbytes) return read_part(job, passage, closing);
    return move_pieces(job, job.data, closing);
}

// Threads that are made meanwhile leave signals to those of the program. A write beyond a limit is an error then,
// where a signal would have ended the process. Faults of the thread itself stay its own.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t blocked;
        sigfillset(&blocked);
        for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&blocked, fault);
        pthread_sigmask(SIG_SETMASK, &blocked, &before_);
    }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

}  // namespace

class FileQueue::State {
  public:
    explicit State(IsInterrupted is_interrupted) : is_interrupted_(std::move(is_interrupted)), process_(getpid()) {}
    ~State();

    void start(int threads);
    bool forked() const { return getpid() != process_; }
    std::int64_t put(const Job& job);
    std::int64_t take_over(std::int64_t first, std::int64_t last, char* copies);
    std::vector<FileResult> wait(std::optional<std::int64_t> count);
    bool idle();

  private:
    using Numbers = std::set<std::int64_t>;

    void require_own_process() const;
    // Of the rest, the caller holds the lock.
    void work(std::unique_lock<std::mutex>& lock, Passage& passage);
    Numbers::iterator begin_job(Numbers::iterator ready);
    void finish(std::int64_t number, const FileResult& result);
    void release_syncs(const Job& write, std::int64_t number);
    std::optional<std::int64_t> last_ready_write(std::int64_t first, std::int64_t last);
    bool is_writing(std::int64_t first, std::int64_t last);
    template <class Reached>
    void await(std::unique_lock<std::mutex>& lock, const Reached& reached);
    Job& job(std::int64_t number) { return jobs_[static_cast<std::size_t>(number - collected_)]; }
    std::int64_t queued() const { return collected_ + static_cast<std::int64_t>(jobs_.size()); }

    const IsInterrupted is_interrupted_;
    const pid_t process_;

    std::mutex mutex_;              // of what follows
    std::condition_variable work_;  // for the threads: a job is ready, or the end
    std::condition_variable done_;  // for those who wait: a job is done
    std::deque<Job> jobs_;          // from number `collected_` on
    std::int64_t collected_ = 0;    // the first job of which no wait() has returned the result
    std::int64_t done_before_ = 0;  // the first job that is not done
    // A job that is not done is in one of these.
    Numbers ready_;
    Numbers busy_;                              // a thread is at it, or take_over() copies its bytes
    Numbers blocked_;                           // syncs with awaited_writes
    std::map<int, std::int64_t> writes_to_do_;  // by file descriptor: how many are not done
    std::atomic<bool> closing_ = false;

    std::vector<std::thread> threads_;
};

FileQueue::State::~State() {
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void FileQueue::State::start(int threads) {
    const SignalsBlocked blocked;
    threads_.reserve(static_cast<std::size_t>(threads));
    for (int i = 0; i < threads; ++i) {
        threads_.emplace_back([this] {
            Passage passage;
            std::unique_lock lock(mutex_);
            while (!closing_) work(lock, passage);
        });
    }
}

void FileQueue::State::require_own_process() const {
    if (forked()) throw std::runtime_error("a FileQueue works only in the process that made it, not in a forked child");
}

std::int64_t FileQueue::State::put(const Job& job) {
    require_own_process();
    const std::lock_guard lock(mutex_);
    const std::int64_t number = queued();
    jobs_.push_back(job);
    const auto writes = writes_to_do_.find(job.fd);
    if (job.kind == Kind::sync && writes != writes_to_do_.end()) {
        jobs_.back().awaited_writes = writes->second;
        blocked_.insert(number);
        return number;
    }
    if (job.kind == Kind::write) ++writes_to_do_[job.fd];
    ready_.insert(number);
    work_.notify_one();
    return number;
}

// One job, when there is one.
void FileQueue::State::work(std::unique_lock<std::mutex>& lock, Passage& passage) {
    if (ready_.empty()) {
        work_.wait(lock);
        return;
    }
    const std::int64_t number = *begin_job(ready_.begin());
    const Job todo = job(number);
    lock.unlock();
    const FileResult result = carry_out(todo, passage, closing_);
    lock.lock();
    finish(number, result);
}

FileQueue::State::Numbers::iterator FileQueue::State::begin_job(Numbers::iterator ready) {
    return busy_.insert(ready_.extract(ready)).position;
}

void FileQueue::State::finish(std::int64_t number, const FileResult& result) {
    busy_.erase(number);
    Job& finished = job(number);
    finished.result = result;
    finished.done = true;
    if (finished.kind == Kind::write) release_syncs(finished, number);
    while (done_before_ < queued() && job(done_before_).done) ++done_before_;
    done_.notify_all();
}

// A write is done: the syncs that were queued behind it await one less.
void FileQueue::State::release_syncs(const Job& write, std::int64_t number) {
    const auto writes = writes_to_do_.find(write.fd);
    if (--writes->second == 0) writes_to_do_.erase(writes);
    for (auto blocked = blocked_.upper_bound(number); blocked != blocked_.end();) {
        const auto sync = blocked++;
        if (job(*sync).fd != write.fd || --job(*sync).awaited_writes > 0) continue;
        ready_.insert(blocked_.extract(sync));
        work_.notify_one();
    }
}

// The last one of [first, last), if there is one: the threads come from the front.
std::optional<std::int64_t> FileQueue::State::last_ready_write(std::int64_t first, std::int64_t last) {
    for (auto ready = ready_.lower_bound(last); ready != ready_.begin();) {
        if (*--ready < first) break;
        if (job(*ready).kind == Kind::write) return *ready;
    }
    return std::nullopt;
}

bool FileQueue::State::is_writing(std::int64_t first, std::int64_t last) {
    return std::any_of(busy_.lower_bound(first), busy_.lower_bound(last),
                       [this](std::int64_t number) { return job(number).kind == Kind::write; });
}

std::int64_t FileQueue::State::take_over(std::int64_t first, std::int64_t last, char* copies) {
    require_own_process();
    std::unique_lock lock(mutex_);
    if (first < 0 || first > last || last > queued()) {
        throw std::invalid_argument("take_over of the jobs " + std::to_string(first) + " to " + std::to_string(last) +
                                    " of " + std::to_string(queued()));
    }
    std::int64_t copied = 0;
    std::int64_t end = last;  // the jobs behind it have been looked at
    while (const auto number = last_ready_write(first, end)) {
        end = *number;
        auto held = ready_.find(*number);
        held = begin_job(held);
        Job& taken = job(*number);  // stays where it is: only jobs that are done leave the queue
        lock.unlock();
        if (taken.nbytes > 0) std::memcpy(copies + copied, taken.data, static_cast<std::size_t>(taken.nbytes));
        lock.lock();
        taken.data = copies + copied;
        copied += taken.nbytes;
        ready_.insert(busy_.extract(held));
        work_.notify_one();
    }
    await(lock, [&] { return !is_writing(first, last); });
    return copied;
}

std::vector<FileResult> FileQueue::State::wait(std::optional<std::int64_t> count) {
    require_own_process();
    std::unique_lock lock(mutex_);
    if (count && (*count < 0 || *count > static_cast<std::int64_t>(jobs_.size()))) {
        throw std::invalid_argument("wait for " + std::to_string(*count) + " of " + std::to_string(jobs_.size()) +
                                    " jobs");
    }
    const std::int64_t end = count ? collected_ + *count : queued();
    await(lock, [&] { return done_before_ >= end; });
    std::vector<FileResult> results;
    for (; collected_ < end; ++collected_) {
        results.push_back(jobs_.front().result);
        jobs_.pop_front();
    }
    return results;
}

bool FileQueue::State::idle() {
    require_own_process();
    const std::lock_guard lock(mutex_);
    return done_before_ == queued();
}

template <class Reached>
void FileQueue::State::await(std::unique_lock<std::mutex>& lock, const Reached& reached) {
    while (!done_.wait_for(lock, look_around_every, reached)) {
        lock.unlock();  // who answers may do anything
        if (is_interrupted_ && is_interrupted_()) throw Interrupted("files");
        lock.lock();
    }
}

FileQueue::FileQueue(int threads, IsInterrupted is_interrupted) {
    if (threads < 1) throw std::invalid_argument("a FileQueue needs at least 1 thread: " + std::to_string(threads));
    state_ = std::make_unique<State>(std::move(is_interrupted));
    state_->start(threads);
}

FileQueue::~FileQueue() {
    // In a forked child the threads and what they wait on are the parent's: nothing here can be ended.
    if (state_->forked()) static_cast<void>(state_.release());
}

namespace {

void check(std::int64_t offset, std::int64_t nbytes) {
    if (nbytes < 0 || offset < 0 || offset > std::numeric_limits<std::int64_t>::max() - nbytes) {
        throw std::invalid_argument(std::to_string(nbytes) + " bytes at offset " + std::to_string(offset) +
                                    ": neither may be negative, nor their sum beyond 2**63");
    }
}

void check(std::int64_t offset, const void* data, std::int64_t nbytes) {
    check(offset, nbytes);
    if (data == nullptr && nbytes > 0) throw std::invalid_argument("the address of the bytes is 0");
}

}  // namespace

std::int64_t FileQueue::write(int fd, std::int64_t offset, const void* data, std::int64_t nbytes, int direct) {
    check(offset, data, nbytes);
    Job job = job_of(Kind::write, fd, offset, const_cast<void*>(data), nbytes);
    job.direct = direct;
    return state_->put(job);
}
std::int64_t FileQueue::read(int fd, std::int64_t offset, void* data, std::int64_t nbytes) {
    return read_part(fd, offset, nbytes, 0, data, nbytes);
}
std::int64_t FileQueue::read_part(int fd, std::int64_t offset, std::int64_t nbytes, std::int64_t first, void* data,
                                  std::int64_t kept) {
    check(offset, nbytes);
    check(offset, data, kept);
    if (first < 0 || first > nbytes - kept) {
        throw std::invalid_argument(std::to_string(kept) + " bytes from number " + std::to_string(first) +
                                    " on are no part of " + std::to_string(nbytes));
    }
    Job job = job_of(Kind::read, fd, offset, data, nbytes);
    job.first = first;
    job.kept = kept;
    return state_->put(job);
}
std::int64_t FileQueue::sync(int fd) { return state_->put(job_of(Kind::sync, fd, 0, nullptr, 0)); }

std::int64_t FileQueue::take_over(std::int64_t first, std::int64_t last, void* copies) {
    return state_->take_over(first, last, static_cast<char*>(copies));
}
std::vector<FileResult> FileQueue::wait(std::optional<std::int64_t> count) { return state_->wait(count); }
bool FileQueue::idle() const { return state_->idle(); }

}  // namespace partita
